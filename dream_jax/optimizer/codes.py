"""Stores the moments of AdamW as 8-bit codes, with one scale per block, geometric levels, and random rounding."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

BLOCK = 32  # elements; with up to 16 devices, shards of the width 3584 of Dream-7B are whole blocks


class QuantisedMoment(NamedTuple):
    """A moment with one byte per element.

    Attributes:
      codes: int8 (first moment) or uint8 (second moment, never negative), with the shape and sharding of the moment.
      absmax: float32 [..., blocks], the largest magnitude of each block. A block is `BLOCK` neighbours on the last
        axis, or the whole axis if that is shorter; the last block may be shorter than the others.
    """

    codes: Any
    absmax: Any


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The magnitudes of the codes, divided by the largest magnitude of the block: 0, then a geometric series up to 1.

    The levels are not equally spaced, because gradients within a block differ by orders of magnitude, and Adam divides
    by the square root of the second moment, so that the relative error of each element matters. With equal spacing
    small second moments would become zero, and the updates of their weights would be arbitrarily large.

    Attributes:
      levels: the number of levels above zero.
      octaves: log2 of the ratio between the largest level and the smallest level above zero.
    """

    levels: int
    octaves: int

    @property
    def step(self) -> float:
        """The distance between neighbouring levels, in octaves (log2 of their ratio)."""
        return self.octaves / (self.levels - 1)

    def __call__(self, code: jax.Array) -> jax.Array:
        """Returns the level of each code, float32 in [0, 1]; the codes are whole numbers 0..levels in float32."""
        return jnp.where(code > 0, jnp.exp2((code - self.levels) * self.step), 0.0)


# The second moment v has twice the octaves of the first moment m, so that sqrt(v) has the same range as m. This range
# is needed because |m| <= 1.2 sqrt(v) with b1 = 0.9 and b2 = 0.95 (2.4 sqrt(v) with b2 = 0.99). A second moment above
# zero is never rounded to zero. Therefore updates are larger than those of Adam by at most about the relative error of
# a level. Updates of elements near the smallest level are smaller than those of Adam: by a third for gradients of 1e-5
# of the largest in their block, by a factor of 14 for 1e-6.
_GRIDS = {"int8": _Grid(127, 16), "uint8": _Grid(255, 32)}


def quantise(
    x: Float[jax.Array, "*b d"], noise: Float[jax.Array, "*b d"], dtype: Literal["int8", "uint8"]
) -> QuantisedMoment:
    """Rounds each element randomly to the level below or above it, so that the expected value is the element itself.

    In one step a moment often changes by less than the distance between two levels. Rounded to the nearest level, it
    would then never change, or change too fast.

    The error of an element a in a block whose largest magnitude is A, for any noise:

        int8    |error| <= 9.3 % |a|, and at most 2**-16 A where |a| < 2**-16 A
        uint8   |error| <= 9.2 % a, and at most 2**-32 A where a < 2**-32 A, which is rounded up unless a = 0

    A itself and zeros are exact. A block with A below 1.2e-38 becomes zero; in a block with A above 8e37 only A is
    preserved. Infinities and NaN are not preserved.

    Args:
      x: float32, the moment; blocks are formed along its last axis.
      noise: float32, a uniform random number in [0, 1) for each element.
      dtype: the dtype of the codes: "int8" for numbers of any sign, "uint8" for numbers that are not negative.
    """
    grid, size = _GRIDS[dtype], x.shape[-1]
    magnitude = _blocks(jnp.abs(x))
    absmax = jnp.max(magnitude, axis=-1)
    # Some hardware treats denormal numbers as zero and some does not; here they always are. NaN is not changed.
    absmax = jnp.where(absmax < jnp.finfo(jnp.float32).tiny, 0.0, absmax)
    ratio = magnitude / jnp.where(absmax == 0.0, 1.0, absmax)[..., None]
    low = jnp.clip(jnp.floor(grid.levels + jnp.log2(ratio) / grid.step), 0, grid.levels - 1)
    below, above = grid(low), grid(low + 1)
    code = jnp.where(ratio - below > _blocks(noise) * (above - below), low + 1, low)
    if dtype == "uint8":
        code = jnp.where(magnitude > 0, jnp.maximum(code, 1.0), 0.0)
    code = _without_blocks(code, size)
    return QuantisedMoment((jnp.where(x < 0, -code, code)).astype(dtype), absmax)


def dequantise(x: QuantisedMoment) -> Float[jax.Array, "*b d"]:
    """Returns the moment as float32: the level of each code times the `absmax` of its block."""
    code = _blocks(x.codes.astype(jnp.float32))
    level = jnp.sign(code) * _GRIDS[x.codes.dtype.name](jnp.abs(code))
    return _without_blocks(level * x.absmax[..., None], x.codes.shape[-1])


def is_quantised(x: Any) -> bool:
    """Returns whether a node of the optimizer's state is a QuantisedMoment."""
    return isinstance(x, QuantisedMoment)


def _blocks(x: jax.Array) -> jax.Array:
    """Reshapes [..., d] to [..., blocks, width], with zeros at the end of the last block."""
    width = min(BLOCK, x.shape[-1])
    short = -x.shape[-1] % width
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, width)


def _without_blocks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)[..., :size]
