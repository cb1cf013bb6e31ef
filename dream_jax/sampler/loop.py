"""The loop: a carry, a pure step, and the compiled driver that runs the step until every row is done.

Each row goes at its own pace: it has its own clock, its own block and its own keys, so that what it becomes does not
depend on the rows beside it. Steps that would write nothing are skipped, which changes no result: the canvas, and so
the next forward pass, would be the same.

Knows canvases, the clock and the model. Knows nothing of prompts, buckets or text.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks, schedule, sharding
from dream_jax.attention import KVCache
from dream_jax.model import Dream, padded_positions
from dream_jax.sampler import passes, propose, rules, watching
from dream_jax.sampler.caches import CachePolicy, KVCachePolicy
from dream_jax.sampler.hooks import Moment
from dream_jax.sampler.passes import Block, Text
from dream_jax.sampler.state import DynamicSettings, State, StaticSettings, active, begin, first


@functools.partial(jax.jit, static_argnames=("static",))
def denoise(
    model: Dream,
    canvas_BT: Int[jax.Array, "B T"],
    valid_BT: Bool[jax.Array, "B T"],
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    listener: Any,
    *,
    static: StaticSettings,
) -> State:
    """The driver: steps until every row is done. Returns the last state, without what was kept."""
    state = begin(model, sharding.constrain(canvas_BT, "batch", None), static)
    text = lay_text(model, valid_BT, static)
    state = _run(model, text, keys_B, dynamic, listener, state, static, jnp.int32(canvas_BT.shape[0]))
    # Whole on every device, so that every process of a run can read all of it.
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, *[None] * leaf.ndim), state._replace(kv_cache=None))


class Batch(NamedTuple):
    """Rows under way, for `resume`: what `denoise` has in its hands while it runs."""

    state: State
    valid_BT: Bool[jax.Array, "B T"]
    keys_B: jax.Array


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("batch",))
def resume(
    model: Dream,
    batch: Batch,
    new_B: Bool[jax.Array, "B"],
    canvas_BT: Int[jax.Array, "B T"],
    valid_BT: Bool[jax.Array, "B T"],
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    idle: Int[jax.Array, ""],
    *,
    static: StaticSettings,
) -> Batch:
    """The driver for rows that come and go: puts new rows in their places, then steps until `idle` rows are done."""

    def put(now: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
        shape = [1] * now.ndim
        shape[axis] = -1
        return jnp.where(new_B.reshape(shape), new, now)

    fresh = begin(model, canvas_BT, static)
    state = batch.state
    state = State(
        # What was kept of the row before is no row's: a new row begins with a full pass.
        **{
            name: put(getattr(state, name), getattr(fresh, name))
            for name in State._fields
            if name not in ("kv_cache", "forwards")
        },
        kv_cache=state.kv_cache,
        forwards=state.forwards,
    )
    valid_BT, keys_B = put(batch.valid_BT, valid_BT), put(batch.keys_B, keys_B)
    text = lay_text(model, valid_BT, static)
    return Batch(_run(model, text, keys_B, dynamic, None, state, static, idle), valid_BT, keys_B)


def idle_batch(model: Dream, rows: int, length: int, static: StaticSettings) -> Batch:
    """A batch in which nothing is under way yet."""
    nothing_BT = jnp.full((rows, length), model.config.pad_token_id, jnp.int32)
    state = begin(model, sharding.constrain(nothing_BT, "batch", None), static)
    keys_B = jnp.broadcast_to(jax.random.key(0), (rows,))
    return Batch(state, jnp.ones((rows, length), bool), keys_B)


def lay_text(model: Dream, valid_BT: Bool[jax.Array, "B T"], static: StaticSettings) -> Text:
    """What does not change about a canvas, under the mask of the settings, by default the model's own."""
    mask = masks.parse(model.trained_mask) if static.mask is None else static.mask
    length = valid_BT.shape[1]
    answer_BT = jnp.broadcast_to(jnp.arange(length) >= length - static.new_tokens, valid_BT.shape)
    mask = mask.for_rows(valid_BT, answer_BT) & masks.KeyPadding(valid_BT)
    return Text(valid_BT, padded_positions(valid_BT), mask)


