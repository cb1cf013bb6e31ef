"""Forward passes: the hidden states from which a few positions of each row are predicted, by the least work a cache asks.

Knows the model, places, and what was kept. Knows nothing of confidences, rules or the clock.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks, sharding
from dream_jax.attention import KVCache, Window
from dream_jax.model import Dream
from dream_jax.sampler.caches import KVCachePolicy

# Tokens that a full pass takes where so many wait: enough to keep an accelerator's matrix units busy, few enough that
# rows which need no full pass do not pay for one.
_REFRESH_TOKENS = 512


class Text(NamedTuple):
    """What does not change about a canvas: which places are no padding, their rotary positions, and who sees whom.

    All arrays of the mask have an axis of rows first.
    """

    valid_BT: Bool[jax.Array, "B T"]
    positions_BT: Int[jax.Array, "B T"]
    mask: masks.Mask


class Block(NamedTuple):
    """The block that each row writes: places start <= t < end; start is T in a row that is done."""

    start_B: Int[jax.Array, "B"]
    end_B: Int[jax.Array, "B"]


def full(
    model: Dream, canvas_BT: Int[jax.Array, "B T"], text: Text, source_BM: Int[jax.Array, "B M"]
) -> Float[jax.Array, "B M D"]:
    """The hidden states at the given places, everything computed."""
    hidden_BTD = model.hidden(canvas_BT, text.mask, text.positions_BT)
    return _at(hidden_BTD, source_BM)


def empty_kv_cache(model: Dream, rows: int, length: int) -> KVCache:
    """Room for the keys and values of a canvas."""
    config = model.config
    shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
    zeros = sharding.constrain(jnp.zeros(shape, model.compute_dtype), None, "batch", None, "kv_heads", None)
    return KVCache(zeros, zeros)


def cached(
    model: Dream,
    canvas_BT: Int[jax.Array, "B T"],
    text: Text,
    source_BM: Int[jax.Array, "B M"],
    kv_cache: KVCache,
    refresh_B: Bool[jax.Array, "B"],
    block: Block,
    *,
    settings: KVCachePolicy,
    block_length: int,
) -> tuple[Float[jax.Array, "B M D"], KVCache, Int[jax.Array, ""]]:
    """The hidden states at the given places, by a full pass for the rows that want one and a window for the others.

    Returns:
      Hidden states; the keys and values as these passes leave them; the number of passes made.
    """
    rows_BMD, kv_cache, passes = _refresh(model, canvas_BT, text, source_BM, kv_cache, refresh_B)
    length = canvas_BT.shape[1]
    window_B = ~refresh_B & (block.start_B < length)

    def look(kv_cache: KVCache) -> tuple[jax.Array, KVCache]:
        found_BMD, kv_cache = _window(
            model, canvas_BT, text, source_BM, kv_cache, window_B, block, settings, block_length
        )
        return jnp.where(window_B[:, None, None], found_BMD, rows_BMD), kv_cache

    any_window = jnp.any(window_B)
    rows_BMD, kv_cache = jax.lax.cond(any_window, look, lambda kv_cache: (rows_BMD, kv_cache), kv_cache)
    return rows_BMD, kv_cache, passes + any_window.astype(jnp.int32)


def _window(
    model: Dream,
    canvas_BT: jax.Array,
    text: Text,
    source_BM: jax.Array,
    kv_cache: KVCache,
    window_B: jax.Array,
    block: Block,
    settings: KVCachePolicy,
    block_length: int,
) -> tuple[jax.Array, KVCache]:
    length = canvas_BT.shape[1]
    right = length if settings.right is None else settings.right
    width = min(settings.left + block_length + right, length)
    # At the ends of the canvas the window is moved inwards. What it then covers beyond its bounds is computed for
    # nothing, and must not be kept: a row's result would depend on how far it is from the end, hence on its padding.
    begin_B = jnp.clip(block.start_B - settings.left, 0, length - width)
    position_BW = begin_B[:, None] + jnp.arange(width, dtype=jnp.int32)
    used_BW = (position_BW >= (block.start_B - settings.left)[:, None]) & (position_BW < (block.end_B + right)[:, None])
    used_BW &= window_B[:, None] & _at(text.valid_BT, position_BW)
    hidden_BWD, kv_cache = model.hidden_window(
        _at(canvas_BT, position_BW),
        text.mask.at(position_BW),
        _at(text.positions_BT, position_BW),
        Window(kv_cache, jnp.where(used_BW, position_BW, length)),
    )
    # A window that starts with the block has nothing that its first token could be predicted from, but itself.
    source_BM = jnp.maximum(source_BM, (block.start_B - settings.left)[:, None])
    return _at(hidden_BWD, jnp.clip(source_BM - begin_B[:, None], 0, width - 1)), kv_cache


def _refresh(
    model: Dream,
    canvas_BT: jax.Array,
    text: Text,
    source_BM: jax.Array,
    kv_cache: KVCache,
    refresh_B: jax.Array,
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Full passes over the rows that want one, a group at a time."""
    batch, length = canvas_BT.shape
    # A group takes rows from every device's share of the batch.
    shards, _ = sharding.token_shards(batch, length)
    share = batch // shards
    size = min(share, max(1, -(-_REFRESH_TOKENS // (shards * length))))
    rows_BMD = jnp.zeros((*source_BM.shape, model.config.hidden_size), model.compute_dtype)

    def split(x: jax.Array, share: int = share) -> jax.Array:
        return x.reshape(shards, share, *x.shape[1:])

    def joined(x: jax.Array) -> jax.Array:
        return sharding.constrain(x.reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))

    def group(
        state: tuple[jax.Array, jax.Array, KVCache, jax.Array],
    ) -> tuple[jax.Array, jax.Array, KVCache, jax.Array]:
        waiting_B, rows_BMD, kv_cache, passes = state
        # Rows that wait first; of the others, those that fill up the group keep what they have.
        index_GR = jnp.argsort(~split(waiting_B), axis=1, stable=True)[:, :size].astype(jnp.int32)
        taken_GR = _at(split(waiting_B), index_GR)
        target_GR = jnp.where(taken_GR, index_GR, share)
        pick = lambda x: joined(_at(split(x), index_GR))
        hidden_RTD, own = model.hidden_and_kv_cache(
            pick(canvas_BT), jax.tree.map(pick, text.mask), pick(text.positions_BT)
        )
        put = jax.vmap(lambda x, new, target: x.at[target].set(new, mode="drop"))
        rows_BMD = joined(put(split(rows_BMD), split(_at(hidden_RTD, pick(source_BM)), size), target_GR))
        put_layers = jax.vmap(lambda x, new: joined(put(split(x), split(new, size), target_GR)))
        kv_cache = KVCache(put_layers(kv_cache.k, own.k), put_layers(kv_cache.v, own.v))
        waiting_B = joined(put(split(waiting_B), jnp.zeros_like(taken_GR), target_GR))
        return waiting_B, rows_BMD, kv_cache, passes + 1

    waiting = (refresh_B, rows_BMD, kv_cache, jnp.int32(0))
    if size == share:
        # One group is all rows. A loop would see the same ones each time it runs, and XLA computes such a body before the
        # loop: a full pass in every step, wanted or not.
        _, rows_BMD, kv_cache, passes = jax.lax.cond(jnp.any(refresh_B), group, lambda state: state, waiting)
    else:
        _, rows_BMD, kv_cache, passes = jax.lax.while_loop(lambda state: jnp.any(state[0]), group, waiting)
    return rows_BMD, kv_cache, passes


def _at(x: jax.Array, position_BM: jax.Array) -> jax.Array:
    """x[b, place[b, m], ...] of an array [B, T, ...]."""
    return jnp.take_along_axis(x, position_BM.reshape(*position_BM.shape, *[1] * (x.ndim - 2)), axis=1)
