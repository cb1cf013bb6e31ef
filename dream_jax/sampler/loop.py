"""The loop of the sampler: a pure step on a carry, and the compiled functions that run it until every row is done.

Each row has its own schedule step, block and random keys, so its result does not depend on the other rows of the batch.
Steps that would write nothing are skipped. This does not change the result, because such a step leaves the canvas, and
therefore the next forward pass, as it was.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks, schedule, sharding
from dream_jax.model import Dream, padded_positions
from dream_jax.sampler import block_passes, callbacks, passes, propose, rules, window_passes
from dream_jax.sampler.block_passes import FinishedBlocks
from dream_jax.sampler.callbacks import Moment
from dream_jax.sampler.compiled import ModelProgram
from dream_jax.sampler.config import BlockCache, CachePolicy, KVCachePolicy, check_cache, check_first_token
from dream_jax.sampler.passes import Block, CanvasLayout, take
from dream_jax.sampler.state import (
    NUM_TOP,
    DynamicSettings,
    Recorded,
    State,
    StaticSettings,
    active,
    begin,
    block_start,
    first,
)
from dream_jax.sampler.window_passes import CachedRows, RowCache
from dream_jax.shapes import Array


@functools.partial(ModelProgram, static_argnames=("static",))
def denoise(
    model: Dream,
    canvas_BT: Int[jax.Array, "B T"],
    valid_BT: Bool[jax.Array, "B T"],
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    listener_id: Any,
    *,
    static: StaticSettings,
) -> State:
    """Runs steps until every row is done.

    Args:
      model: any Dream.
      canvas_BT: token ids; the sampler writes a token at each mask token.
      valid_BT: false at padding.
      keys_B: the random key of each row.
      dynamic, static: the settings of the sampler.
      listener_id: the id that `callbacks.listening` yields; None without a listener.

    Returns:
      The last state, replicated on all devices, without its KV cache.
    """
    state = begin(model, sharding.constrain(canvas_BT, "batch", None), static)
    layout = canvas_layout(model, valid_BT, static, answer_start_B=state.answer_start_B)
    state = _run(model, layout, keys_B, dynamic, listener_id, state, static, jnp.int32(canvas_BT.shape[0]))
    return replicated(state)


def replicated(state: State) -> State:
    """Returns a state without its KV cache, replicated, so that every process of a run can read all of it."""
    state = state._replace(kv_cache=None, before_XD=None)
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, *[None] * leaf.ndim), state)


class StreamBatch(NamedTuple):
    """The rows that `resume` works on.

    Attributes:
      state: the carry of the loop.
      valid_BT: false at padding.
      keys_B: the random key of each row.
    """

    state: State
    valid_BT: Bool[jax.Array, "B T"]
    keys_B: jax.Array


# The fields of `State` that belong to the whole batch or are not replaced with the row.
_SHARED = ("kv_cache", "before_XD", "forwards", "made_K")


@functools.partial(ModelProgram, static_argnames=("static",), donate_argnames=("batch",))
def resume(
    model: Dream,
    batch: StreamBatch,
    new_B: Bool[jax.Array, "B"],
    canvas_BT: Int[jax.Array, "B T"],
    valid_BT: Bool[jax.Array, "B T"],
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    idle: Int[jax.Array, ""],
    most_steps: Int[jax.Array, ""] | None = None,
    *,
    static: StaticSettings,
) -> StreamBatch:
    """Replaces the rows marked in `new_B` by new ones, then runs steps until at least `idle` rows are done.

    The new rows are the marked rows of `canvas_BT`, `valid_BT` and `keys_B`; their other rows are ignored. `batch` is
    donated: it must not be used after the call. With `most_steps`, at most so many steps are run.
    """

    def replaced(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda old, new: jnp.where(new_B.reshape(-1, *[1] * (old.ndim - 1)), new, old), old, new)

    # The KV cache is not replaced: a new row begins with a full pass, which overwrites it. With `BlockCache` and with a
    # suffix window this pass does not compute all of the row, so the cache of the row is set to zero: a NaN that is left
    # there would make the row NaN, although the mask hides it.
    fresh = begin(model, canvas_BT, static, dynamic.new_tokens)
    shared: dict[str, Any] = {name: getattr(batch.state, name) for name in _SHARED}
    if isinstance(static.cache, BlockCache) or batch.state.stored_BT is not None:
        cache_rows = jnp.repeat(new_B, 2) if static.guided else new_B
        clear = lambda x: jnp.where(cache_rows[None, :, None, None, None], jnp.zeros_like(x), x)
        shared["kv_cache"] = jax.lax.cond(
            jnp.any(new_B), lambda cache: jax.tree.map(clear, cache), lambda cache: cache, batch.state.kv_cache
        )
    rows: dict[str, Any] = {
        name: replaced(getattr(batch.state, name), getattr(fresh, name)) for name in State._fields if name not in shared
    }
    state = State(**rows, **shared)
    valid_BT, keys_B = replaced(batch.valid_BT, valid_BT), replaced(batch.keys_B, keys_B)
    layout = canvas_layout(model, valid_BT, static, dynamic.new_tokens, state.answer_start_B)
    state = _run(model, layout, keys_B, dynamic, None, state, static, idle, most_steps)
    return StreamBatch(state, valid_BT, keys_B)


def num_programs() -> int:
    """Returns the number of programs of `denoise` and `resume` that this process has compiled."""
    return denoise._cache_size() + resume._cache_size()


def idle_batch(model: Dream, rows: int, length: int, static: StaticSettings) -> StreamBatch:
    """Returns a batch of `rows` rows of `length` padding tokens, in which every row is done."""
    padding_BT = jnp.full((rows, length), model.config.pad_token_id, jnp.int32)
    state = begin(model, sharding.constrain(padding_BT, "batch", None), static)
    keys_B = jnp.broadcast_to(jax.random.key(0), (rows,))
    return StreamBatch(state, jnp.ones((rows, length), bool), keys_B)


new_batch = functools.partial(jax.jit, static_argnames=("rows", "length", "static"))(idle_batch)
"""`idle_batch` as a compiled function."""


def canvas_layout(
    model: Dream,
    valid_BT: Bool[jax.Array, "B T"],
    static: StaticSettings,
    new_tokens_B: Int[Array, "B"] | None = None,
    answer_start_B: Int[jax.Array, "B"] | None = None,
) -> CanvasLayout:
    """Returns the layout of a canvas. Its mask is `static.mask` or else the model's trained mask, and hides padding.

    Args:
      model: gives the trained mask.
      valid_BT: false at padding.
      static: the settings of the sampler.
      new_tokens_B: number of positions at the end of each row that do not belong to the prompt; None if it is
        `static.new_tokens` in every row.
      answer_start_B: `State.answer_start_B`, where the blocks of block diffusion begin; None for the first new token.

    Raises:
      ValueError: blocks or cache do not fit to this mask, see `config.check_cache` and `config.check_first_token`.
    """
    unbound, length = static.mask_of(model), valid_BT.shape[1]
    check_cache(static.cache, unbound, static.block_length)
    check_first_token(static.first_token_first, unbound, static.block_length)
    new_tokens = static.new_tokens if new_tokens_B is None else new_tokens_B[:, None]
    start = length - new_tokens
    # Under other masks an answer begins with the new tokens: a prompt sees all of itself, also around its masks.
    if isinstance(unbound, masks.BlockDiffusion) and answer_start_B is not None:
        start = answer_start_B[:, None]
    answer_BT = jnp.broadcast_to(jnp.arange(length) >= start, valid_BT.shape)

    def bound(width: int) -> masks.Mask:
        valid_Bt = valid_BT[:, :width]
        return unbound.for_rows(valid_Bt, answer_BT[:, :width]) & masks.KeyPadding(valid_Bt)

    first_mask = bound(static.first_width or length) if isinstance(static.cache, BlockCache) else None
    return CanvasLayout(valid_BT, padded_positions(valid_BT), bound(length), first_mask)


def _run(
    model: Dream,
    layout: CanvasLayout,
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    listener_id: Any,
    state: State,
    static: StaticSettings,
    idle: Int[jax.Array, ""],
    most_steps: Int[jax.Array, ""] | None = None,
) -> State:
    """Runs steps until at least `idle` rows are done, or `most_steps` have been run (None: any number)."""
    unfinished = lambda state: jnp.sum(~active(state), dtype=jnp.int32) < idle
    take_step = functools.partial(step, model, layout, keys_B, dynamic, listener_id, static=static)
    if most_steps is None:
        return jax.lax.while_loop(unfinished, take_step, state)
    state, _ = jax.lax.while_loop(
        lambda counted: unfinished(counted[0]) & (counted[1] < most_steps),
        lambda counted: (take_step(counted[0]), counted[1] + 1),
        (state, jnp.int32(0)),
    )
    return state


def step(
    model: Dream,
    layout: CanvasLayout,
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    listener_id: Any,
    state: State,
    *,
    static: StaticSettings,
) -> State:
    """Returns the state after the next step that may write something, for every row that is not done."""
    block, refresh_B = _block(state, static), _refresh(state, static.cache)
    position_BM, candidate_BM = _candidates(model, state, block, refresh_B, static)
    candidates_B = jnp.sum(candidate_BM, axis=1, dtype=jnp.int32)
    schedule_step_B, scheduled_B = _schedule_step(state, candidates_B, refresh_B, dynamic, static)
    step_id_B = schedule_step_B if static.reports_schedule_steps else state.passes_B
    draws = functools.partial(_draws, keys_B, step_id_B, layout.positions_BT, position_BM)
    at_random = static.alg == "origin"
    chosen_BM = candidate_BM
    if at_random:
        now_B1 = jnp.minimum(schedule_step_B, static.steps - 1)[:, None]
        chosen_BM = candidate_BM & (draws(0) < jnp.take_along_axis(dynamic.fractions_BS, now_B1, axis=1))

    # A random step may choose no position of a row; then the row needs no forward pass.
    needs_B = active(state) & jnp.any(chosen_BM, axis=1) if at_random else active(state)

    def write(state: State) -> State:
        # Right shift: position i is predicted from the hidden state at i - 1. The first position of a text is predicted
        # from its own hidden state, never from the hidden state of the padding before it.
        first_BM = (take(layout.positions_BT, position_BM) == 0) | (position_BM == 0)
        source_BM = jnp.where(first_BM, position_BM, position_BM - 1)
        hidden_XMD, state = _forward(model, state, layout, source_BM, needs_B, refresh_B, block, static)
        predicted_B = state.predicted_B + jnp.where(needs_B, candidates_B, 0)
        state = state._replace(predicted_B=predicted_B)
        moment = Moment(step_id_B, state.canvas_BT, layout.valid_BT, layout.positions_BT)
        hook = static.logits_hook
        proposal = propose.propose(
            model,
            hidden_XMD,
            jnp.max(candidates_B),
            dynamic.filters,
            None if dynamic.filters.temperature is None else draws(1),
            alg=static.alg,
            top_k=static.top_k,
            writable=static.writable,
            hook=None if hook is None else lambda index_BC, logits: hook(moment, take(position_BM, index_BC), logits),
            num_top=NUM_TOP if static.record == "logprobs" else None,
        )
        confidence_BM = proposal.confidence_BM
        written_BM = chosen_BM
        if not at_random:
            score_BM = None
            if dynamic.alg_temp is not None:
                # Taking the highest scores after adding Gumbel noise samples from the softmax without replacement.
                noise_BM = -jnp.log(-jnp.log(draws(2) + 1e-20) + 1e-20)
                alg_temp = dynamic.alg_temp
                score_BM = confidence_BM / (alg_temp[:, None] if alg_temp.ndim else alg_temp) + noise_BM
            # The first token of a block is predicted from the token before it, so the block cannot change its prediction.
            starts_BM = (position_BM == block.start_B[:, None]) & ~first_BM
            value = dynamic.rule
            if value is not None and dynamic.fall is not None:
                size_B = jnp.maximum(block.end_B - block.start_B, 1).astype(jnp.float32)
                value = rules.fallen(value, dynamic.fall, candidates_B.astype(jnp.float32) / size_B)
            written_BM = rules.choose(
                static.rule,
                value,
                confidence_BM,
                candidate_BM,
                scheduled_B,
                score_BM=score_BM,
                ahead_BM=starts_BM if static.first_token_first else None,
            )
        # If a logit is NaN, or the largest is infinite, so is the sum of the probabilities, and the confidence is NaN.
        undefined_B = state.undefined_B | jnp.any(written_BM & jnp.isnan(confidence_BM), axis=1)
        state = _write(state, position_BM, written_BM, proposal.token_BM, step_id_B)._replace(undefined_B=undefined_B)
        if state.drift_B is not None:
            # The confidence of the order "entropy" is the negative entropy; the others are probabilities or their gaps.
            doubt_BM = (0.0 if static.alg == "entropy" else 1.0) - confidence_BM
            doubt_B = jnp.sum(jnp.where(written_BM, doubt_BM, 0.0), axis=1)
            # A full pass does not see yet what is written after it.
            state = state._replace(drift_B=jnp.where(refresh_B, 0.0, state.drift_B) + doubt_B)
        if state.recorded is not None:
            state = state._replace(recorded=_record(state.recorded, position_BM, written_BM, proposal))
        if static.stop_at_end:
            state = _fill_after_end(model, state, layout.valid_BT, step_id_B)
        if static.token_hook is not None:
            moment = Moment(step_id_B, state.canvas_BT, layout.valid_BT, layout.positions_BT)
            state = _apply_token_hook(model, state, static.token_hook(moment), step_id_B)
        if listener_id is not None:
            mesh = jax.sharding.get_abstract_mesh()
            latest_step = jnp.max(jnp.where(active(state), step_id_B, 0))
            # jax orders callbacks on one device only. On several devices a slow listener may see steps out of order.
            ordered = mesh.empty or mesh.size == 1
            jax.debug.callback(callbacks.notify, listener_id, latest_step, state.canvas_BT, ordered=ordered)
        return state

    if at_random:
        # A random step may choose no position; then no forward pass is made.
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
    return _advance(model, after, block, dynamic, static)


def _forward(
    model: Dream,
    state: State,
    layout: CanvasLayout,
    source_BM: Int[jax.Array, "B M"],
    needs_B: Bool[jax.Array, "B"],
    refresh_B: Bool[jax.Array, "B"],
    block: Block,
    static: StaticSettings,
) -> tuple[Float[jax.Array, "X M D"], State]:
    """Makes the forward passes that the cache policy asks for. `needs_B` marks the rows that write something.

    Returns:
      The hidden states at the source positions (X is B, or 2 B under guidance), and the state with the updated cache and
      counts of forward passes.
    """
    canvas_BT, active_B, cached_B, stored_BT = state.canvas_BT, active(state), state.cached_B, state.stored_BT
    renew_B, in_view_BT = _renew(state, refresh_B, static.cache), None
    if isinstance(static.cache, KVCachePolicy) and static.cache.suffix is not None:
        open_BT = canvas_BT == model.config.mask_token_id
        in_view_BT = window_passes.tokens_in_view(open_BT, layout.valid_BT, block, static.cache.suffix)
    if static.guided:
        # Each row is followed by its unconditional copy, in which every given token is masked. It sees the same tokens.
        layout, source_BM, refresh_B, renew_B, block, canvas_BT, active_B, cached_B, stored_BT, in_view_BT = jax.tree.map(
            lambda x: jnp.repeat(x, 2, axis=0),
            (
                layout, source_BM, refresh_B, renew_B, block, canvas_BT, active_B, cached_B, stored_BT, in_view_BT
            ),
        )  # fmt: skip
        given_BT = layout.valid_BT & (jnp.repeat(state.commit_step_BT, 2, axis=0) < 0)
        unconditional_B1 = jnp.arange(canvas_BT.shape[0])[:, None] % 2 == 1
        canvas_BT = jnp.where(given_BT & unconditional_B1, model.config.mask_token_id, canvas_BT)

    def counted(state: State, made_K: jax.Array, needed_BK: jax.Array) -> State:
        return state._replace(
            forwards=state.forwards + jnp.sum(made_K, dtype=jnp.int32),
            made_K=state.made_K + made_K,
            needed_BK=state.needed_BK + needed_BK.astype(jnp.int32),
        )

    each = slice(None, None, 2 if static.guided else 1)
    if state.kv_cache is None:
        hidden_XMD = passes.full(model, canvas_BT, layout, source_BM)
        return hidden_XMD, counted(state, jnp.ones(1, jnp.int32), needs_B[:, None])
    assert static.block_length is not None, "SamplerConfig needs a block_length with a cache"
    if isinstance(static.cache, KVCachePolicy):
        found = window_passes.window_cached(
            model,
            CachedRows(canvas_BT, layout, source_BM, block, active_B, in_view_BT),
            RowCache(state.kv_cache, stored_BT),
            refresh_B,
            renew_B,
            policy=static.cache,
            block_length=static.block_length,
            new_tokens=static.new_tokens,
        )
        after = counted(state, found.made_K, found.needed_XK[each])
        stored_XT = found.cache.stored_XT
        return found.hidden_XMD, after._replace(
            kv_cache=found.cache.kv_cache, stored_BT=None if stored_XT is None else stored_XT[each]
        )
    assert state.before_XD is not None, "a state for BlockCache has this array"
    hidden_XMD, finished, made_K, needed_XK = block_passes.block_cached(
        model,
        canvas_BT,
        layout,
        source_BM,
        FinishedBlocks(state.kv_cache, state.before_XD, cached_B),
        active_B,
        block,
        size=static.block_length,
        first_width=static.first_width or canvas_BT.shape[1],
    )
    return hidden_XMD, counted(state, made_K, needed_XK[each])._replace(
        kv_cache=finished.kv_cache,
        before_XD=finished.before_XD,
        cached_B=finished.cached_X[each],
    )


def _block(state: State, static: StaticSettings) -> Block:
    """Returns the current block of each row; without blocks, all positions from the first mask on."""
    start_B, length = state.block_start_B, state.canvas_BT.shape[1]
    end_B = jnp.full_like(start_B, length) if static.block_length is None else start_B + static.block_length
    return Block(start_B, jnp.minimum(end_B, length))


def _refresh(state: State, cache: CachePolicy) -> Bool[jax.Array, "B"]:
    """Marks the rows whose next pass is a full pass that refreshes their KV cache; none without a cache."""
    if not isinstance(cache, KVCachePolicy):
        return jnp.zeros(state.block_start_B.shape, bool)
    wanted_B = state.passes_since_full_B < 0
    if cache.refresh_blocks is not None:
        starts_B = (state.block_passes_B == 0) & (state.blocks_since_full_B >= cache.refresh_blocks)
        if state.drift_B is not None:
            starts_B &= state.drift_B >= cache.refresh_drift
        wanted_B |= starts_B
    if cache.refresh_passes is not None:
        wanted_B |= state.passes_since_full_B >= cache.refresh_passes
    return wanted_B & active(state)


def _renew(state: State, refresh_B: Bool[jax.Array, "B"], cache: CachePolicy) -> Bool[jax.Array, "B"]:
    """Marks the rows whose next pass is the first one over a block, is no full pass, and has a window of its own shape."""
    if not isinstance(cache, KVCachePolicy) or cache.renew_left is None:
        return jnp.zeros(refresh_B.shape, bool)
    return active(state) & (state.block_passes_B == 0) & ~refresh_B


def _candidates(
    model: Dream, state: State, block: Block, refresh_B: Bool[jax.Array, "B"], static: StaticSettings
) -> tuple[Int[jax.Array, "B M"], Bool[jax.Array, "B M"]]:
    """Returns M positions of each row, first those that this step may write, in order; and true where it may write."""
    position_T = jnp.arange(state.canvas_BT.shape[1], dtype=jnp.int32)
    open_BT = state.canvas_BT == model.config.mask_token_id
    open_BT &= (position_T >= block.start_B[:, None]) & (position_T < block.end_B[:, None])
    if static.forces_first:
        open_BT &= ~refresh_B[:, None] | (position_T == block.start_B[:, None])
    position_BM = jnp.argsort(~open_BT, axis=1, stable=True)[:, : static.capacity].astype(jnp.int32)
    return position_BM, take(open_BT, position_BM)


def _schedule_step(
    state: State,
    masked_B: Int[jax.Array, "B"],
    refresh_B: Bool[jax.Array, "B"],
    dynamic: DynamicSettings,
    static: StaticSettings,
) -> tuple[Int[jax.Array, "B"], Int[jax.Array, "B"]]:
    """Returns the index in the schedule of the step that each row takes, and how many positions the schedule writes."""
    schedule_step_B = state.schedule_step_B
    if static.alg == "origin" or not static.follows_schedule:
        return schedule_step_B, masked_B
    counts_BS = schedule.write_counts(masked_B, dynamic.fractions_BS)
    if not static.forces_first:
        writes_BS = (counts_BS > 0) & (jnp.arange(static.steps) >= schedule_step_B[:, None])
        schedule_step_B = jnp.argmax(writes_BS, axis=1).astype(jnp.int32)
    count_B = jnp.take_along_axis(counts_BS, schedule_step_B[:, None], axis=1)[:, 0]
    return schedule_step_B, jnp.where(refresh_B, 1, count_B) if static.forces_first else count_B


def _write(
    state: State,
    position_BM: Int[jax.Array, "B M"],
    written_BM: Bool[jax.Array, "B M"],
    token_BM: Int[jax.Array, "B M"],
    step_id_B: Int[jax.Array, "B"],
) -> State:
    """Returns the state after writing the tokens and the id of the step at the positions marked in `written_BM`."""
    rows_B1 = jnp.arange(position_BM.shape[0])[:, None]
    old_BM = take(state.canvas_BT, position_BM)
    canvas_BT = state.canvas_BT.at[rows_B1, position_BM].set(jnp.where(written_BM, token_BM, old_BM))
    # A position counts as written even if the model chose the mask token; a later step then writes the position again.
    step_id_BM = jnp.where(written_BM, step_id_B[:, None], -1)
    commit_step_BT = state.commit_step_BT.at[rows_B1, position_BM].max(step_id_BM)
    return state._replace(canvas_BT=sharding.constrain(canvas_BT, "batch", None), commit_step_BT=commit_step_BT)


def _record(
    recorded: Recorded,
    position_BM: Int[jax.Array, "B M"],
    written_BM: Bool[jax.Array, "B M"],
    proposal: propose.Proposal,
) -> Recorded:
    """Returns the record with the confidences and logprobs of the positions marked in `written_BM`."""
    rows_B1, length = jnp.arange(position_BM.shape[0])[:, None], recorded.confidence_BT.shape[1]
    target_BM = jnp.where(written_BM, position_BM, length)  # positions that are not written are dropped
    put = lambda old, new: old.at[rows_B1, target_BM].set(new, mode="drop")
    return jax.tree.map(put, recorded, Recorded(proposal.confidence_BM, proposal.logprobs))


def _fill_after_end(
    model: Dream, state: State, valid_BT: Bool[jax.Array, "B T"], step_id_B: Int[jax.Array, "B"]
) -> State:
    """Fills the masks of a row with end-of-text tokens if its text has ended."""
    filled_BT = (state.canvas_BT == model.config.mask_token_id) & ended(model, state, valid_BT)[:, None]
    return state._replace(
        canvas_BT=jnp.where(filled_BT, model.config.pad_token_id, state.canvas_BT),
        commit_step_BT=jnp.where(filled_BT, step_id_B[:, None], state.commit_step_BT),
    )


def ended(model: Dream, state: State, valid_BT: Bool[jax.Array, "B T"]) -> Bool[jax.Array, "B"]:
    """Marks the rows whose text has ended: they have no mask before their first written end-of-text token.

    An end-of-text token does not count if a given token is after it: the text goes on there.
    """
    masked_BT = state.canvas_BT == model.config.mask_token_id
    given_BT = valid_BT & ~masked_BT & (state.commit_step_BT < 0)
    given_after_BT = jnp.flip(jnp.cumsum(jnp.flip(given_BT, axis=1), axis=1), axis=1) > 0
    end_BT = (state.canvas_BT == model.config.pad_token_id) & (state.commit_step_BT >= 0) & ~given_after_BT
    return first(end_BT) < first(masked_BT)


def _apply_token_hook(
    model: Dream, state: State, canvas_BT: Int[jax.Array, "B T"], step_id_B: Int[jax.Array, "B"]
) -> State:
    """Returns the state with the canvas that a hook returned, in the rows that are not done."""
    changed_BT = (canvas_BT != state.canvas_BT) & active(state)[:, None]
    stale_B = first(changed_BT) < state.cached_B  # a cached token was changed, so the row makes its first pass again
    step_id_BT = jnp.where(canvas_BT == model.config.mask_token_id, -1, step_id_B[:, None])
    return state._replace(
        canvas_BT=jnp.where(changed_BT, canvas_BT, state.canvas_BT),
        commit_step_BT=jnp.where(changed_BT, step_id_BT, state.commit_step_BT),
        cached_B=jnp.where(stale_B, 0, state.cached_B),
    )


def _advance(model: Dream, state: State, block: Block, dynamic: DynamicSettings, static: StaticSettings) -> State:
    """Moves each row that has finished its block to the next block.

    The next block starts at the first mask after the block. If the blocks are those of block diffusion (`block_grid`), it
    is the block of this mask.
    """
    length = state.canvas_BT.shape[1]
    position_T = jnp.arange(length, dtype=jnp.int32)
    masked_BT = state.canvas_BT == model.config.mask_token_id
    # If the model chose the mask token itself, masks are left when the block has made all its steps, and remain.
    if static.follows_schedule:
        spent_B = state.schedule_step_B >= dynamic.steps_B
    else:
        spent_B = state.block_passes_B >= (static.block_length or length)
    left_B = jnp.any(masked_BT & (position_T >= block.start_B[:, None]) & (position_T < block.end_B[:, None]), axis=1)
    finished_B = (spent_B | ~left_B) & active(state)
    next_B = first(masked_BT & (position_T >= block.end_B[:, None]))
    next_B = block_start(next_B, state.answer_start_B, length, static.grid_of(model))
    return state._replace(
        block_start_B=jnp.where(finished_B, next_B, state.block_start_B),
        schedule_step_B=jnp.where(finished_B, 0, state.schedule_step_B),
        block_passes_B=jnp.where(finished_B, 0, state.block_passes_B),
        blocks_since_full_B=state.blocks_since_full_B + finished_B.astype(jnp.int32),
    )


def _draws(
    keys_B: jax.Array,
    step_id_B: Int[jax.Array, "B"],
    positions_BT: Int[jax.Array, "B T"],
    position_BM: Int[jax.Array, "B M"],
    stream: int,
) -> Float[jax.Array, "B M"]:
    """Returns a uniform number in [0, 1) for each position in `position_BM`.

    It depends on the key of the row, the id of the step, the number of the stream, and the position in the text. The
    position in the text does not count padding, so padding does not change the number.
    """
    length = positions_BT.shape[1]

    def of_row(key: jax.Array, step_id: jax.Array, position_M: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, step_id), stream)
        return jax.random.uniform(key, (length,))[position_M]

    return jax.vmap(of_row)(keys_B, step_id_B, take(positions_BT, position_BM))
