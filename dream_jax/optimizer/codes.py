"""Stores the moments of AdamW as 8-bit codes, with one scale per block, geometric levels, and random rounding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key, Num, Shaped, UInt

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
        """Returns the level of each code above 0, float32 in (0, 1]; the codes are whole numbers in float32."""
        return jnp.exp2((code - self.levels) * self.step)

    def shifted(self, noise: jax.Array) -> jax.Array:
        """Returns the distance in levels between a lower level and the number x that `noise` in [0, 1) describes.

        x = lower + noise (upper - lower), where `upper` is the next level. With the ratio r = upper / lower the distance is
        log2(1 + noise (r - 1)) / log2(r). The result is the parabola that has these values at 0, 1/2 and 1; elsewhere it
        differs from them by at most 1.3e-4 levels.
        """
        bend = 4 * math.log2((1 + 2.0**self.step) / 2) / self.step - 2
        return noise * ((1 + bend) - noise * bend)


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

    A itself and zeros are exact. A block with A below 1.2e-38 becomes zero; in a block with A above 8e37 only A and zeros
    are preserved. Infinities and NaN are not preserved.

    Args:
      x: float32, the moment; blocks are formed along its last axis.
      noise: float32, a uniform random number in [0, 1) for each element.
      dtype: the dtype of the codes: "int8" for numbers of any sign, "uint8" for numbers that are not negative.
    """
    blocks = to_blocks(x)
    absmax = block_absmax(blocks)
    return QuantisedMoment(from_blocks(block_codes(blocks, absmax, to_blocks(noise), dtype), x.shape[-1]), absmax)


def dequantise(x: QuantisedMoment) -> Float[jax.Array, "*b d"]:
    """Returns the moment as float32: the level of each code times the `absmax` of its block."""
    return from_blocks(block_values(to_blocks(x.codes), x.absmax), x.codes.shape[-1])


# The next three functions work on arrays that are cut into n blocks of w elements each: [..., n, w].


def block_absmax(x: Float[jax.Array, "*b n w"]) -> Float[jax.Array, "*b n"]:
    """Returns the largest magnitude of each block, or 0 if it is below 1.2e-38.

    Some hardware treats such denormal numbers as zero and some does not; here they always are. NaN is not changed.
    """
    absmax = jnp.max(jnp.abs(x), axis=-1)
    return jnp.where(absmax < _TINY, 0.0, absmax)


def block_codes(
    x: Float[jax.Array, "*b n w"],
    absmax: Float[jax.Array, "*b n"],
    noise: Float[jax.Array, "*b n w"],
    dtype: Literal["int8", "uint8"],
    zero: Float[jax.Array, ""] | float = 0.0,
) -> Num[jax.Array, "*b n w"]:
    """Returns the codes that `quantise` computes, of this dtype, for blocks x whose `block_absmax` is given.

    `zero` is the number 0, see `adam.scale_by_adam`.
    """
    grid, magnitude = _GRIDS[dtype], jnp.abs(x)
    # There is one division per block. The inverse of a number above 8.5e37 is denormal, so it is replaced by the smallest
    # normal number: then the largest magnitude keeps its code, and the others are stored up to 4 times too large.
    inverse = jnp.maximum(1.0 / jnp.where(absmax == 0.0, 1.0, absmax), _TINY)
    ratio = magnitude * inverse[..., None]
    # Levels are counted from the largest one, which is 0: float32 is most exact near 0, so `absmax` keeps its code.
    level = _log2(ratio) * (1.0 / grid.step)
    # `level` is between two codes. The probability of the upper one grows linearly with `ratio`, not with `level`:
    # `noise` is compared with (ratio - below) / (above - below), solved here for `level`.
    code = _nearest(level + (0.5 - grid.shifted(noise))) + grid.levels
    if dtype == "uint8":
        return jnp.where(magnitude > zero, jnp.clip(code, 1, grid.levels), 0).astype(dtype)
    # A ratio below the smallest level that is not zero gets the code 0 or 1.
    is_one = ratio * 2.0**grid.octaves > noise
    code = jnp.where(level < 1 - grid.levels, is_one.astype(jnp.int32), jnp.minimum(code, grid.levels))
    return jnp.where(x < zero, -code, code).astype(dtype)