def _run(
    model: Dream,
    text: Text,
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    listener: Any,
    state: State,
    static: StaticSettings,
    idle: Int[jax.Array, ""],
) -> State:
    """Steps until so many rows are done."""
    go_on = lambda state: jnp.sum(~active(state), dtype=jnp.int32) < idle
    return jax.lax.while_loop(
        go_on, functools.partial(step, model, text, keys_B, dynamic, listener, static=static), state
    )


def step(
    model: Dream,
    text: Text,
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    listener: Any,
    state: State,
    *,
    static: StaticSettings,
) -> State:
    """Each row that is not done takes its next step that may write something."""
    block, refresh_B = _block(state, static), _refresh(state, static.cache)
    position_BM, candidate_BM = _candidates(model, state, block, refresh_B, static)
    masked_B = jnp.sum(candidate_BM, axis=1, dtype=jnp.int32)
    schedule_step_B, count_B = _schedule_step(state, masked_B, refresh_B, dynamic, static)
    step_id_B = schedule_step_B if static.counts_schedule_steps else state.passes_B
    draws = functools.partial(_draws, keys_B, step_id_B, text.positions_BT, position_BM)
    by_chance = static.alg == "origin"
    chosen_BM = candidate_BM & (draws(0) < dynamic.fractions_S[schedule_step_B][:, None]) if by_chance else candidate_BM

    def write(state: State) -> State:
        # The right shift: position i is predicted by the hidden state at i - 1, a text's first position by its own,
        # never by the padding before it.
        first_BM = (_at(text.positions_BT, position_BM) == 0) | (position_BM == 0)
        source_BM = jnp.where(first_BM, position_BM, position_BM - 1)
        rows_BMD, kv_cache, used = _forward(model, state, text, source_BM, refresh_B, block, static)
        moment = Moment(step_id_B, state.canvas_BT, text.valid_BT, text.positions_BT)
        hook = static.logits_hook
        token_BM, confidence_BM = propose.propose(
            model,
            rows_BMD,
            jnp.max(masked_B),
            dynamic.filters,
            None if dynamic.filters.temperature is None else draws(1),
            alg=static.alg,
            top_k=static.top_k,
            writable=static.writable,
            hook=None if hook is None else lambda index_BC, logits: hook(moment, _at(position_BM, index_BC), logits),
        )
        written_BM = chosen_BM
        if not by_chance:
            score_BM = None
            if dynamic.alg_temp is not None:
                # Sampling without replacement from a softmax is taking the top n after adding Gumbel noise.
                noise_BM = -jnp.log(-jnp.log(draws(2) + 1e-20) + 1e-20)
                score_BM = confidence_BM / dynamic.alg_temp + noise_BM
            written_BM = rules.choose(
                static.rule, dynamic.rule, confidence_BM, candidate_BM, count_B, score_BM=score_BM
            )
        state = _write(state, position_BM, written_BM, token_BM, step_id_B)
        if static.stop_at_end:
            state = _end(model, state, step_id_B)
        if static.token_hook is not None:
            moment = Moment(step_id_B, state.canvas_BT, text.valid_BT, text.positions_BT)
            state = _hooked(model, state, static.token_hook(moment), step_id_B)
        if listener is not None:
            mesh = jax.sharding.get_abstract_mesh()
            number = jnp.max(jnp.where(active(state), step_id_B, 0))
            # The library orders callbacks on one device only; on several, a fast step may overtake a slow listener.
            jax.debug.callback(watching.notify, listener, number, state.canvas_BT, ordered=mesh.empty or mesh.size == 1)
        return state._replace(kv_cache=kv_cache, forwards=state.forwards + used)

    if by_chance:
        # At random, a step may choose nothing: then it costs nothing.
        passed_B = active(state) & jnp.any(chosen_BM)
        after = jax.lax.cond(jnp.any(chosen_BM), write, lambda state: state, state)
    else:
        passed_B = active(state)
        after = write(state)
    after = after._replace(
        passes_B=state.passes_B + passed_B.astype(jnp.int32),
        schedule_step_B=schedule_step_B + 1,
        block_passes_B=state.block_passes_B + 1,
        passes_since_full_B=jnp.where(refresh_B, 1, state.passes_since_full_B + 1),
        blocks_since_full_B=jnp.where(refresh_B, 0, state.blocks_since_full_B),
    )
    return _advance(model, after, block, static)


