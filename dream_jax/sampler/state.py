"""The settings of the loop, static (compiled in) and dynamic (arguments of the program), and the carry of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dream_jax import decoding, masks, schedule
from dream_jax.attention import KVCache
from dream_jax.model import Dream
from dream_jax.sampler import pass_counts, passes, propose, rules
from dream_jax.sampler.callbacks import LogitsHook, TokenHook
from dream_jax.sampler.config import BlockCache, CachePolicy, KVCachePolicy, SamplerConfig, block_grid
from dream_jax.sampler.pass_counts import PassKind
from dream_jax.shapes import Array

Record = Literal["nothing", "confidences", "logprobs"]
"""What a run of the loop notes about the tokens that it writes, see `Recorded`."""

NUM_TOP = 20
"""Number of most probable tokens that are noted for each position if logprobs are recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticSettings:
    """The settings that are compiled into the program: another value compiles another program.

    Attributes:
      steps: length of the schedules in `DynamicSettings`: the largest number of steps of a row, rounded up to one of a
        few lengths.
      rule: class of the commit rule.
      writable: the tokens that may be written, see `propose.Writable`.
      guided: whether every row is followed by its unconditional copy (classifier-free guidance).
      new_tokens: number of positions at the end of the canvas that do not belong to the prompt.
      capacity: maximum number of masked positions of a row for which one step computes logits.
      record: what is noted about each token when it is written.
      first_width: number of tokens, from the start of the canvas, that the first pass over a row computes with
        `BlockCache`: they hold the first block of every row and all that is before it. None for the whole canvas.

    The other attributes are as in SamplerConfig.
    """

    alg: decoding.Alg
    top_k: int | None
    block_length: int | None
    first_token_first: bool
    steps: int
    cache: CachePolicy
    rule: type[rules.CommitRule]
    stop_at_end: bool
    writable: propose.Writable
    guided: bool
    token_hook: TokenHook | None
    logits_hook: LogitsHook | None
    mask: masks.Mask | None
    new_tokens: int
    capacity: int
    record: Record = "nothing"
    first_width: int | None = None

    @classmethod
    def of(cls, config: SamplerConfig, capacity: int, masked_B: Sequence[int] | np.ndarray) -> StaticSettings:
        """Returns the static settings of a configuration for rows with these numbers of masks.

        `capacity` is limited to the length of a block.
        """
        return cls(
            alg=config.alg,
            top_k=config.top_k,
            block_length=config.block_length,
            first_token_first=config.first_token_first,
            steps=bucket_length(max(config.block_steps(int(masked)) for masked in masked_B)),
            cache=config.cache,
            rule=type(config.commit),
            stop_at_end=config.stop_at_end,
            writable=propose.Writable(config.vocab_limit, tuple(config.forbidden_tokens)),
            guided=config.guidance != 0,
            token_hook=config.token_hook,
            logits_hook=config.logits_hook,
            mask=config.mask,
            new_tokens=config.max_new_tokens,
            capacity=capacity if config.block_length is None else min(capacity, config.block_length),
        )

    @classmethod
    def of_rows(cls, config: SamplerConfig, length: int, record: Record) -> StaticSettings:
        """Returns static settings that rows with different numbers of new tokens and steps share.

        The rows have the canvas length `length`, and their other settings come from `DynamicSettings.of_rows`. A row has
        at most `length` steps.
        """
        static = dataclasses.replace(cls.of(config, length, [length]), new_tokens=0, record=record)
        return dataclasses.replace(static, steps=length if static.follows_schedule else 1)

    @property
    def follows_schedule(self) -> bool:
        """Whether the published schedule decides how many positions a step writes."""
        return self.rule is rules.Count

    @property
    def reports_schedule_steps(self) -> bool:
        """Whether step ids are indices in the published schedule; otherwise they count the passes of the row."""
        return self.block_length is None and self.follows_schedule

    @property
    def forces_first(self) -> bool:
        """Whether a full pass writes the first token of a block and nothing else, as in Fast-dLLM."""
        return isinstance(self.cache, KVCachePolicy) and self.cache.forces_first

    def pass_kinds(self, rows: int, length: int) -> tuple[PassKind, ...]:
        """Returns `pass_counts.pass_kinds` for a batch of `rows` rows on a canvas of `length` tokens."""
        return pass_counts.pass_kinds(
            self.cache,
            2 * rows if self.guided else rows,
            length,
            block_length=self.block_length,
            first_width=self.first_width,
            new_tokens=self.new_tokens,
        )

    def mask_of(self, model: Dream) -> masks.Mask:
        """Returns the mask of a model under these settings, which is not bound to particular rows."""
        return masks.parse(model.trained_mask) if self.mask is None else self.mask

    def grid_of(self, model: Dream) -> int | None:
        """Returns `config.block_grid` for a model under these settings."""
        return block_grid(self.mask_of(model), self.block_length)


