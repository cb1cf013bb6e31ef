"""Sums over the vocabulary, and the token at which the running sum exceeds a target.

A running sum over the whole vocabulary takes a hundred times as long as a sum. So it is computed in two levels: over
the sums of blocks of tokens, and then inside one block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


class Blocks(NamedTuple):
    """Rows of nonnegative numbers, divided into C blocks of width W (about sqrt(V)).

    Attributes:
      x_RCW: the nonnegative numbers; the last block is padded with zeros.
      sum_RC: the sum of each block.
    """

    x_RCW: Float[jax.Array, "R C W"]
    sum_RC: Float[jax.Array, "R C"]

    def total(self) -> Float[jax.Array, "R"]:
        """Returns the sum of each row."""
        return jnp.sum(self.sum_RC, axis=-1)


def in_blocks(x_RV: Float[jax.Array, "R V"]) -> Blocks:
    """Returns rows of nonnegative numbers divided into blocks, and the sum of each block."""
    rows, vocab = x_RV.shape
    width = 1 << ((vocab - 1).bit_length() + 1) // 2
    x_RCW = jnp.pad(x_RV, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    # Without the barrier XLA would read all numbers a second time to compute the total.
    return Blocks(x_RCW, jax.lax.optimization_barrier(jnp.sum(x_RCW, axis=-1)))


def first_exceeding(x: Blocks, target_R: Float[jax.Array, "R"]) -> Int[jax.Array, "R"]:
    """Returns the first token with a positive number at which the running sum exceeds the target, int32 [R].

    At least one number in each row must be positive, and the target must be 0 or above. If no running sum exceeds it,
    the result is the last token with a positive number.
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
    # Because of rounding, the token at this offset may have the number 0. The next token with a positive number is used.
    offset_R = jnp.argmax((inside_RW > 0) & (jnp.arange(width) >= offset_R[:, None]), axis=-1)
    return (block_R * width + offset_R).astype(jnp.int32)


def _last_positive(x: Float[jax.Array, "R C"]) -> Int[jax.Array, "R"]:
    """Returns the index of the last positive number of each row."""
    size = x.shape[-1]
    return size - 1 - jnp.argmax(jnp.flip(x > 0, axis=-1), axis=-1)