def _forward(
    model: Dream,
    state: State,
    text: Text,
    source_BM: Int[jax.Array, "B M"],
    refresh_B: Bool[jax.Array, "B"],
    block: Block,
    static: StaticSettings,
) -> tuple[Float[jax.Array, "X M D"], KVCache | None, Int[jax.Array, ""]]:
    """The hidden states at the given places, by the passes that the cache asks for; X is B, or 2 B under guidance."""
    canvas_BT = state.canvas_BT
    if static.guided:
        # Each row is followed by one of which nothing was given.
        text, source_BM, refresh_B, block, canvas_BT = jax.tree.map(
            lambda x: jnp.repeat(x, 2, axis=0), (text, source_BM, refresh_B, block, canvas_BT)
        )
        given_BT = text.valid_BT & (jnp.repeat(state.commit_step_BT, 2, axis=0) < 0)
        second_B1 = jnp.arange(canvas_BT.shape[0])[:, None] % 2 == 1
        canvas_BT = jnp.where(given_BT & second_B1, model.config.mask_token_id, canvas_BT)
    if state.kv_cache is None or not isinstance(static.cache, KVCachePolicy):
        return passes.full(model, canvas_BT, text, source_BM), None, jnp.int32(1)
    return passes.cached(
        model,
        canvas_BT,
        text,
        source_BM,
        state.kv_cache,
        refresh_B,
        block,
        settings=static.cache,
        block_length=static.block_length or 1,
    )


def _block(state: State, static: StaticSettings) -> Block:
    length = state.canvas_BT.shape[1]
    end_B = (
        jnp.full_like(state.block_start_B, length)
        if static.block_length is None
        else state.block_start_B + static.block_length
    )
    return Block(state.block_start_B, jnp.minimum(end_B, length))


def _refresh(state: State, cache: CachePolicy) -> Bool[jax.Array, "B"]:
    """Rows whose next pass is a full one."""
    if not isinstance(cache, KVCachePolicy):
        return jnp.zeros(state.block_start_B.shape, bool)
    wanted_B = state.passes_since_full_B < 0
    if cache.refresh_blocks is not None:
        wanted_B |= (state.block_passes_B == 0) & (state.blocks_since_full_B >= cache.refresh_blocks)
    if cache.refresh_passes is not None:
        wanted_B |= state.passes_since_full_B >= cache.refresh_passes
    return wanted_B & active(state)


def _candidates(
    model: Dream, state: State, block: Block, refresh_B: Bool[jax.Array, "B"], static: StaticSettings
) -> tuple[Int[jax.Array, "B M"], Bool[jax.Array, "B M"]]:
    """The masked places of each row's block, first to last, then others to fill the capacity; and which are which."""
    length = state.canvas_BT.shape[1]
    position_T = jnp.arange(length, dtype=jnp.int32)
    open_BT = state.canvas_BT == model.config.mask_token_id
    open_BT &= (position_T >= block.start_B[:, None]) & (position_T < block.end_B[:, None])
    if isinstance(static.cache, KVCachePolicy) and static.cache.forces_first:
        open_BT &= ~refresh_B[:, None] | (position_T == block.start_B[:, None])
    position_BM = jnp.argsort(~open_BT, axis=1, stable=True)[:, : static.capacity].astype(jnp.int32)
    return position_BM, _at(open_BT, position_BM)


def _schedule_step(
    state: State,
    masked_B: Int[jax.Array, "B"],
    refresh_B: Bool[jax.Array, "B"],
    dynamic: DynamicSettings,
    static: StaticSettings,
) -> tuple[Int[jax.Array, "B"], Int[jax.Array, "B"]]:
    """The step that each row takes, and how many positions the clock has it write."""
    if static.alg == "origin" or not static.follows_schedule:
        return state.schedule_step_B, masked_B
    counts_BS = schedule.write_counts(masked_B, dynamic.fractions_S)
    forced = isinstance(static.cache, KVCachePolicy) and static.cache.forces_first
    schedule_step_B = state.schedule_step_B
    if not forced:
        writes_BS = (counts_BS > 0) & (jnp.arange(static.steps) >= schedule_step_B[:, None])
        schedule_step_B = jnp.argmax(writes_BS, axis=1).astype(jnp.int32)
    count_B = jnp.take_along_axis(counts_BS, schedule_step_B[:, None], axis=1)[:, 0]
    return schedule_step_B, jnp.where(refresh_B, 1, count_B) if forced else count_B


