"""FLOPs of a training step, and their share of the peak of the hardware.

Counted are the matrix products of the forward and backward pass, attention over all pairs of tokens, and the output
projection at masked positions only. Recomputation is not counted.
"""

from __future__ import annotations

from jax.sharding import Mesh

from dream_jax import lora
from dream_jax.chips import chip_of
from dream_jax.model import Dream, parameter_count, split_params


class FlopCounter:
    """FLOPs of the steps of a model (arrays or shapes) over rows of one length, and their share of the devices' peak."""

    def __init__(self, model: Dream, length: int):
        config = model.config
        adapter = parameter_count(lora.split(split_params(model)[1])[0])
        embeddings = config.hidden_size * config.vocab_size
        layers = config.num_parameters - embeddings * (1 if config.tie_word_embeddings else 2)
        # A frozen matrix needs the gradient of its input, but not its own.
        each = 4 if adapter else 6
        self._head = each * embeddings  # only at masked positions
        matrices = each * layers + 6 * adapter
        attention = 12 * config.num_hidden_layers * config.hidden_size * length  # bidirectional: all pairs of tokens
        self._token = matrices + attention

    def step(self, tokens: float, masked: float) -> float:
        """FLOPs of a step over all devices, without recomputation."""
        return self._token * tokens + self._head * masked

    def mfu(self, tokens: int, masked: float, seconds: float, mesh: Mesh) -> float | None:
        """The share of the peak of all devices, in [0, 1]; None when the peak is not known."""
        chip = chip_of(mesh.devices.flat[0].device_kind)
        if chip is None:
            return None
        return self.step(tokens, masked) / seconds / (chip.peak_flops * mesh.devices.size)
