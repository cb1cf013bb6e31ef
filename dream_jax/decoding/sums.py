"""Sums over the vocabulary, and the token at which a running sum passes a number.

Running sums are taken in two levels, over blocks of tokens and then inside one block: a running sum over the whole
vocabulary costs a hundred times what a sum does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


class Blocks(NamedTuple):
    """Rows of numbers, 0 or above, in blocks of about a row's square root; what fills up the last block is 0.

    Attributes:
      x_RCW: the numbers.
      sum_RC: of each block.
    """

    x_RCW: Float[jax.Array, "R C W"]
    sum_RC: Float[jax.Array, "R C"]

    def total(self) -> Float[jax.Array, "R"]:
        """Sum of each row."""
        return jnp.sum(self.sum_RC, axis=-1)


def by_block(x_RV: Float[jax.Array, "R V"]) -> Blocks:
    """Rows of numbers in blocks, and the blocks' sums."""
    rows, vocab = x_RV.shape
    width = 1 << ((vocab - 1).bit_length() + 1) // 2
    x_RCW = jnp.pad(x_RV, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    # The barrier: else a sum of the sums would be compiled into a second reading of all numbers.
    return Blocks(x_RCW, jax.lax.optimization_barrier(jnp.sum(x_RCW, axis=-1)))


def passing(x: Blocks, target_R: Float[jax.Array, "R"]) -> Int[jax.Array, "R"]:
    """The first token at which the running sum exceeds the target, among those of which there is something.

    Args:
      x: at least one number a row above 0.
      target_R: 0 or above; where it is the whole sum or more, the last token of which there is something is taken.
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
    # A token of which there is nothing can only be hit by rounding; step to the next one.
    offset_R = jnp.argmax((inside_RW > 0) & (jnp.arange(width) >= offset_R[:, None]), axis=-1)
    return (block_R * width + offset_R).astype(jnp.int32)


def _last_positive(x: Float[jax.Array, "R C"]) -> Int[jax.Array, "R"]:
    size = x.shape[-1]
    return size - 1 - jnp.argmax(jnp.flip(x > 0, axis=-1), axis=-1)
