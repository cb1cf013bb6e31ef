"""A canvas that grows with its texts, for `BlockCache`, instead of one with room for all new tokens from the beginning.

No block sees a later one, so the canvas need not hold the blocks after the present one yet. The canvas and the KV cache
begin with room for some new tokens. When a text has filled the room and goes on, the room is doubled. `max_new_tokens`
is then only a bound: positions far after the end of all texts take no memory and no time. There is one compiled program
for each length.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dream_jax import sharding
from dream_jax.model import Dream
from dream_jax.sampler.config import BlockCache, SamplerConfig
from dream_jax.sampler.loop import StreamBatch, ended, replicated
from dream_jax.sampler.state import State, StaticSettings, active

FIRST_EXTENT = 256
"""Number of new tokens for which a canvas that grows has room at first; a few more if it is no multiple of a block."""


def extents(config: SamplerConfig, *, only_new: bool, has_listener: bool = False) -> tuple[int, ...]:
    """Returns the numbers of new tokens for which the canvas has room, in ascending order.

    The last one is `max_new_tokens`. It is the only one if the canvas cannot grow: without `BlockCache`, without
    blocks, if the prompts have masks, and with hooks or a listener, which see the whole canvas.

    Args:
      config: the settings of the sampler.
      only_new: whether all masks are after the prompts.
      has_listener: whether a listener sees the canvas after each step.
    """
    most, block = config.max_new_tokens, config.block_length
    has_hooks = config.token_hook is not None or config.logits_hook is not None
    if not isinstance(config.cache, BlockCache) or block is None or not only_new or has_hooks or has_listener:
        return (most,)
    # Forced tokens are part of the text from the beginning: an end-of-text token before them does not end it.
    extent, found = max(FIRST_EXTENT, *(at + 1 for at, _ in config.forced_tokens), 1), []
    extent = -(-extent // block) * block
    while extent < most:
        found.append(extent)
        extent *= 2
    return (*found, most)


def first_width(config: SamplerConfig, width: int, *, only_new: bool) -> int | None:
    """Returns `StaticSettings.first_width`, the number of tokens of the first pass over a row.

    It is None if this pass computes the whole canvas, and without `BlockCache`.

    Args:
      config: the settings of the sampler.
      width: number of tokens before the new ones: the prompts with their padding.
      only_new: whether all masks are after the prompts.
    """
    if not isinstance(config.cache, BlockCache) or config.block_length is None:
        return None
    # If a block is skipped, or a token hook changes a cached token, the row makes a first pass again. It reaches up to
    # the present block, which may be anywhere in the canvas.
    if not only_new or config.forced_tokens or config.token_hook is not None:
        return None
    return width + min(config.block_length, config.max_new_tokens)


@functools.partial(jax.jit, static_argnames=("static",))
def wants_more(model: Dream, batch: StreamBatch, *, static: StaticSettings) -> Bool[jax.Array, "B"]:
    """Marks the rows that have filled the canvas and whose text has not ended; bool [B], the same on all devices."""
    return sharding.constrain(_wants_more(model, batch, static), None)


def _wants_more(model: Dream, batch: StreamBatch, static: StaticSettings) -> jax.Array:
    has_ended_B = (
        ended(model, batch.state, batch.valid_BT) if static.stop_at_end else jnp.zeros_like(active(batch.state))
    )
    return ~active(batch.state) & ~has_ended_B


@functools.partial(jax.jit, static_argnames=("columns", "static"))
def grow(
    model: Dream,
    batch: StreamBatch,
    occupied_B: Bool[jax.Array, "B"],
    columns_B: Int[jax.Array, "B"] | None = None,
    *,
    columns: int,
    static: StaticSettings,
) -> StreamBatch:
    """Returns the batch with `columns` more positions at the end of its canvas.

    In rows whose text goes on, the new positions are masks. In rows whose text has ended, and in rows without a text
    (false in `occupied_B`), they are end-of-text tokens. With `columns_B`, int32 [B], the text of a row gets only so many
    of the new positions; the others are hidden, as padding. It must be 0 or a multiple of a block, except for a row that
    gets no more positions later.
    """
    state, rows = batch.state, batch.valid_BT.shape[0]
    wants_B = _wants_more(model, batch, static)
    goes_on_B = occupied_B & (active(state) | (wants_B if columns_B is None else wants_B & (columns_B > 0)))
    is_of_text_BC = jnp.arange(columns) < (columns if columns_B is None else columns_B[:, None])
    is_mask_BC = goes_on_B[:, None] & jnp.broadcast_to(is_of_text_BC, (rows, columns))
    canvas_BC = jnp.where(is_mask_BC, model.config.mask_token_id, model.config.pad_token_id)
    commit_step_BC = jnp.where(is_mask_BC, -1, state.passes_B[:, None] - 1)
    recorded = jax.tree.map(lambda noted: _padded(noted, columns), state.recorded)
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, columns), (0, 0), (0, 0))), state.kv_cache)
    length = batch.valid_BT.shape[1]
    state = state._replace(
        canvas_BT=jnp.concatenate([state.canvas_BT, canvas_BC], axis=1),
        commit_step_BT=jnp.concatenate([state.commit_step_BT, commit_step_BC], axis=1),
        recorded=recorded,
        kv_cache=cache,
        # A row that has filled the canvas goes on with the first new position.
        block_start_B=jnp.where(goes_on_B, state.block_start_B, length + columns),
    )
    valid_BT = jnp.concatenate([batch.valid_BT, is_mask_BC | ~goes_on_B[:, None]], axis=1)
    return batch._replace(state=state, valid_BT=valid_BT)


@jax.jit
def finished(batch: StreamBatch) -> State:
    """Returns the state of a batch as `loop.denoise` returns it: without the KV cache, replicated over the devices."""
    return replicated(batch.state)


def filled_up(state: State, columns: int, end: int) -> State:
    """Returns the state with `columns` more positions at the end of each row, which hold the end-of-text token `end`.

    The texts of all rows must have ended.
    """
    if not columns:
        return state
    rows = np.asarray(state.canvas_BT).shape[0]
    last = np.asarray(state.passes_B)[:, None] - 1
    wide = lambda x, new: jnp.asarray(np.concatenate([np.asarray(x), new], axis=1))
    return state._replace(
        canvas_BT=wide(state.canvas_BT, np.full((rows, columns), end, np.int32)),
        commit_step_BT=wide(state.commit_step_BT, np.broadcast_to(last, (rows, columns))),
        recorded=jax.tree.map(lambda noted: _padded(jnp.asarray(noted), columns), state.recorded),
    )


def _padded(noted_BT: jax.Array, columns: int) -> jax.Array:
    """Returns an array [B, T, ...] of `Recorded` with more columns at the end of T: NaN, or 0 in arrays of integers."""
    nothing = jnp.nan if jnp.issubdtype(noted_BT.dtype, jnp.floating) else 0
    widths = ((0, 0), (0, columns), *[(0, 0)] * (noted_BT.ndim - 2))
    return jnp.pad(noted_BT, widths, constant_values=nothing)
