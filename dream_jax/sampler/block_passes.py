"""Forward passes with `BlockCache`: under the mask of block diffusion the keys and values of finished blocks are exact.

In each step a row makes one of three passes. The first pass over a row computes all tokens up to the end of its first
block. The first pass of a later block computes two blocks: the block before it, whose tokens are final now, and the
block itself. It writes the keys and values of the block before to the cache. Every other pass computes the block alone.
The first token of a block is predicted from the hidden state of the token before the block. A pass over the block alone
does not compute this state, so it is stored with the cache.

The letters of axes are those of `passes`. X is the number of rows of the KV cache: B, or 2 B under guidance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.attention import KVCache, Window
from dream_jax.model import Dream
from dream_jax.sampler import passes
from dream_jax.sampler.passes import Block, CanvasLayout, RowGroup, take

# A group of rows that compute two blocks in one pass has about this many tokens. On an accelerator, a pass over fewer
# tokens is not faster, because reading the weights takes as long.
_TWO_BLOCKS_TOKENS = 256


class FinishedBlocks(NamedTuple):
    """The KV cache and what belongs to it.

    Attributes:
      kv_cache: keys and values, [L, X, T, K, H]; those of the first `cached_X` positions of a row are final.
      before_XD: the hidden state, after the final norm, of the last cached token of each row, in the compute dtype.
      cached_X: int32, the number of leading positions of each row that are cached.
    """

    kv_cache: KVCache
    before_XD: Float[jax.Array, "X D"]
    cached_X: Int[jax.Array, "X"]


def block_cached(
    model: Dream,
    canvas_XT: Int[jax.Array, "X T"],
    layout: CanvasLayout,
    source_XM: Int[jax.Array, "X M"],
    finished: FinishedBlocks,
    active_X: Bool[jax.Array, "X"],
    block: Block,
    *,
    size: int,
    first_width: int,
) -> tuple[Float[jax.Array, "X M D"], FinishedBlocks, Int[jax.Array, "K"], Bool[jax.Array, "X K"]]:
    """Computes the hidden states at the source positions of the rows that are not done, and caches finished blocks.

    Args:
      model: the model.
      canvas_XT: the canvas of each row.
      layout: the layout of these rows; its mask is one of block diffusion with blocks of `size` tokens.
      source_XM: the source positions, all of them in the block of the row or at the position before it.
      finished: the cache.
      active_X: false at rows that are done.
      block: the block of each row; it starts at a multiple of `size` from the start of the answer.
      size: number of tokens of a block.
      first_width: number of tokens, from the start of the canvas, that the first pass over a row computes.

    Returns:
      The hidden states [X, M, D], the cache after the passes, the number of forward passes of each kind that were made
      (int32 [K], see `pass_counts.pass_kinds`), and the kind of the pass that each row needed (bool [X, K]; no kind in rows
      that are done). The hidden states of rows that are done have no meaning.
    """
    start_X, cached_X = block.start_B, finished.cached_X
    first_X = active_X & (cached_X < start_X - size)
    two_X = active_X & ~first_X & (cached_X < start_X)
    one_X = active_X & ~first_X & ~two_X
    # The last column is the token before the block, whose hidden state is kept.
    wanted_XM = jnp.concatenate([source_XM, jnp.maximum(start_X - 1, 0)[:, None]], axis=1)
    blocks = _BlockPasses(model, canvas_XT, layout, wanted_XM, block, size)

    hidden_XMD = jnp.zeros((*wanted_XM.shape, model.config.hidden_size), model.compute_dtype)
    found, first_passes = blocks.first(first_X, first_width, (hidden_XMD, finished.kv_cache))
    rows = canvas_XT.shape[0]
    group = group_rows(rows, size)
    if group == passes.group_rows(rows, 2 * size, rows * 2 * size):
        # All rows fit into one group, so the rows that need only one block take part in its pass.
        any_two = jnp.any(two_X)
        found = jax.lax.cond(any_two, lambda found: blocks.two(two_X, one_X, found), lambda found: found, found)
        any_one = jnp.any(one_X) & ~any_two
        two_passes = any_two.astype(jnp.int32)
    else:
        found, two_passes = blocks.two_in_groups(two_X, group, found)
        any_one = jnp.any(one_X)
    hidden_XMD, kv_cache = found
    hidden_XMD = jax.lax.cond(
        any_one, lambda hidden: blocks.one(one_X, kv_cache, hidden), lambda hidden: hidden, hidden_XMD
    )
    made_K = jnp.stack([first_passes, two_passes, any_one.astype(jnp.int32)])
    needed_XK = jnp.stack([first_X, two_X, one_X], axis=1)

    before_XD = jnp.where((first_X | two_X)[:, None], hidden_XMD[:, -1], finished.before_XD)
    from_before_XM = one_X[:, None] & (source_XM < start_X[:, None])
    hidden_XMD = jnp.where(from_before_XM[:, :, None], finished.before_XD[:, None], hidden_XMD[:, :-1])
    cached_X = jnp.where(active_X, jnp.maximum(cached_X, start_X), cached_X)
    return hidden_XMD, FinishedBlocks(kv_cache, before_XD, cached_X), made_K, needed_XK


def group_rows(rows: int, size: int) -> int:
    """Returns the number of rows of each shard of the batch that compute two blocks of `size` tokens together."""
    return passes.group_rows(rows, 2 * size, _TWO_BLOCKS_TOKENS)


Found = tuple[jax.Array, KVCache]
"""Hidden states [X, M, D] at the wanted positions, valid in the rows whose pass was made, and the KV cache."""


class _BlockPasses(NamedTuple):
    """The passes of one step. A method gets the results of earlier passes, and returns them with those of its rows.

    The attributes are the arguments of `block_cached`. `wanted_XM` is its `source_XM` with one more column, the
    position before the block.
    """

    model: Dream
    canvas_XT: jax.Array
    layout: CanvasLayout
    wanted_XM: jax.Array
    block: Block
    size: int

    def first(self, first_X: jax.Array, width: int, found: Found) -> tuple[Found, jax.Array]:
        """Computes the first `width` tokens of the rows marked in `first_X`; also returns the number of passes."""
        assert self.layout.first_mask is not None, "a layout for BlockCache has this mask"
        tokens_XT, positions_XT = self.canvas_XT[:, :width], self.layout.positions_BT[:, :width]
        of_rows = (tokens_XT, self.layout.first_mask, positions_XT, jnp.minimum(self.wanted_XM, width - 1))

        def group_pass(group: RowGroup, found: Found) -> Found:
            hidden_XMD, kv_cache = found
            tokens_RT, mask, positions_RT, wanted_RM = jax.tree.map(group.pick, of_rows)
            hidden_RTD, new_kv = self.model.hidden_and_kv_cache(tokens_RT, mask, positions_RT)
            kv_cache = jax.tree.map(group.put_layers, kv_cache, new_kv)
            return group.put(hidden_XMD, take(hidden_RTD, wanted_RM)), kv_cache

        size = passes.group_rows(tokens_XT.shape[0], width, passes.REFRESH_TOKENS)
        return passes.in_groups(first_X, width, size, group_pass, found)

    def two(self, two_X: jax.Array, one_X: jax.Array, found: Found) -> Found:
        """Computes two blocks of the rows marked in `two_X`, and one of those marked in `one_X`, in one pass."""
        hidden_XMD, kv_cache = found
        start_X = jnp.where(two_X, self.block.start_B - self.size, self.block.start_B)
        position_XW, new_XW = self._window(self.block.start_B - self.size, start_X, 2 * self.size, two_X | one_X)
        found_XWD, kv_cache = self._pass(position_XW, new_XW, kv_cache)
        found_XMD = take(found_XWD, self._index(position_XW))
        return jnp.where((two_X | one_X)[:, None, None], found_XMD, hidden_XMD), kv_cache

    def two_in_groups(self, two_X: jax.Array, size: int, found: Found) -> tuple[Found, jax.Array]:
        """Computes two blocks of the rows marked in `two_X`, in groups of `size` rows of each shard.

        It also returns the number of passes, an int32 scalar.
        """
        length, start_X = self.canvas_XT.shape[1], self.block.start_B - self.size
        position_XW, new_XW = self._window(start_X, start_X, 2 * self.size, two_X)
        of_rows = (
            take(self.canvas_XT, position_XW),
            self.layout.mask,
            position_XW,
            take(self.layout.positions_BT, position_XW),
            jnp.where(new_XW, position_XW, length),
            self._index(position_XW),
        )

        def group_pass(group: RowGroup, found: Found) -> Found:
            hidden_XMD, kv_cache = found
            tokens_RW, mask, index_RW, positions_RW, put_RW, wanted_RM = jax.tree.map(group.pick, of_rows)
            rows = jax.tree.map(group.pick_layers, kv_cache)
            hidden_RWD, rows = self.model.hidden_window(
                tokens_RW, mask.at(index_RW), positions_RW, Window(rows, put_RW)
            )
            pick = jax.vmap(lambda layer: take(layer, jnp.minimum(put_RW, length - 1)))  # vmap over layers
            put = lambda old, new: group.put_positions(old, pick(new), put_RW)
            return group.put(hidden_XMD, take(hidden_RWD, wanted_RM)), jax.tree.map(put, kv_cache, rows)

        return passes.in_groups(two_X, 2 * self.size, size, group_pass, found)

    def one(self, one_X: jax.Array, kv_cache: KVCache, hidden_XMD: jax.Array) -> jax.Array:
        """Computes the block of the rows marked in `one_X`; returns the hidden states. The KV cache stays as it is."""
        position_XW, new_XW = self._window(self.block.start_B, self.block.start_B, self.size, one_X)
        found_XWD, _ = self._pass(position_XW, new_XW, kv_cache)
        return jnp.where(one_X[:, None, None], take(found_XWD, self._index(position_XW)), hidden_XMD)

    def _window(
        self, first_X: jax.Array, start_X: jax.Array, width: int, rows_X: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of a window, int32 [X, W], and which of them are new, bool [X, W].

        The window has `width` positions from `first_X` on, but it is moved inwards at the ends of the canvas. A pass
        uses the keys and values that it computes at the new positions, and the cached ones elsewhere. New are the valid
        positions from `start_X` to the end of the block, in the rows marked in `rows_X`.
        """
        length = self.canvas_XT.shape[1]
        width = min(width, length)
        position_XW = jnp.clip(first_X, 0, length - width)[:, None] + jnp.arange(width, dtype=jnp.int32)
        new_XW = (position_XW >= start_X[:, None]) & (position_XW < self.block.end_B[:, None])
        return position_XW, new_XW & rows_X[:, None] & take(self.layout.valid_BT, position_XW)

    def _pass(self, position_XW: jax.Array, new_XW: jax.Array, kv_cache: KVCache) -> Found:
        """Computes the tokens of a window of every row; returns their hidden states and the updated KV cache."""
        return self.model.hidden_window(
            take(self.canvas_XT, position_XW),
            self.layout.mask.at(position_XW),
            take(self.layout.positions_BT, position_XW),
            Window(kv_cache, jnp.where(new_XW, position_XW, self.canvas_XT.shape[1])),
        )

    def _index(self, position_XW: jax.Array) -> jax.Array:
        """Returns the index of each wanted position in the window; 0 for a position before the window."""
        return jnp.clip(self.wanted_XM - position_XW[:, :1], 0, position_XW.shape[1] - 1)
