"""Forward passes with a KV cache that is an approximation: full passes refresh it, window passes read it.

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
from dream_jax.sampler.config import KVCachePolicy
from dream_jax.sampler.passes import Block, CanvasLayout, RowGroup, take


class CachedRows(NamedTuple):
    """The rows of a step.

    Attributes:
      canvas_XT: the canvas of each row.
      layout: the layout of these rows.
      source_XM: the source positions.
      block: the block of each row.
    """

    canvas_XT: Int[jax.Array, "X T"]
    layout: CanvasLayout
    source_XM: Int[jax.Array, "X M"]
    block: Block


class CachedPasses(NamedTuple):
    """The results of the passes of a step.

    Attributes:
      hidden_XMD: the hidden states at the source positions; those of rows that are done have no meaning.
      kv_cache: the KV cache after the passes.
      made_K: int32, the number of passes of each kind (`pass_counts.pass_kinds`) that were made.
      needed_XK: bool, the kind of the pass that each row needed; no kind in rows that are done.
    """

    hidden_XMD: Float[jax.Array, "X M D"]
    kv_cache: KVCache
    made_K: Int[jax.Array, "K"]
    needed_XK: Bool[jax.Array, "X K"]


def window_cached(
    model: Dream,
    rows: CachedRows,
    kv_cache: KVCache,
    refresh_X: Bool[jax.Array, "X"],
    *,
    policy: KVCachePolicy,
    block_length: int,
) -> CachedPasses:
    """Computes the hidden states at the source positions with a KV cache.

    The rows marked in `refresh_X` make a full pass; the other rows that are not done make a window pass.
    """
    hidden_XMD, kv_cache, full_passes = _full_passes(model, rows, kv_cache, refresh_X)
    window_X = ~refresh_X & (rows.block.start_B < rows.canvas_XT.shape[1])

    def window_pass(kv_cache: KVCache) -> tuple[jax.Array, KVCache]:
        found_XMD, kv_cache = _window_pass(model, rows, kv_cache, window_X, policy, block_length)
        return jnp.where(window_X[:, None, None], found_XMD, hidden_XMD), kv_cache

    any_window = jnp.any(window_X)
    hidden_XMD, kv_cache = jax.lax.cond(any_window, window_pass, lambda kv_cache: (hidden_XMD, kv_cache), kv_cache)
    made_K = jnp.stack([full_passes, any_window.astype(jnp.int32)])
    return CachedPasses(hidden_XMD, kv_cache, made_K, jnp.stack([refresh_X, window_X], axis=1))


def window_width(policy: KVCachePolicy, block_length: int, length: int) -> int:
    """Returns the number of tokens of a row that a window pass computes, on a canvas of `length` tokens."""
    right = length if policy.right is None else policy.right
    return min(policy.left + block_length + right, length)


def _window_pass(
    model: Dream,
    rows: CachedRows,
    kv_cache: KVCache,
    window_X: jax.Array,
    policy: KVCachePolicy,
    block_length: int,
) -> tuple[jax.Array, KVCache]:
    """Makes a window pass over all rows; only rows marked in `window_X` change the KV cache.

    Returns the hidden states at the source positions, and the KV cache.
    """
    canvas_XT, layout, source_XM, block = rows
    length = canvas_XT.shape[1]
    right = length if policy.right is None else policy.right
    width = window_width(policy, block_length, length)
    # Near an end of the canvas the window is moved inwards. It then covers tokens beyond `left` and `right`, which must
    # not enter the cache: the result of a row would depend on its distance from the end, and so on its padding.
    window_start_X = jnp.clip(block.start_B - policy.left, 0, length - width)
    position_XW = window_start_X[:, None] + jnp.arange(width, dtype=jnp.int32)
    cached_XW = (position_XW >= (block.start_B - policy.left)[:, None]) & (position_XW < (block.end_B + right)[:, None])
    cached_XW &= window_X[:, None] & take(layout.valid_BT, position_XW)
    hidden_XWD, kv_cache = model.hidden_window(
        take(canvas_XT, position_XW),
        layout.mask.at(position_XW),
        take(layout.positions_BT, position_XW),
        Window(kv_cache, jnp.where(cached_XW, position_XW, length)),
    )
    # In a window that starts with the block (Fast-dLLM), the first token is predicted from its own hidden state.
    source_XM = jnp.maximum(source_XM, (block.start_B - policy.left)[:, None])
    return take(hidden_XWD, jnp.clip(source_XM - window_start_X[:, None], 0, width - 1)), kv_cache


def _full_passes(
    model: Dream, rows: CachedRows, kv_cache: KVCache, refresh_X: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Makes full passes over the rows marked in `refresh_X`, one group of rows after the other.

    Returns the hidden states at the source positions, the KV cache, and the number of passes (an int32 scalar).
    """
    canvas_XT, layout, source_XM, _ = rows
    hidden_XMD = jnp.zeros((*source_XM.shape, model.config.hidden_size), model.compute_dtype)

    def group_pass(group: RowGroup, found: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        hidden_XMD, kv_cache = found
        tokens_RT, mask, positions_RT = jax.tree.map(group.pick, (canvas_XT, layout.mask, layout.positions_BT))
        hidden_RTD, new_kv = model.hidden_and_kv_cache(tokens_RT, mask, positions_RT)
        return (
            group.put(hidden_XMD, take(hidden_RTD, group.pick(source_XM))),
            KVCache(group.put_layers(kv_cache.k, new_kv.k), group.put_layers(kv_cache.v, new_kv.v)),
        )

    size = passes.group_rows(canvas_XT.shape[0], canvas_XT.shape[1], passes.REFRESH_TOKENS)
    (hidden_XMD, kv_cache), made = passes.in_groups(
        refresh_X, canvas_XT.shape[1], size, group_pass, (hidden_XMD, kv_cache)
    )
    return hidden_XMD, kv_cache, made
