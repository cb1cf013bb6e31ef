"""What differs between the models that are compared, and the models themselves.

Knows masks, loss weights and the transformer. Knows nothing of tasks.
"""

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
      name: in tables.
      mask: as `masks.parse` reads it.
      shift: whether position i is predicted from the hidden state at i - 1, as Dream does, or from its own.
      weight: of the loss.
      hide_pads: whether what follows the first end-of-text token is hidden and not learned, rather than attended and
        learned as Dream does.

    Raises:
      ValueError: an unknown mask or weight.
    """

    name: str
    mask: str = "bidirectional"
    shift: bool = True
    weight: str = "cart"
    hide_pads: bool = False

    def __post_init__(self) -> None:
        masks.parse(self.mask)
        if self.weight not in _WEIGHTS:
            raise ValueError(f"{self.weight=} is not one of {sorted(_WEIGHTS)}")

    def loss_weight(self) -> LossWeight:
        """The weight as the objective takes it."""
        return _WEIGHTS[self.weight]

    def model(self, seed: int) -> Dream:
        """Random weights; of one seed the same for all variants."""
        make = Dream if self.shift else InPlace
        model = jax.jit(lambda: make(PRESETS[MODEL], rngs=nnx.Rngs(seed)))()
        model.trained_mask = self.mask
        return model


class InPlace(Dream):
    """Predicts a position from its own hidden state, as LLaDA does.

    Whoever asks takes the hidden state before a position, so each is handed out one place early. That of the first
    position is lost with it: rows must begin with a prompt. For the exact sampler and the objective only.
    """

    def hidden(
        self,
        tokens_BT: Int[jax.Array, "B T"],
        mask: masks.Mask,
        positions_BT: Int[jax.Array, "B T"],
        dropout_keys: DropoutKeys = None,
    ) -> Float[jax.Array, "B T D"]:
        """As `Dream.hidden`, each at the place before its own."""
        return jnp.roll(super().hidden(tokens_BT, mask, positions_BT, dropout_keys), -1, axis=1)


MASKS = ("bidirectional", "causal", "prefix", "block-causal:4", "window:4")

VARIANTS = {
    variant.name: variant
    for variant in (
        *(Variant(name=mask, mask=mask) for mask in MASKS),
        # Of sudoku: one block is the prompt, which so sees nothing of the answer, and one the answer.
        Variant(name="block-causal:16", mask="block-causal:16"),
        # Under the shift the answer's first cell is read at the prompt's last place, and so sees no answer either.
        Variant(name="block-causal:16, unshifted", mask="block-causal:16", shift=False),
        Variant(name="bidirectional, unshifted", shift=False),
        Variant(name="block-causal:4, unshifted", mask="block-causal:4", shift=False),
        Variant(name="uniform weight", weight="uniform"),
        Variant(name="linear weight", weight="linear"),
        Variant(name="inverse-time weight", weight="inverse-time"),
        Variant(name="pads hidden", hide_pads=True),
    )
}
