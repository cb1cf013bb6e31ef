"""Defines the variants that are compared: their masks, loss weights and shifts, and the models with them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from dream_jax import masks
from dream_jax.config import PRESETS
from dream_jax.model import Dream, DropoutKeys
from dream_jax.objective import CartWeight, InverseTimeWeight, LinearWeight, LossWeight, UniformWeight

MODEL = "nano"

_WEIGHTS: dict[str, LossWeight] = {
    "cart": CartWeight(0.1),
    "uniform": UniformWeight(),
    "linear": LinearWeight(),
    "inverse-time": InverseTimeWeight(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to build and train the model.

    Attributes:
      name: the name of the variant in tables.
      mask: the name of the mask, as `masks.parse` reads it.
      shift: if true, position i is predicted from the hidden state at i - 1, as in Dream; if false, from that at i.
      weight: the name of the loss weight, a key of `_WEIGHTS`.
      hide_pads: whether tokens after the first end-of-text token are hidden from attention and not learned. Dream
        attends to them and learns them.

    Raises:
      ValueError: the mask or the weight is unknown.
    """

    name: str
    mask: str = "bidirectional"
    shift: bool = True
    weight: str = "cart"
    hide_pads: bool = False

    def __post_init__(self) -> None:
        masks.parse(self.mask)
        if self.weight not in _WEIGHTS:
            raise ValueError(f"weight={self.weight!r} is not one of {sorted(_WEIGHTS)}")

    def loss_weight(self) -> LossWeight:
        """Returns the loss weight with the name `weight`."""
        return _WEIGHTS[self.weight]

    def model(self, seed: int) -> Dream:
        """Returns a model with random weights, which are the same for all variants with the same seed."""
        make = Dream if self.shift else UnshiftedDream
        model = jax.jit(lambda: make(PRESETS[MODEL], rngs=nnx.Rngs(seed)))()
        model.trained_mask = self.mask
        return model


class UnshiftedDream(Dream):
    """A model that predicts each position from the hidden state at the same position, as LLaDA does.

    The objective and the sampler read the hidden state one position on the left of the position that they predict, so
    this model moves each hidden state one position to the left. The first hidden state is not available then, so rows
    must begin with a prompt. Sampling with a key/value cache does not support this model.
    """

    def hidden(
        self,
        tokens_BT: Int[jax.Array, "B T"],
        mask: masks.Mask,
        positions_BT: Int[jax.Array, "B T"],
        dropout_keys: DropoutKeys = None,
    ) -> Float[jax.Array, "B T D"]:
        """Returns the hidden states of `Dream.hidden`, each moved one position to the left."""
        return jnp.roll(super().hidden(tokens_BT, mask, positions_BT, dropout_keys), -1, axis=1)


MASKS = ("bidirectional", "causal", "prefix", "block-causal:4", "window:4")

VARIANTS = {
    variant.name: variant
    for variant in (
        *(Variant(name=mask, mask=mask) for mask in MASKS),
        # On sudoku the first block is the prompt, which cannot attend to the answer; the second block is the answer.
        Variant(name="block-causal:16", mask="block-causal:16"),
        # With the shift the first cell of the answer is predicted at the last position of the prompt, which cannot
        # attend to the answer. Without the shift it is predicted at its own position, which can.
        Variant(name="block-causal:16, unshifted", mask="block-causal:16", shift=False),
        Variant(name="bidirectional, unshifted", shift=False),
        Variant(name="block-causal:4, unshifted", mask="block-causal:4", shift=False),
        Variant(name="uniform weight", weight="uniform"),
        Variant(name="linear weight", weight="linear"),
        Variant(name="inverse-time weight", weight="inverse-time"),
        Variant(name="pads hidden", hide_pads=True),
    )
}
