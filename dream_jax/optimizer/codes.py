"""8-bit codes for the moments of AdamW: blocks with a scale each, geometric levels, and random rounding."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

BLOCK = 32  # small enough that up to 16 devices share the width 3584 of Dream-7B without cutting a block


class QuantisedMoment(NamedTuple):
    """A moment with one byte per element.

    Attributes:
      codes: int8 (any sign) or uint8 (not negative), of the shape of the moment, and sharded like it.
      absmax: float32, the largest magnitude of each block of `BLOCK` elements along the last axis (of the whole axis if
        that is shorter); the last block may be shorter than the others.
    """

    codes: Any
    absmax: Any


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The magnitudes that codes stand for, relative to the largest of a block: 0, then a geometric series up to 1.

    The levels are not equally spaced, because within a block gradients differ by orders of magnitude, and Adam divides by
    the root of the second moment, so that the relative error of each element counts. With equal spacing small second
    moments would become zero, and the updates of their weights would be arbitrarily large.

    Attributes:
      levels: the number of codes above zero.
      octaves: how many powers of two lie between the smallest of them and the largest.
    """

    levels: int
    octaves: int

    @property
    def step(self) -> float:
        """The distance between neighbouring levels in octaves."""
        return self.octaves / (self.levels - 1)

    def __call__(self, code: jax.Array) -> jax.Array:
        """The level of each code; the codes are whole numbers 0..levels in float32."""
        return jnp.where(code > 0, jnp.exp2((code - self.levels) * self.step), 0.0)


# The range is the same for the first moment and for the root of the second: |m| <= 1.2 sqrt(v) at decays of 0.9 and 0.95
# (2.4 at 0.9 and 0.99). The second moment is never rounded below its smallest level, so that updates exceed Adam's by about
# the relative error of a level at most. Updates of elements near that level are smaller: by a third where gradients are
# 1e-5 of the largest of their block, by a factor of 14 where they are 1e-6.
_GRIDS = {"int8": _Grid(127, 16), "uint8": _Grid(255, 32)}


def quantise(
    x: Float[jax.Array, "*b d"], noise: Float[jax.Array, "*b d"], dtype: Literal["int8", "uint8"]
) -> QuantisedMoment:
    """Rounds each element at random to the level below or above it, so that the expected value is the element itself.

    A moment moves by less than one level in a step: rounded to the nearest level it would never move, or move too fast.

    The error of an element a in a block whose largest magnitude is A, for any noise:

        int8    |error| <= 9.3 % |a|, and at most 2**-16 A where |a| < 2**-16 A
        uint8   |error| <= 9.2 % a, and at most 2**-32 A where a < 2**-32 A: there it is rounded up, except zero

    A itself and zeros are exact. Blocks with A below 1.2e-38 become zero; in blocks with A above 8e37 only A is kept.
    Infinities and NaN are not preserved.

    Args:
      x: float32; blocks are taken along its last axis.
      noise: float32 in [0, 1), one number per element.
      dtype: "int8" for any sign, "uint8" for numbers that are not negative.
    """
    grid, size = _GRIDS[dtype], x.shape[-1]
    magnitude = _blocks(jnp.abs(x))
    absmax = jnp.max(magnitude, axis=-1)
    # Some hardware treats denormal numbers as zero and some does not. NaN fails the comparison and stays.
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
    """The float32 numbers that the codes stand for."""
    code = _blocks(x.codes.astype(jnp.float32))
    level = jnp.sign(code) * _GRIDS[x.codes.dtype.name](jnp.abs(code))
    return _without_blocks(level * x.absmax[..., None], x.codes.shape[-1])


def is_quantised(x: Any) -> bool:
    """Whether a node of a state is a quantised moment."""
    return isinstance(x, QuantisedMoment)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., d] -> [..., blocks, width], with zeros at the end of the last block."""
    width = min(BLOCK, x.shape[-1])
    short = -x.shape[-1] % width
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, width)


def _without_blocks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)[..., :size]