def _write(
    state: State,
    position_BM: Int[jax.Array, "B M"],
    written_BM: Bool[jax.Array, "B M"],
    token_BM: Int[jax.Array, "B M"],
    step_id_B: Int[jax.Array, "B"],
) -> State:
    rows_B1 = jnp.arange(position_BM.shape[0])[:, None]
    now_BM = _at(state.canvas_BT, position_BM)
    canvas_BT = state.canvas_BT.at[rows_B1, position_BM].set(jnp.where(written_BM, token_BM, now_BM))
    # Counted as written even where the model chose the mask token itself: a later step then writes there again.
    step_id_BM = jnp.where(written_BM, step_id_B[:, None], -1)
    commit_step_BT = state.commit_step_BT.at[rows_B1, position_BM].max(step_id_BM)
    return state._replace(canvas_BT=sharding.constrain(canvas_BT, "batch", None), commit_step_BT=commit_step_BT)


def _end(model: Dream, state: State, step_id_B: Int[jax.Array, "B"]) -> State:
    """Fills rows whose first end-of-text token has no mask before it."""
    masked_BT = state.canvas_BT == model.config.mask_token_id
    end_BT = (state.canvas_BT == model.config.pad_token_id) & (state.commit_step_BT >= 0)
    filled_BT = masked_BT & (first(end_BT) < first(masked_BT))[:, None]
    return state._replace(
        canvas_BT=jnp.where(filled_BT, model.config.pad_token_id, state.canvas_BT),
        commit_step_BT=jnp.where(filled_BT, step_id_B[:, None], state.commit_step_BT),
    )


def _hooked(model: Dream, state: State, canvas_BT: Int[jax.Array, "B T"], step_id_B: Int[jax.Array, "B"]) -> State:
    """Takes over what a hook has made of the canvas, in the rows that are not done."""
    changed_BT = (canvas_BT != state.canvas_BT) & active(state)[:, None]
    step_id_BT = jnp.where(canvas_BT == model.config.mask_token_id, -1, step_id_B[:, None])
    return state._replace(
        canvas_BT=jnp.where(changed_BT, canvas_BT, state.canvas_BT),
        commit_step_BT=jnp.where(changed_BT, step_id_BT, state.commit_step_BT),
    )


def _advance(model: Dream, state: State, block: Block, static: StaticSettings) -> State:
    """Rows that have finished their block go on to the next: from the first mask after it."""
    length = state.canvas_BT.shape[1]
    position_T = jnp.arange(length, dtype=jnp.int32)
    masked_BT = state.canvas_BT == model.config.mask_token_id
    # Where the model chose the mask token itself, masks are left when the block's time is up; they stay.
    spent_B = (
        state.schedule_step_B >= static.steps
        if static.follows_schedule
        else state.block_passes_B >= (static.block_length or length)
    )
    left_B = jnp.any(masked_BT & (position_T >= block.start_B[:, None]) & (position_T < block.end_B[:, None]), axis=1)
    over_B = (spent_B | ~left_B) & active(state)
    next_B = first(masked_BT & (position_T >= block.end_B[:, None]))
    return state._replace(
        block_start_B=jnp.where(over_B, next_B, state.block_start_B),
        schedule_step_B=jnp.where(over_B, 0, state.schedule_step_B),
        block_passes_B=jnp.where(over_B, 0, state.block_passes_B),
        blocks_since_full_B=state.blocks_since_full_B + over_B.astype(jnp.int32),
    )


def _draws(
    keys_B: jax.Array,
    step_id_B: Int[jax.Array, "B"],
    positions_BT: Int[jax.Array, "B T"],
    position_BM: Int[jax.Array, "B M"],
    stream: int,
) -> Float[jax.Array, "B M"]:
    """A uniform number for each place, from (row key, step, stream, position in the text): padding moves none."""
    length = positions_BT.shape[1]

    def row(key: jax.Array, step_id: jax.Array, position_M: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, step_id), stream)
        return jax.random.uniform(key, (length,))[position_M]

    return jax.vmap(row)(keys_B, step_id_B, _at(positions_BT, position_BM))


def _at(x_BT: jax.Array, position_BM: Int[jax.Array, "B M"]) -> jax.Array:
    return jnp.take_along_axis(x_BT, position_BM, axis=1)
