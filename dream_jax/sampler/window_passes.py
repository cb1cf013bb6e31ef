"""Forward passes with a KV cache that is an approximation: full passes refresh it, window passes read it.

The letters of axes are those of `passes`. X is the number of rows of the KV cache: B, or 2 B under guidance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks
from dream_jax.attention import KVCache, Window
from dream_jax.model import Dream
from dream_jax.sampler import passes
from dream_jax.sampler.config import KVCachePolicy
from dream_jax.sampler.passes import Block, CanvasLayout, RowGroup, take

# Number of tokens in one group of rows that make the first pass over a block together, if it is no full pass. On an
# accelerator, a pass over fewer tokens is not faster, because reading the weights takes as long.
RENEWAL_TOKENS = 256

# With a suffix window, a full pass computes the tokens that a row sees, which become more with each block. It has one of
# this many lengths, because a separate pass is compiled for each. The lengths are multiples of `_LENGTH_UNIT`.
_NUM_WIDTHS, _LENGTH_UNIT = 6, 16


class CachedRows(NamedTuple):
    """The rows of a step.

    Attributes:
      canvas_XT: the canvas of each row.
      layout: the layout of these rows.
      source_XM: the source positions.
      block: the block of each row.
      active_X: false at rows that are done.
      in_view_XT: with a suffix window, true at the tokens that a row sees (`tokens_in_view`); None without it.
    """

    canvas_XT: Int[jax.Array, "X T"]
    layout: CanvasLayout
    source_XM: Int[jax.Array, "X M"]
    block: Block
    active_X: Bool[jax.Array, "X"]
    in_view_XT: Bool[jax.Array, "X T"] | None


class RowCache(NamedTuple):
    """The KV cache and what belongs to it.

    Attributes:
      kv_cache: keys and values, [L, X, T, K, H].
      stored_XT: with a suffix window, true where the cache holds keys and values of the row, which its queries may attend
        to; None without it.
    """

    kv_cache: KVCache
    stored_XT: Bool[jax.Array, "X T"] | None


class CachedPasses(NamedTuple):
    """The results of the passes of a step.

    Attributes:
      hidden_XMD: the hidden states at the source positions; those of rows that are done have no meaning.
      cache: the cache after the passes.
      made_K: int32, the number of passes of each kind (`pass_counts.pass_kinds`) that were made.
      needed_XK: bool, the kind of the pass that each row needed; no kind in rows that are done.
    """

    hidden_XMD: Float[jax.Array, "X M D"]
    cache: RowCache
    made_K: Int[jax.Array, "K"]
    needed_XK: Bool[jax.Array, "X K"]


class WindowShape(NamedTuple):
    """The tokens that a window pass computes.

    Attributes:
      left, right: numbers of tokens before and after the block.
      width: number of tokens of a row, at most the length of the canvas.
    """

    left: int
    right: int
    width: int


def window(policy: KVCachePolicy, block_length: int, length: int) -> WindowShape:
    """Returns the shape of the window passes on a canvas of `length` tokens."""
    right = policy.right
    if right is None:
        right = length if policy.suffix is None else min(policy.suffix, length)
    return WindowShape(policy.left, right, min(policy.left + block_length + right, length))


def renewal_window(policy: KVCachePolicy, block_length: int, length: int) -> WindowShape | None:
    """Returns the shape of the first pass over a block, if it is no full pass; None if it is like the other passes."""
    if policy.renew_left is None:
        return None
    right = max(window(policy, block_length, length).right, min(policy.suffix or 0, length))
    return WindowShape(policy.renew_left, right, min(policy.renew_left + block_length + right, length))


def full_widths(policy: KVCachePolicy, block_length: int, length: int, new_tokens: int) -> tuple[int, ...]:
    """Returns the numbers of tokens that a full pass may compute of a row, in rising order; the last one is `length`.

    Without a suffix window there is only one. With it, the first is enough for a row whose first block is the first of
    the new tokens. All rows of a canvas have the same lengths to choose from, and a row takes the smallest sufficient one.

    Args:
      policy: the settings of the cache.
      block_length: number of tokens of a block.
      length: length of the canvas.
      new_tokens: number of positions at the end of the canvas that do not belong to the prompt; 0 if this differs from
        row to row.
    """
    if policy.suffix is None:
        return (length,)
    shortest = min(length, (length - new_tokens) % length + block_length + policy.suffix + 1)
    steps = [shortest + (length - shortest) * step // (_NUM_WIDTHS - 1) for step in range(_NUM_WIDTHS)]
    return tuple(sorted({min(-(-step // _LENGTH_UNIT) * _LENGTH_UNIT, length) for step in steps}))


def tokens_in_view(
    open_BT: Bool[jax.Array, "B T"], valid_BT: Bool[jax.Array, "B T"], block: Block, suffix: int
) -> Bool[jax.Array, "B T"]:
    """Marks the tokens that a row sees under a suffix window.

    These are the valid tokens that are no mask tokens or are before the end of the block, the first `suffix` mask tokens
    after the block, and the last valid token.

    Args:
      open_BT: true at mask tokens.
      valid_BT: false at padding.
      block: the block of each row.
      suffix: number of mask tokens.
    """
    position_T = jnp.arange(open_BT.shape[1], dtype=jnp.int32)
    after_BT = open_BT & valid_BT & (position_T >= block.end_B[:, None])
    near_BT = jnp.cumsum(after_BT, axis=1, dtype=jnp.int32) <= suffix
    last_B = jnp.max(jnp.where(valid_BT, position_T, 0), axis=1)
    return valid_BT & (~after_BT | near_BT | (position_T == last_B[:, None]))


def window_cached(
    model: Dream,
    rows: CachedRows,
    cache: RowCache,
    refresh_X: Bool[jax.Array, "X"],
    renew_X: Bool[jax.Array, "X"],
    *,
    policy: KVCachePolicy,
    block_length: int,
    new_tokens: int,
) -> CachedPasses:
    """Computes the hidden states at the source positions with a KV cache.

    Args:
      model: the model.
      rows: the rows.
      cache: the cache.
      refresh_X: the rows that make a full pass.
      renew_X: the other rows that make the first pass over a block, if this pass has a shape of its own.
      policy: the settings of the cache.
      block_length: number of tokens of a block.
      new_tokens: as in `full_widths`.

    Returns:
      The hidden states and the cache after the passes. The rows that are not done and not marked make a window pass.
    """
    length = rows.canvas_XT.shape[1]
    hidden_XMD = jnp.zeros((*rows.source_XM.shape, model.config.hidden_size), model.compute_dtype)
    made, needed = [], []
    if rows.in_view_XT is None:
        hidden_XMD, cache, count = _full_passes(model, rows, cache, refresh_X, hidden_XMD)
        made.append(count)
        needed.append(refresh_X)
    else:
        count_X, shorter = jnp.sum(rows.in_view_XT, axis=1, dtype=jnp.int32), -1
        for width in full_widths(policy, block_length, length, new_tokens):
            of_width_X = refresh_X & (count_X > shorter) & (count_X <= width)
            hidden_XMD, cache, count = _short_full_passes(model, rows, cache, of_width_X, hidden_XMD, width)
            made.append(count)
            needed.append(of_width_X)
            shorter = width
    renewal = renewal_window(policy, block_length, length)
    if renewal is not None:
        hidden_XMD, cache, count = _renewal_passes(model, rows, cache, renew_X, hidden_XMD, renewal)
        made.append(count)
        needed.append(renew_X)
    window_X = rows.active_X & ~refresh_X & ~renew_X

    def window_pass(cache: RowCache) -> tuple[jax.Array, RowCache]:
        found_XMD, cache = _window_pass(model, rows, cache, window_X, window(policy, block_length, length))
        return jnp.where(window_X[:, None, None], found_XMD, hidden_XMD), cache

    any_window = jnp.any(window_X)
    hidden_XMD, cache = jax.lax.cond(any_window, window_pass, lambda cache: (hidden_XMD, cache), cache)
    made.append(any_window.astype(jnp.int32))
    needed.append(window_X)
    return CachedPasses(hidden_XMD, cache, jnp.stack(made), jnp.stack(needed, axis=1))


class _Queries(NamedTuple):
    """The tokens of a window pass.

    Attributes:
      position_XW: int32, the position of each token in the canvas.
      put_XW: int32, the position whose keys and values the token replaces in the cache; T if it replaces none.
      wanted_XM: int32, the index of each source position in the window.
      stored_XT: `RowCache.stored_XT` after the pass.
    """

    position_XW: jax.Array
    put_XW: jax.Array
    wanted_XM: jax.Array
    stored_XT: jax.Array | None


def _queries(rows: CachedRows, stored_XT: jax.Array | None, rows_X: jax.Array, shape: WindowShape) -> _Queries:
    """Returns the tokens of a window pass. Only the rows marked in `rows_X` change the cache."""
    length, block = rows.canvas_XT.shape[1], rows.block
    # Near an end of the canvas the window is moved inwards. It then covers tokens beyond `left` and `right`, which must
    # not enter the cache: the result of a row would depend on its distance from the end, and so on its padding.
    first_X = block.start_B - shape.left
    window_start_X = jnp.clip(first_X, 0, length - shape.width)
    position_XW = window_start_X[:, None] + jnp.arange(shape.width, dtype=jnp.int32)
    cached_XW = (position_XW >= first_X[:, None]) & (position_XW < (block.end_B + shape.right)[:, None])
    cached_XW &= rows_X[:, None] & take(rows.layout.valid_BT, position_XW)
    if rows.in_view_XT is not None:
        cached_XW &= take(rows.in_view_XT, position_XW)
    put_XW = jnp.where(cached_XW, position_XW, length)
    if stored_XT is not None:
        stored_XT = stored_XT.at[jnp.arange(len(put_XW))[:, None], put_XW].set(True, mode="drop")
    # In a window that starts with the block (Fast-dLLM), the first token is predicted from its own hidden state.
    source_XM = jnp.maximum(rows.source_XM, first_X[:, None])
    wanted_XM = jnp.clip(source_XM - window_start_X[:, None], 0, shape.width - 1)
    return _Queries(position_XW, put_XW, wanted_XM, stored_XT)


def _stored_only(mask: masks.Mask, stored_XT: jax.Array | None) -> masks.Mask:
    """Returns the mask that also hides the keys that the cache does not hold."""
    return mask if stored_XT is None else mask & masks.KeyPadding(stored_XT)


def _window_pass(
    model: Dream, rows: CachedRows, cache: RowCache, window_X: jax.Array, shape: WindowShape
) -> tuple[jax.Array, RowCache]:
    """Makes a window pass over all rows; only rows marked in `window_X` change the cache.

    Returns the hidden states at the source positions, and the cache.
    """
    position_XW, put_XW, wanted_XM, stored_XT = _queries(rows, cache.stored_XT, window_X, shape)
    hidden_XWD, kv_cache = model.hidden_window(
        take(rows.canvas_XT, position_XW),
        _stored_only(rows.layout.mask.at(position_XW), stored_XT),
        take(rows.layout.positions_BT, position_XW),
        Window(cache.kv_cache, put_XW),
    )
    return take(hidden_XWD, wanted_XM), RowCache(kv_cache, stored_XT)


Found = tuple[jax.Array, RowCache, jax.Array]
"""Hidden states at the source positions [X, M, D], the cache, and the number of passes made (an int32 scalar)."""


def _renewal_passes(
    model: Dream, rows: CachedRows, cache: RowCache, renew_X: jax.Array, hidden_XMD: jax.Array, shape: WindowShape
) -> Found:
    """Makes window passes over the rows marked in `renew_X`, one group of rows after the other."""
    length = rows.canvas_XT.shape[1]
    position_XW, put_XW, wanted_XM, stored_XT = _queries(rows, cache.stored_XT, renew_X, shape)
    of_rows = (
        take(rows.canvas_XT, position_XW),
        rows.layout.mask,
        stored_XT,
        position_XW,
        take(rows.layout.positions_BT, position_XW),
        put_XW,
        wanted_XM,
    )

    def group_pass(group: RowGroup, found: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        hidden_XMD, kv_cache = found
        tokens_RW, mask, stored_RT, index_RW, positions_RW, put_RW, wanted_RM = jax.tree.map(group.pick, of_rows)
        of_group = jax.tree.map(group.pick_layers, kv_cache)
        hidden_RWD, of_group = model.hidden_window(
            tokens_RW, _stored_only(mask.at(index_RW), stored_RT), positions_RW, Window(of_group, put_RW)
        )
        pick = jax.vmap(lambda layer: take(layer, jnp.minimum(put_RW, length - 1)))  # vmap over layers
        put = lambda old, new: group.put_positions(old, pick(new), put_RW)
        return group.put(hidden_XMD, take(hidden_RWD, wanted_RM)), jax.tree.map(put, kv_cache, of_group)

    size = passes.group_rows(rows.canvas_XT.shape[0], shape.width, RENEWAL_TOKENS)
    (hidden_XMD, kv_cache), made = passes.in_groups(
        renew_X, shape.width, size, group_pass, (hidden_XMD, cache.kv_cache)
    )
    return hidden_XMD, RowCache(kv_cache, stored_XT), made


def _short_full_passes(
    model: Dream, rows: CachedRows, cache: RowCache, refresh_X: jax.Array, hidden_XMD: jax.Array, width: int
) -> Found:
    """Makes full passes over the tokens in view of the rows marked in `refresh_X`, at most `width` of each row.

    The tokens in view are moved together, so that a pass computes no other tokens and no padding on the left.
    """
    assert rows.in_view_XT is not None, "with a suffix window there is this array"
    length = rows.canvas_XT.shape[1]
    of_rows = (rows.canvas_XT, rows.layout.mask, rows.layout.positions_BT, rows.in_view_XT, rows.source_XM)

    def group_pass(group: RowGroup, found: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        hidden_XMD, kv_cache = found
        canvas_RT, mask, positions_RT, in_view_RT, source_RM = jax.tree.map(group.pick, of_rows)
        index_RW = jnp.argsort(~in_view_RT, axis=1, stable=True)[:, :width].astype(jnp.int32)
        count_R = jnp.sum(in_view_RT, axis=1, dtype=jnp.int32)
        short: masks.Mask = masks.KeyLengths(count_R)
        for conjunct in masks.conjuncts(mask):
            if not isinstance(conjunct, masks.KeyPadding):  # padding is not in view
                short &= conjunct.only(index_RW, length)
        hidden_RWD, new_kv = model.hidden_and_kv_cache(take(canvas_RT, index_RW), short, take(positions_RT, index_RW))
        put_RW = jnp.where(jnp.arange(width) < count_R[:, None], index_RW, length)
        put = lambda old, new: group.put_positions(old, new, put_RW)
        # The index of a source position among the tokens in view.
        wanted_RM = take(jnp.cumsum(in_view_RT, axis=1, dtype=jnp.int32), source_RM) - 1
        found_RMD = take(hidden_RWD, jnp.clip(wanted_RM, 0, width - 1))
        return group.put(hidden_XMD, found_RMD), jax.tree.map(put, kv_cache, new_kv)

    size = passes.group_rows(rows.canvas_XT.shape[0], width, passes.REFRESH_TOKENS)
    (hidden_XMD, kv_cache), made = passes.in_groups(refresh_X, width, size, group_pass, (hidden_XMD, cache.kv_cache))
    stored_XT = cache.stored_XT
    if stored_XT is not None:
        stored_XT = jnp.where(refresh_X[:, None], rows.in_view_XT, stored_XT)
    return hidden_XMD, RowCache(kv_cache, stored_XT), made


def _full_passes(model: Dream, rows: CachedRows, cache: RowCache, refresh_X: jax.Array, hidden_XMD: jax.Array) -> Found:
    """Makes full passes over the rows marked in `refresh_X`, one group of rows after the other."""
    canvas_XT, layout, source_XM = rows.canvas_XT, rows.layout, rows.source_XM

    def group_pass(group: RowGroup, found: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        hidden_XMD, kv_cache = found
        tokens_RT, mask, positions_RT = jax.tree.map(group.pick, (canvas_XT, layout.mask, layout.positions_BT))
        hidden_RTD, new_kv = model.hidden_and_kv_cache(tokens_RT, mask, positions_RT)
        return (
            group.put(hidden_XMD, take(hidden_RTD, group.pick(source_XM))),
            KVCache(group.put_layers(kv_cache.k, new_kv.k), group.put_layers(kv_cache.v, new_kv.v)),
        )

    length = canvas_XT.shape[1]
    size = passes.group_rows(canvas_XT.shape[0], length, passes.REFRESH_TOKENS)
    (hidden_XMD, kv_cache), made = passes.in_groups(refresh_X, length, size, group_pass, (hidden_XMD, cache.kv_cache))
    return hidden_XMD, RowCache(kv_cache, cache.stored_XT), made