def block_values(
    codes: Num[jax.Array, "*b n w"], absmax: Float[jax.Array, "*b n"], zero: Float[jax.Array, ""] | float = 0.0
) -> Float[jax.Array, "*b n w"]:
    """Returns the numbers, float32, that codes in blocks represent; `zero` is the number 0, see `adam.scale_by_adam`."""
    grid, code = _GRIDS[codes.dtype.name], codes.astype(jnp.float32)
    if isinstance(zero, jax.Array):
        code = code + zero  # added early, so that two calls have no expression after it in common
    level = grid(jnp.abs(code))
    if codes.dtype == jnp.int8:
        level = jnp.where(code < zero, -level, level)
    return jnp.where(code == zero, code, level) * absmax[..., None]


def _nearest(x: jax.Array) -> jax.Array:
    """Returns the nearest whole number, int32, of float32 numbers between -2**21 and 2**21.

    The sum with 1.5 * 2**23 has no bits for fractions, so the sum is rounded, and its lowest bits are the whole number.
    This takes two instructions. `jnp.round` and a conversion take eight, because they must work for every number.
    """
    return jax.lax.bitcast_convert_type(x + 1.5 * 2.0**23, jnp.int32) - 0x4B400000


def _log2(x: jax.Array) -> jax.Array:
    """Returns log2 of positive float32 numbers to within 5.2e-5, and -127 for zero.

    It takes a third of the instructions of `jnp.log2`, which is exact to the last bit and handles every special number.
    The bits of a float32 number are its exponent and its mantissa. Read as an integer, shifted and scaled (`line`), they
    are log2 except for a curve between two powers of 2. A polynomial in the mantissa approximates this curve; it is exactly
    0 at both ends, so the result for powers of 2 is exact.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    mantissa = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32) - 1.0
    line = (bits - 0x3F800000).astype(jnp.float32) * 2.0**-23
    curve = jnp.float32(_CURVE[0])
    for coefficient in _CURVE[1:]:
        curve = curve * mantissa + coefficient
    return line + mantissa * (1.0 - mantissa) * curve


def _curve() -> tuple[float, ...]:
    """Returns the coefficients of the polynomial q, highest power first, with log2(1 + m) = m + m (1 - m) q(m)."""
    m = (1 - np.cos(np.pi * (np.arange(64) + 0.5) / 64)) / 2  # Chebyshev's nodes, where the largest error is smallest
    return tuple(map(float, np.polyfit(m, (np.log2(1 + m) - m) / (m * (1 - m)), 3)))


_CURVE = _curve()
_TINY = float(np.finfo(np.float32).tiny)


def is_quantised(x: Any) -> bool:
    """Returns whether a node of the optimizer's state is a QuantisedMoment."""
    return isinstance(x, QuantisedMoment)


def to_blocks(x: Shaped[jax.Array, "*b d"]) -> Shaped[jax.Array, "*b n w"]:
    """Reshapes [..., d] to [..., blocks, width], with zeros at the end of the last block."""
    width = min(BLOCK, x.shape[-1])
    short = -x.shape[-1] % width
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, width)


def from_blocks(x: Shaped[jax.Array, "*b n w"], size: int) -> Shaped[jax.Array, "*b d"]:
    """Reshapes [..., blocks, width] to [..., size]: the inverse of `to_blocks`."""
    return x.reshape(*x.shape[:-2], -1)[..., :size]


def random_bits(keys_R: Key[jax.Array, "R"], shape: tuple[int, ...]) -> UInt[jax.Array, "..."]:
    """Returns 32 random bits for each element of an array, for the rounding of moments.

    `jax.random.bits` runs the 20 rounds of a cipher for each element, which took longer on a GPU than everything else in
    the update. Here only the keys of the rows come from it. Within a row the index of the element is mixed with its key
    by the finaliser of MurmurHash3: two multiplications and three shifts, which the compiler fuses into the update. The
    bits depend on the key and the index alone, so a mesh does not change them.

    Args:
      keys_R: one random key for each index of the first axis.
      shape: the shape of the array, [R, ...].

    Returns:
      uint32 of this shape.
    """
    words = jax.random.key_data(keys_R)
    first, last = (words[:, index].reshape(-1, *[1] * (len(shape) - 1)) for index in (0, -1))
    index = jnp.zeros((), jnp.uint32)
    for axis in range(1, len(shape)):
        index = index * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    mixed = index ^ first
    mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    # The second word of the key makes sure that two rows do not have the same bits at other indices.
    mixed = mixed ^ last
    mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> jnp.uint32(16))
