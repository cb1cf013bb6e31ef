"""What forward passes of the sampler share: a pass over all tokens, the KV cache, and groups of rows.

A source position is the position whose hidden state predicts a token: with the right shift, the one before the token.

Letters of axes here: M source positions, W tokens of a window, G shards of the batch, R rows of a group (in `index_GR`
those of each shard, in `tokens_RT` those of all shards). The other letters are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks, sharding
from dream_jax.attention import KVCache
from dream_jax.model import Dream

FoundT = TypeVar("FoundT")

# Number of tokens in one group of rows that make a full pass together. It keeps the matrix units of an accelerator
# busy, but is so small that the rows which need no full pass do not wait long.
REFRESH_TOKENS = 512


class CanvasLayout(NamedTuple):
    """The properties of a canvas that do not change while it is denoised.

    Attributes:
      valid_BT: false at padding.
      positions_BT: int32 position of each token in its text, for the rotary embedding.
      mask: the attention mask; the first axis of every array in it is the batch.
      first_mask: the same mask for the first tokens of the canvas only, `StaticSettings.first_width` of them; None if the
        sampler needs no such mask.
    """

    valid_BT: Bool[jax.Array, "B T"]
    positions_BT: Int[jax.Array, "B T"]
    mask: masks.Mask
    first_mask: masks.Mask | None = None


class Block(NamedTuple):
    """The block that each row is writing: the positions start <= t < end. In a row that is done, start is T."""

    start_B: Int[jax.Array, "B"]
    end_B: Int[jax.Array, "B"]


def full(
    model: Dream, canvas_BT: Int[jax.Array, "B T"], layout: CanvasLayout, source_BM: Int[jax.Array, "B M"]
) -> Float[jax.Array, "B M D"]:
    """Returns the hidden states at the source positions, from a forward pass over all tokens."""
    return take(model.hidden(canvas_BT, layout.mask, layout.positions_BT), source_BM)


def empty_kv_cache(model: Dream, rows: int, length: int) -> KVCache:
    """Returns a KV cache of zeros for a canvas [rows, length]: arrays [L, rows, length, K, H] in the compute dtype."""
    config = model.config
    shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
    zeros = sharding.constrain(jnp.zeros(shape, model.compute_dtype), None, "batch", None, "kv_heads", None)
    return KVCache(zeros, zeros)


class RowGroup(NamedTuple):
    """Some rows of the batch that make a forward pass together, the same number from every shard of the batch.

    Attributes:
      index_GR: int32 [G, R], the rows of the group in each shard.
      target_GR: int32 [G, R], as `index_GR`, but `shard_rows` for the rows that only fill up the group: no row of a
        shard has this index, so their results are dropped.
      shard_rows: number of rows of a shard.
    """

    index_GR: jax.Array
    target_GR: jax.Array
    shard_rows: int

    def pick(self, x: jax.Array) -> jax.Array:
        """Returns the rows of the group, [R, ...], of an array [B, ...]."""
        return _joined(take(self._split(x, self.shard_rows), self.index_GR))

    def put(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Returns an array [B, ...] with the rows of the group replaced by `new`, [R, ...]."""
        put = jax.vmap(lambda x, new, target: x.at[target].set(new, mode="drop"))
        return _joined(put(self._split(x, self.shard_rows), self._split(new, self.index_GR.shape[1]), self.target_GR))

    def pick_layers(self, x: jax.Array) -> jax.Array:
        """Does the same as `pick` for an array [L, B, ...]; the result is [L, R, ...]."""
        return jax.vmap(self.pick)(x)

    def put_layers(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Returns an array [L, B, T, ...] with the first W entries of the rows of the group replaced by [L, R, W, ...]."""
        width, rows = new.shape[2], self.index_GR.shape[1]
        put = jax.vmap(lambda x, new, target: x.at[target, :width].set(new, mode="drop"))  # vmap over shards
        put_layer = lambda x, new: _joined(put(self._split(x, self.shard_rows), self._split(new, rows), self.target_GR))
        return jax.vmap(put_layer)(x, new)

    def put_positions(self, x: jax.Array, new: jax.Array, position_RW: jax.Array) -> jax.Array:
        """Returns an array [L, B, T, ...] with entries of the rows of the group replaced.

        Args:
          x: the array.
          new: the new entries, [L, R, W, ...].
          position_RW: their indices on the axis T, int32; an entry with the index T is dropped.
        """
        rows = self.index_GR.shape[1]
        put = jax.vmap(
            lambda x, new, row_R, at_RW: x.at[row_R[:, None], at_RW].set(new, mode="drop")
        )  # vmap over shards
        target, at = self.target_GR, self._split(position_RW, rows)
        put_layer = lambda x, new: _joined(put(self._split(x, self.shard_rows), self._split(new, rows), target, at))
        return jax.vmap(put_layer)(x, new)

    def _split(self, x: jax.Array, rows: int) -> jax.Array:
        """Returns an array [G * rows, ...] as [G, rows, ...]."""
        return x.reshape(self.index_GR.shape[0], rows, *x.shape[1:])


def _joined(x: jax.Array) -> jax.Array:
    """Returns an array [G, rows, ...] as [G * rows, ...], sharded over its rows."""
    return sharding.constrain(x.reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))


def group_rows(batch: int, length: int, tokens: int) -> int:
    """Returns the number of rows that a group has of every shard, so that a pass over it has about `tokens` tokens.

    Args:
      batch: number of rows of the batch.
      length: number of tokens that a pass computes of each row.
      tokens: number of tokens of all rows of the group.
    """
    shards, _ = sharding.token_shards(batch, length)
    return min(batch // shards, max(1, -(-tokens // (shards * length))))


def in_groups(
    waiting_B: Bool[jax.Array, "B"],
    length: int,
    size: int,
    group_pass: Callable[[RowGroup, FoundT], FoundT],
    found: FoundT,
) -> tuple[FoundT, Int[jax.Array, ""]]:
    """Calls `group_pass` for the rows marked in `waiting_B`, one group of rows after the other.

    Args:
      waiting_B: the rows.
      length: number of tokens that a pass computes of each row.
      size: number of rows that a group has of every shard, see `group_rows`.
      group_pass: makes the pass of a group, and returns `found` with its results.
      found: arrays that the first call gets; each further call gets those that the call before it returned.

    Returns:
      The last `found`, and the number of calls (an int32 scalar).
    """
    # A group has the same number of rows from every shard of the batch, so that all devices have the same work.
    shards, _ = sharding.token_shards(waiting_B.shape[0], length)
    shard_rows = waiting_B.shape[0] // shards

    def next_group(state: tuple[jax.Array, FoundT, jax.Array]) -> tuple[jax.Array, FoundT, jax.Array]:
        waiting_B, found, passes = state
        waiting_GB = waiting_B.reshape(shards, shard_rows)
        # Rows that wait for a pass come first. Other rows may fill up the group; their results are dropped.
        index_GR = jnp.argsort(~waiting_GB, axis=1, stable=True)[:, :size].astype(jnp.int32)
        taken_GR = take(waiting_GB, index_GR)
        group = RowGroup(index_GR, jnp.where(taken_GR, index_GR, shard_rows), shard_rows)
        found = group_pass(group, found)
        return group.put(waiting_B, jnp.zeros(shards * size, bool)), found, passes + 1

    state = (waiting_B, found, jnp.int32(0))
    if size == shard_rows:
        # One group holds all rows. XLA would move the loop-invariant body out of a while_loop, and so make a full pass
        # in every step. With `cond` the pass is made only if a row needs it.
        _, found, passes = jax.lax.cond(jnp.any(waiting_B), next_group, lambda state: state, state)
    else:
        _, found, passes = jax.lax.while_loop(lambda state: jnp.any(state[0]), next_group, state)
    return found, passes


def take(x: jax.Array, position_BM: jax.Array) -> jax.Array:
    """Returns the array [B, M, ...] with the entries x[b, position[b, m], ...] of an array x [B, T, ...]."""
    return jnp.take_along_axis(x, position_BM.reshape(*position_BM.shape, *[1] * (x.ndim - 2)), axis=1)
