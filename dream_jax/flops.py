"""FLOPs of a training step, and what share of the hardware's peak they make.

Products forward and backward, attention in full, the vocabulary at masked positions only; what is computed again is not
counted. Knows a model's sizes and the table of chips. Knows nothing of clocks or terminals.
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
        # A frozen matrix has no gradient of its own.
        each = 4 if adapter else 6
        self._head = each * embeddings  # only at masked positions
        matrices = each * layers + 6 * adapter
        attention = 12 * config.num_hidden_layers * config.hidden_size * length  # bidirectional: counted in full
        self._token = matrices + attention

    def step(self, tokens: float, masked: float) -> float:
        """FLOPs of a step over all devices, recomputation not counted."""
        return self._token * tokens + self._head * masked

    def mfu(self, tokens: int, masked: float, seconds: float, mesh: Mesh) -> float | None:
        """Share of the devices' peak, in [0, 1]; None where the peak is not known."""
        chip = chip_of(mesh.devices.flat[0].device_kind)
        if chip is None:
            return None
        return self.step(tokens, masked) / seconds / (chip.peak_flops * mesh.devices.size)