class DynamicSettings(NamedTuple):
    """The settings that are arguments of the compiled program, so that one program serves all their values.

    A setting is one value for all rows, or has a first axis [B] with the value of each row. None switches a setting
    off. Which settings are None is part of the compiled program: a change compiles another one.

    Attributes:
      filters: parameters of the token distribution.
      alg_temp: as in SamplerConfig, float32; None instead of 0.
      rule: the parameter of the commit rule, float32; None if it has no parameter.
      fractions_BS: for each row and each step of its schedule, the fraction of the masked positions that the step
        writes, float32 in [0, 1]. After the last step of the row it is 1.
      steps_B: number of steps that the schedule of each row has for a block, int32.
      new_tokens: int32 [B], the number of positions at the end of the canvas that do not belong to the prompt; None if
        it is `StaticSettings.new_tokens` in every row.
      fall: how much lower the parameter of the commit rule becomes while a block is filled, float32; None instead of 0.
    """

    filters: propose.Filters
    alg_temp: Float[jax.Array, "..."] | None
    rule: Float[jax.Array, "..."] | None
    fractions_BS: Float[Array, "B S"]
    steps_B: Int[Array, "B"]
    new_tokens: Int[Array, "B"] | None = None
    fall: Float[jax.Array, "..."] | None = None

    @classmethod
    def of(cls, config: SamplerConfig, steps: int, masked_B: Sequence[int] | np.ndarray) -> DynamicSettings:
        """Returns the dynamic settings of a configuration for rows with these numbers of masks.

        `steps` is the length of the schedules, `StaticSettings.steps`.
        """
        steps_B = np.array([config.block_steps(int(masked)) for masked in masked_B], np.int32)
        fractions_BS = np.ones((len(steps_B), steps), np.float32)
        for fractions_S, count in zip(fractions_BS, steps_B.tolist(), strict=True):
            fractions_S[:count] = schedule.write_fractions(count, config.eps)
        values = {name: _scalar(value) for name, value in _values(config).items()}
        return cls(
            filters=propose.Filters(**{name: values[name] for name in propose.Filters._fields}),
            alg_temp=values["alg_temp"],
            rule=values["rule"],
            fall=values["fall"],
            fractions_BS=fractions_BS,
            steps_B=steps_B,
        )

    @classmethod
    def of_rows(
        cls, configs: Sequence[SamplerConfig], masked_B: Sequence[int] | np.ndarray, static: StaticSettings
    ) -> DynamicSettings:
        """Returns the settings of rows that share `static`, each with its configuration and its number of masks.

        The same settings must be switched off in all configurations (`switched_off`).
        """
        each = [_values(config) for config in configs]
        stacked: dict[str, Any] = {
            name: None if each[0][name] is None else np.array([values[name] for values in each], np.float32)
            for name in each[0]
        }
        steps_B, fractions_BS = np.ones(len(configs), np.int32), np.ones((len(configs), static.steps), np.float32)
        if static.follows_schedule:
            for row, (config, masked) in enumerate(zip(configs, masked_B, strict=True)):
                steps_B[row] = config.block_steps(int(masked))
                fractions_BS[row, : steps_B[row]] = schedule.write_fractions(int(steps_B[row]), config.eps)
        return cls(
            filters=propose.Filters(**{name: stacked[name] for name in propose.Filters._fields}),
            alg_temp=stacked["alg_temp"],
            rule=stacked["rule"],
            fall=stacked["fall"],
            fractions_BS=fractions_BS,
            steps_B=steps_B,
            new_tokens=np.array([config.max_new_tokens for config in configs], np.int32),
        )


def switched_off(config: SamplerConfig) -> frozenset[str]:
    """Returns the names of the dynamic settings that a configuration switches off: another set is another program."""
    return frozenset(name for name, value in _values(config).items() if value is None)


