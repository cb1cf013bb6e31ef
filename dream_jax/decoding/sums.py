"""Sums over the vocabulary, and the token at which the running sum exceeds a target.

The running sum has two levels, over blocks of tokens and then inside one block, because a running sum over the whole
vocabulary takes a hundred times as long as a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


class Blocks(NamedTuple):
    """Rows of nonnegative numbers, divided into C blocks of width W (about sqrt(V)); the last is padded with zeros.

    Attributes:
      x_RCW: the numbers.
      sum_RC: the sum of each block.
    """

    x_RCW: Float[jax.Array, "R C W"]
    sum_RC: Float[jax.Array, "R C"]

    def total(self) -> Float[jax.Array, "R"]:
        """The sum of each row."""
        return jnp.sum(self.sum_RC, axis=-1)


def in_blocks(x_RV: Float[jax.Array, "R V"]) -> Blocks:
    """Divides rows of numbers into blocks and sums each block."""
    rows, vocab = x_RV.shape
    width = 1 << ((vocab - 1).bit_length() + 1) // 2
    x_RCW = jnp.pad(x_RV, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    # Without the barrier XLA would compute the sum of the sums by reading all numbers a second time.
    return Blocks(x_RCW, jax.lax.optimization_barrier(jnp.sum(x_RCW, axis=-1)))


def first_exceeding(x: Blocks, target_R: Float[jax.Array, "R"]) -> Int[jax.Array, "R"]:
    """The first token with a positive number at which the running sum exceeds the target.

    Args:
      x: at least one number per row is positive.
      target_R: 0 or above; if it is not below the sum of the row, the result is the last token with a positive number.
    """
    width = x.x_RCW.shape[-1]
    running_RC = jnp.cumsum(x.sum_RC, axis=-1)
    block_R = jnp.minimum(jnp.sum(running_RC <= target_R[:, None], axis=-1), _last_positive(x.sum_RC))
    before_R = jnp.where(
        block_R > 0, jnp.take_along_axis(running_RC, jnp.maximum(block_R - 1, 0)[:, None], axis=-1)[:, 0], 0.0
    )
    inside_RW = jnp.take_along_axis(x.x_RCW, block_R[:, None, None], axis=1)[:, 0]
    running_RW = before_R[:, None] + jnp.cumsum(inside_RW, axis=-1)
    offset_R = jnp.minimum(jnp.sum(running_RW <= target_R[:, None], axis=-1), _last_positive(inside_RW))
    # Because of rounding the token found may have the number 0; then the next positive one is taken.
    offset_R = jnp.argmax((inside_RW > 0) & (jnp.arange(width) >= offset_R[:, None]), axis=-1)
    return (block_R * width + offset_R).astype(jnp.int32)


def _last_positive(x: Float[jax.Array, "R C"]) -> Int[jax.Array, "R"]:
    size = x.shape[-1]
    return size - 1 - jnp.argmax(jnp.flip(x > 0, axis=-1), axis=-1)