def _values(config: SamplerConfig) -> dict[str, float | None]:
    """Returns the numbers of the dynamic settings of a configuration; None for those that are switched off."""
    return {
        "temperature": config.temperature or None,
        "top_p": None if config.top_p == 1.0 else config.top_p,
        "end_penalty": config.end_penalty or None,
        "guidance": config.guidance or None,
        "alg_temp": config.alg_temp or None,
        "rule": config.commit.value,
        "fall": config.commit.fall_share,
    }


def bucket_length(length: int) -> int:
    """Returns the smallest of 0, 8, 12, 16, 24, 32, 48, 64, 96, ... that is at least `length`."""
    if length <= 0:
        return 0
    power = 8
    while power < length:
        if power + power // 2 >= length:
            return power + power // 2
        power *= 2
    return power


def _scalar(value: float | None) -> jax.Array | None:
    return None if value is None else jnp.float32(value)


class Recorded(NamedTuple):
    """What was noted about each position when its token was written; undefined at positions without a step id.

    Attributes:
      confidence_BT: float32, the confidence in the token (`decoding.choose_tokens`); NaN where a token was written
        without one (the tokens after the end of a text, and those of a token hook).
      logprobs: the probabilities of the token and of the most probable tokens, arrays [B, T] and [B, T, K]; NaN as
        above. None if the settings record confidences only.
    """

    confidence_BT: Float[jax.Array, "B T"]
    logprobs: propose.TokenLogprobs | None


class State(NamedTuple):
    """The carry of the loop, in which all integers are int32.

    Attributes:
      canvas_BT: token ids of prompts, written tokens and mask tokens.
      commit_step_BT: id of the step that last wrote each position; -1 at positions that no step has written, or that a
        token hook has masked again.
      passes_B: number of forward passes that each row took part in.
      answer_start_B: first position of the answer of each row: the first position that was masked before the first step,
        or the first new token if this is earlier (because it was forced).
      block_start_B: first position of the current block of each row; T if the row is done.
      schedule_step_B: index in the schedule of the next step of the block.
      block_passes_B: number of steps made in the block; a random step (alg "origin") counts even if it needed no pass.
      passes_since_full_B: number of passes from the last full pass of the row on, that pass included; before the first
        full pass -1. Without a cache the value has no meaning.
      blocks_since_full_B: number of blocks finished since the last full pass of the row.
      kv_cache: cached keys and values, of 2 B rows under guidance and B rows otherwise; None without a cache.
      before_XD: with `BlockCache` the hidden state, after the final norm, of the token before the current block of each row
        of the KV cache, if its keys and values are cached; None without `BlockCache`.
      cached_B: with `BlockCache` the number of leading positions of each row whose tokens are final, and whose keys and
        values are in the KV cache; without it 0.
      stored_BT: with `suffix`, true at positions whose keys and values are in the KV cache; None without it.
      drift_B: with `refresh_drift`, the uncertainty of the tokens that were written since the last full pass of the row,
        float32; None without it.
      forwards: number of forward passes made by the program.
      needed_BK: number of passes of each kind (`StaticSettings.pass_kinds`) that each row needed.
      made_K: number of passes of each kind made by the program.
      predicted_B: number of predictions of each row, see `pass_counts.PassCounts`.
      undefined_B: whether a token of the row was written from logits that are no numbers.
      recorded: what was noted about the written tokens; None if the settings record nothing.
    """

    canvas_BT: Int[jax.Array, "B T"]
    commit_step_BT: Int[jax.Array, "B T"]
    passes_B: Int[jax.Array, "B"]
    answer_start_B: Int[jax.Array, "B"]
    block_start_B: Int[jax.Array, "B"]
    schedule_step_B: Int[jax.Array, "B"]
    block_passes_B: Int[jax.Array, "B"]
    passes_since_full_B: Int[jax.Array, "B"]
    blocks_since_full_B: Int[jax.Array, "B"]
    kv_cache: KVCache | None
    before_XD: Float[jax.Array, "X D"] | None
    cached_B: Int[jax.Array, "B"]
    stored_BT: Bool[jax.Array, "B T"] | None
    drift_B: Float[jax.Array, "B"] | None
    forwards: Int[jax.Array, ""]
    needed_BK: Int[jax.Array, "B K"]
    made_K: Int[jax.Array, "K"]
    predicted_B: Int[jax.Array, "B"]
    undefined_B: Bool[jax.Array, "B"]
    recorded: Recorded | None = None


def begin(
    model: Dream,
    canvas_BT: Int[jax.Array, "B T"],
    static: StaticSettings,
    new_tokens_B: Int[Array, "B"] | None = None,
) -> State:
    """Returns the state before the first step, with an empty KV cache if the settings ask for a cache.

    `new_tokens_B` is the number of positions at the end of each row that do not belong to the prompt; None if it is
    `static.new_tokens` in every row.
    """
    zeros_B = jnp.zeros(canvas_BT.shape[0], jnp.int32)
    rows, length = canvas_BT.shape
    first_mask_B = first(canvas_BT == model.config.mask_token_id)
    new_tokens: Any = static.new_tokens if new_tokens_B is None else jnp.asarray(new_tokens_B, jnp.int32)
    answer_start_B = jnp.minimum(first_mask_B, length - new_tokens).astype(jnp.int32)
    has_blocks, cache_rows = isinstance(static.cache, BlockCache), 2 * rows if static.guided else rows
    has_cache = has_blocks or isinstance(static.cache, KVCachePolicy)
    has_suffix = isinstance(static.cache, KVCachePolicy) and static.cache.suffix is not None
    has_drift = isinstance(static.cache, KVCachePolicy) and static.cache.refresh_drift > 0
    num_kinds = len(static.pass_kinds(rows, length))
    return State(
        canvas_BT=canvas_BT,
        commit_step_BT=jnp.full(canvas_BT.shape, -1, jnp.int32),
        passes_B=zeros_B,
        answer_start_B=answer_start_B,
        block_start_B=block_start(first_mask_B, answer_start_B, length, static.grid_of(model)),
        schedule_step_B=zeros_B,
        block_passes_B=zeros_B,
        passes_since_full_B=zeros_B - 1,
        blocks_since_full_B=zeros_B,
        kv_cache=passes.empty_kv_cache(model, cache_rows, length) if has_cache else None,
        before_XD=jnp.zeros((cache_rows, model.config.hidden_size), model.compute_dtype) if has_blocks else None,
        cached_B=zeros_B,
        stored_BT=jnp.zeros((rows, length), bool) if has_suffix else None,
        drift_B=jnp.zeros(rows, jnp.float32) if has_drift else None,
        forwards=jnp.int32(0),
        needed_BK=jnp.zeros((rows, num_kinds), jnp.int32),
        made_K=jnp.zeros(num_kinds, jnp.int32),
        predicted_B=zeros_B,
        undefined_B=jnp.zeros(rows, bool),
        recorded=_nothing_recorded(rows, length, min(NUM_TOP, model.config.vocab_size), static.record),
    )


def block_start(
    mask_B: Int[jax.Array, "B"], answer_start_B: Int[jax.Array, "B"], length: int, grid: int | None
) -> Int[jax.Array, "B"]:
    """Returns the start of the block to which a masked position of each row belongs; T where there is no such position.

    Args:
      mask_B: the masked position of each row, or T (`length`).
      answer_start_B: `State.answer_start_B`.
      length: T, the length of the canvas.
      grid: `config.block_grid`; with None the block starts at the masked position.
    """
    if grid is None:
        return mask_B
    return jnp.where(mask_B < length, mask_B - (mask_B - answer_start_B) % grid, length)


def _nothing_recorded(rows: int, length: int, num_top: int, record: Record) -> Recorded | None:
    """Returns the record before the first step: NaN, and token 0, at every position."""
    if record == "nothing":
        return None
    nan_BT = jnp.full((rows, length), jnp.nan, jnp.float32)
    if record == "confidences":
        return Recorded(nan_BT, None)
    token_BTK = jnp.zeros((rows, length, num_top), jnp.int32)
    return Recorded(nan_BT, propose.TokenLogprobs(nan_BT, token_BTK, jnp.full(token_BTK.shape, jnp.nan, jnp.float32)))


def active(state: State) -> Bool[jax.Array, "B"]:
    """Marks the rows that are not done."""
    return state.block_start_B < state.canvas_BT.shape[1]


def first(x_BT: Bool[jax.Array, "B T"]) -> Int[jax.Array, "B"]:
    """Returns the first true position of each row (int32); T if the row has none."""
    position_BT = jnp.where(x_BT, jnp.arange(x_BT.shape[1], dtype=jnp.int32), x_BT.shape[1])
    return jnp.min(position_BT, axis=1, initial=x_BT.shape[1])
