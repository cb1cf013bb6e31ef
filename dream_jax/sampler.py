"""The iterative denoising sampler: the published algorithm in one compiled loop.

A canvas of prompt and mask tokens is denoised by a `lax.while_loop` that never leaves the device: forward pass ->
hidden states of the masked positions -> token and confidence -> the surest ones are written. Steps that would write
nothing are skipped, which changes no result: the canvas, and so the next forward pass, would be the same.

Knows the model, the clock and the decision rules. Knows nothing of text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dream_jax import decoding, masks, schedule, sharding
from dream_jax.model import Dream, padded_positions
from dream_jax.shapes import Array

# Elements of the largest [rows, V] block of logits that is formed at once (256 MiB of float32).
_LOGIT_ELEMENTS = 1 << 26
# Rows of that block, at least (over the whole batch).
_LOGIT_ROWS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a canvas is denoised. The defaults are those of the published `diffusion_generate`.

    Attributes:
      max_new_tokens: mask tokens appended to the prompt.
      steps: denoising steps; each writes a share of what is still masked, the last one all of it.
      alg: order in which positions are written. "origin": at random; "maskgit_plus": highest probability first;
        "topk_margin": largest gap between the best two first; "entropy": lowest entropy first.
      temperature: of the token distribution; 0 takes the most probable token.
      top_p: nucleus size in (0, 1], None for all.
      top_k: number of tokens kept, None for all.
      alg_temp: softens the order: positions are drawn from softmax(confidence / alg_temp). None or 0 is strict.
      eps: noise level at the end of the clock, in (0, 1).
      vocab_limit: ids at or above it are never written. The checkpoint has more logits than the tokenizer has tokens:
        pass the tokenizer's number.
      forbidden_tokens: further ids that are never written, such as the mask token.

    Raises:
      ValueError: a value out of its range.
    """

    max_new_tokens: int = 512
    steps: int = 512
    alg: decoding.Alg = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3
    vocab_limit: int | None = None
    forbidden_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        # Any sequence will do; as a tuple the config can be a key of compiled programs.
        object.__setattr__(self, "forbidden_tokens", tuple(int(token) for token in self.forbidden_tokens))
        if self.max_new_tokens < 0:
            raise ValueError(f"{self.max_new_tokens=} must not be negative")
        if self.alg not in get_args(decoding.Alg):
            raise ValueError(f"{self.alg=} is not one of {get_args(decoding.Alg)}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"{self.temperature=} must be 0 (most probable token) or a positive number")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"{self.top_p=} is outside (0, 1]; pass 1.0 or None to switch it off")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{self.top_k=} must be at least 1; pass None to switch it off")
        if self.alg_temp is not None and not 0.0 <= self.alg_temp < float("inf"):
            raise ValueError(f"{self.alg_temp=} must not be negative; pass None to switch it off")
        if self.vocab_limit is not None and self.vocab_limit < 1:
            raise ValueError(f"{self.vocab_limit=} leaves no token to write")
        schedule.timesteps(self.steps, self.eps)  # raises for steps and eps

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a random key."""
        return self.temperature > 0 or bool(self.alg_temp) or (self.alg == "origin" and self.steps > 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """What `generate` returns.

    Attributes:
      tokens: int32 [B, P + N], the prompt as it was given (padding too) and the answer.
      commit_step: int32 [B, P + N], the step that last wrote each position; -1 where the prompt already had a token.
      forwards: forward passes used (an int32 scalar).
      mask_token_id: what an unwritten position holds.
    """

    tokens: Int[jax.Array, "B T"]
    commit_step: Int[jax.Array, "B T"]
    forwards: Int[jax.Array, ""]
    mask_token_id: int = dataclasses.field(metadata={"static": True})

    def canvas_at(self, step: int) -> Int[jax.Array, "B T"]:
        """The canvas after step `step` (0-based), int32 [B, P + N]; -1 gives the canvas before the first."""
        return jnp.where(self.commit_step <= step, self.tokens, self.mask_token_id)


def generate(
    model: Dream,
    prompt_BP: Int[Array, "B P"],
    config: SamplerConfig | None = None,
    key: jax.Array | None = None,
    prompt_mask: Int[Array, "B P"] | Bool[Array, "B P"] | None = None,
    *,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> Sample:
    """Denoises `max_new_tokens` mask tokens after each prompt, and any mask tokens inside the prompt (infilling).

    Prompts are padded on the left to a bucket of lengths, so that different lengths share compiled programs; the
    padding is masked, positions count from the first real token, and the result is cut back.

    Args:
      model: any Dream. Where its parameters lie on a mesh, the batch is spread over it.
      prompt_BP: token ids; rows of different lengths are padded on the left.
      config: see SamplerConfig.
      key: a `jax.random.key`, or one key a row ([B]); required when anything is random. Row b of a single key uses
        `fold_in(key, b)`: what a row becomes does not depend on the other rows. Old-style keys (`jax.random.PRNGKey`)
        will do.
      prompt_mask: nonzero at real tokens, zero at left padding; None when there is no padding.
      on_step: called with (step, canvas [B, P + N]) after every step that wrote something. For watching: each call
        brings the canvas to the host.

    Raises:
      ValueError: shapes that do not fit, padding on the right, a missing key, or ids outside the vocabulary.
    """
    config = SamplerConfig() if config is None else config
    prompt = np.asarray(prompt_BP)
    valid = np.ones(prompt.shape, bool) if prompt_mask is None else np.asarray(prompt_mask).astype(bool)
    _check(model, prompt, valid, config)
    rows, length = prompt.shape

    padding = bucket_length(length) - length
    total = padding + length + config.max_new_tokens
    canvas = np.full((rows, total), model.config.mask_token_id, np.int32)
    canvas[:, :padding] = model.config.pad_token_id
    canvas[:, padding : padding + length] = prompt
    visible = np.ones((rows, total), bool)
    visible[:, :padding] = False
    visible[:, padding : padding + length] = valid
    canvas[~visible] = model.config.pad_token_id
    given = np.pad(np.where(valid, 0, prompt), ((0, 0), (0, config.max_new_tokens))).astype(np.int32)
    most_masked = int(np.max(np.sum(canvas == model.config.mask_token_id, axis=1)))
    if most_masked == 0:
        tokens = jnp.asarray(np.where(visible, canvas, 0)[:, padding:] + given)
        return Sample(tokens, jnp.full(tokens.shape, -1, jnp.int32), jnp.int32(0), model.config.mask_token_id)
    if config.is_random and key is None:
        raise ValueError(
            f"this sampler is random ({config.alg=}, {config.temperature=}, {config.alg_temp=}): pass key=jax.random.key(0)"
        )

    with sharding.mesh_context(model), _listening(on_step, padding) as listener:
        state = _denoise(
            model,
            canvas,
            visible,
            _row_keys(key, rows),
            listener,
            config=config,
            capacity=min(bucket_length(most_masked), total),
        )
        if on_step is not None:
            jax.effects_barrier()
    return Sample(
        # What stood in the padding was never looked at, but it is the caller's.
        tokens=jnp.where(visible[:, padding:], state.canvas_BT[:, padding:], given),
        commit_step=state.commit_step_BT[:, padding:],
        forwards=state.forwards,
        mask_token_id=model.config.mask_token_id,
    )


def bucket_length(length: int) -> int:
    """The smallest of 0, 8, 12, 16, 24, 32, 48, 64, 96, ... that holds `length`: at most half of it is padding."""
    if length <= 0:
        return 0
    power = 8
    while power < length:
        if power + power // 2 >= length:
            return power + power // 2
        power *= 2
    return power


def _check(model: Dream, prompt: np.ndarray, valid: np.ndarray, config: SamplerConfig) -> None:
    if prompt.ndim != 2 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"the prompt must be integers of shape [batch, tokens], got {prompt.dtype} {prompt.shape}")
    if prompt.shape[0] == 0:
        raise ValueError(f"the prompt has shape {prompt.shape}: no rows to denoise")
    if prompt.shape[1] + config.max_new_tokens == 0:
        raise ValueError("the canvas is empty: the prompt has no tokens and max_new_tokens is 0")
    if valid.shape != prompt.shape:
        raise ValueError(f"prompt_mask has shape {valid.shape}, but the prompt has {prompt.shape}")
    if np.any(valid[:, :-1] & ~valid[:, 1:]):
        row = int(np.argmax(np.any(valid[:, :-1] & ~valid[:, 1:], axis=1)))
        raise ValueError(f"prompt_mask row {row} has padding after a real token; prompts are padded on the left")
    real = prompt[valid]
    if real.size and (real.min() < 0 or real.max() >= model.config.vocab_size):
        raise ValueError(f"prompt ids span {real.min()}..{real.max()}, outside 0..{model.config.vocab_size - 1}")
    total = int(valid.sum(axis=1).max()) + config.max_new_tokens
    if total > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt and max_new_tokens make {total} tokens, more than {model.config.max_position_embeddings=}"
        )


def _row_keys(key: jax.Array | None, rows: int) -> jax.Array:
    if key is None:
        key = jax.random.key(0)  # never read: nothing is random
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"{key=} is no random key; pass jax.random.key({key if isinstance(key, int) else 0})")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 1:
        if key.shape[0] != rows:
            raise ValueError(f"got {key.shape[0]} keys for {rows} rows")
        return key
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))


class _State(NamedTuple):
    step: Int[jax.Array, ""]
    canvas_BT: Int[jax.Array, "B T"]
    commit_step_BT: Int[jax.Array, "B T"]
    forwards: Int[jax.Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _denoise(
    model: Dream,
    canvas_BT: Int[jax.Array, "B T"],
    visible_BT: Bool[jax.Array, "B T"],
    keys_B: jax.Array,
    listener: Any,
    *,
    config: SamplerConfig,
    capacity: int,
) -> _State:
    """The driver: steps until nothing is masked. `capacity` bounds the masked positions of any row."""
    canvas_BT = sharding.constrain(canvas_BT, "batch", None)
    state = _State(
        step=jnp.int32(0),
        canvas_BT=canvas_BT,
        commit_step_BT=jnp.full(canvas_BT.shape, -1, jnp.int32),  # the last step writes all that is left
        forwards=jnp.int32(0),
    )
    step = functools.partial(
        _step,
        model,
        visible_BT,
        padded_positions(visible_BT),
        keys_B,
        listener,
        config=config,
        capacity=capacity,
    )
    state = jax.lax.while_loop(
        lambda state: (state.step < config.steps) & jnp.any(state.canvas_BT == model.config.mask_token_id),
        step,
        state,
    )
    # Whole on every device, so that every process of a run can read all of it.
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, *[None] * leaf.ndim), state)


def _step(
    model: Dream,
    visible_BT: Bool[jax.Array, "B T"],
    positions_BT: Int[jax.Array, "B T"],
    keys_B: jax.Array,
    listener: Any,
    state: _State,
    *,
    config: SamplerConfig,
    capacity: int,
) -> _State:
    """Advances to the next step that may write something, and takes it."""
    masked_BT = state.canvas_BT == model.config.mask_token_id
    masked_B = jnp.sum(masked_BT, axis=1, dtype=jnp.int32)
    fractions = jnp.asarray(schedule.write_fractions(config.steps, config.eps))

    # The masked positions of each row, first to last, then others to fill the capacity.
    place_BM = jnp.argsort(~masked_BT, axis=1, stable=True)[:, :capacity].astype(jnp.int32)
    candidate_BM = jnp.arange(capacity) < masked_B[:, None]

    if config.alg == "origin":
        step = state.step
        draws = functools.partial(_draws, keys_B, step, positions_BT)
        chance = jnp.take(fractions, step)
        write_BM = candidate_BM & (_at(draws(0), place_BM) < chance)
    else:
        counts_BS = schedule.write_counts(masked_B, fractions)
        writes_S = jnp.any(counts_BS > 0, axis=0) & (jnp.arange(config.steps) >= state.step)
        step = jnp.argmax(writes_S).astype(jnp.int32)
        draws = functools.partial(_draws, keys_B, step, positions_BT)
        write_BM = None

    def forward(canvas_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_BTD = model.hidden(canvas_BT, masks.KeyPadding(visible_BT), positions_BT)
        # The right shift: position i is predicted by the hidden state at i - 1, a text's first position by its own,
        # never by the padding before it.
        first_BM = (_at(positions_BT, place_BM) == 0) | (place_BM == 0)
        source_BM = jnp.where(first_BM, place_BM, place_BM - 1)
        rows_BMD = jnp.take_along_axis(hidden_BTD, source_BM[:, :, None], axis=1)
        uniform_BM = _at(draws(1), place_BM) if config.temperature > 0 else None
        token_BM, confidence_BM = _decide(model, rows_BMD, uniform_BM, jnp.max(masked_B), config)
        if write_BM is not None:
            chosen_BM = write_BM
        else:
            if config.alg_temp:
                # Sampling without replacement from a softmax is taking the top n after adding Gumbel noise.
                noise_BM = -jnp.log(-jnp.log(_at(draws(2), place_BM) + 1e-20) + 1e-20)
                confidence_BM = confidence_BM / config.alg_temp + noise_BM
            count_B = jnp.take(counts_BS, step, axis=1)
            chosen_BM = decoding.commit(confidence_BM, candidate_BM, count_B)
        now_BM = _at(canvas_BT, place_BM)
        rows_B1 = jnp.arange(canvas_BT.shape[0])[:, None]
        canvas_BT = canvas_BT.at[rows_B1, place_BM].set(jnp.where(chosen_BM, token_BM, now_BM))
        # Counted as written even where the model chose the mask token itself: a later step then writes there again.
        commit_step_BT = state.commit_step_BT.at[rows_B1, place_BM].max(jnp.where(chosen_BM, step, -1))
        if listener is not None:
            mesh = jax.sharding.get_abstract_mesh()
            # The library orders callbacks on one device only; on several, a fast step may overtake a slow listener.
            jax.debug.callback(_notify, listener, step, canvas_BT, ordered=mesh.empty or mesh.size == 1)
        return sharding.constrain(canvas_BT, "batch", None), commit_step_BT, jnp.int32(1)

    if write_BM is not None:
        # At random, a step may choose nothing: then it costs nothing.
        canvas_BT, commit_step_BT, used = jax.lax.cond(
            jnp.any(write_BM),
            forward,
            lambda canvas_BT: (canvas_BT, state.commit_step_BT, jnp.int32(0)),
            state.canvas_BT,
        )
    else:
        canvas_BT, commit_step_BT, used = forward(state.canvas_BT)
    return _State(
        step=step + 1,
        canvas_BT=canvas_BT,
        commit_step_BT=commit_step_BT,
        forwards=state.forwards + used,
    )


def _decide(
    model: Dream,
    rows_BMD: Float[jax.Array, "B M D"],
    uniform_BM: Float[jax.Array, "B M"] | None,
    needed: Int[jax.Array, ""],
    config: SamplerConfig,
) -> tuple[Int[jax.Array, "B M"], Float[jax.Array, "B M"]]:
    """Token and confidence of the first `needed` of the M rows; the logits exist a chunk of rows at a time."""
    batch, most, _ = rows_BMD.shape
    vocab = model.config.vocab_size
    # Small enough that late steps, with few masked rows, do little; large enough that reading the projection pays.
    chunk = max(most // 4, -(-_LOGIT_ROWS // batch))
    chunk = max(1, min(most, chunk, _LOGIT_ELEMENTS // (batch * vocab)))
    padding = -most % chunk
    rows_BMD = jnp.pad(rows_BMD, ((0, 0), (0, padding), (0, 0)))
    uniform_BM = jnp.zeros((batch, most)) if uniform_BM is None else uniform_BM
    uniform_BM = jnp.pad(uniform_BM, ((0, 0), (0, padding)))
    writable_V = _writable(vocab, config)

    def decide(index: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = index * chunk
        logits_BCV = model.unembed(jax.lax.dynamic_slice_in_dim(rows_BMD, start, chunk, axis=1))
        logits_BCV = sharding.constrain(logits_BCV, "batch", None, "vocab")
        if writable_V is not None:
            logits_BCV = jnp.where(writable_V, logits_BCV, -jnp.inf)
        token, confidence = decoding.choose_tokens(
            logits_BCV.reshape(batch * chunk, vocab),
            alg=config.alg,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            uniform_R=jax.lax.dynamic_slice_in_dim(uniform_BM, start, chunk, axis=1).reshape(-1),
        )
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return update(found[0], token.reshape(batch, chunk)), update(found[1], confidence.reshape(batch, chunk))

    empty = (jnp.zeros((batch, most + padding), jnp.int32), jnp.zeros((batch, most + padding), jnp.float32))
    with jax.named_scope("decide"):
        token_BM, confidence_BM = jax.lax.fori_loop(0, (needed + chunk - 1) // chunk, decide, empty)
    return token_BM[:, :most], confidence_BM[:, :most]


def _writable(vocab: int, config: SamplerConfig) -> np.ndarray | None:
    """Which ids may be written, bool [V]; None when all may."""
    if config.vocab_limit is None and not config.forbidden_tokens:
        return None
    writable = np.arange(vocab) < (vocab if config.vocab_limit is None else config.vocab_limit)
    for token in config.forbidden_tokens:
        if not 0 <= token < vocab:
            raise ValueError(f"forbidden token {token} is outside the vocabulary, 0..{vocab - 1}")
        writable[token] = False
    if not writable.any():
        raise ValueError(f"{config.vocab_limit=} and {config.forbidden_tokens=} leave no token to write")
    return writable


def _draws(
    keys_B: jax.Array, step: jax.Array, positions_BT: Int[jax.Array, "B T"], stream: int
) -> Float[jax.Array, "B T"]:
    """A uniform number for each position, from (row key, step, stream, position in the text): padding moves none."""
    length = positions_BT.shape[1]

    def row(key: jax.Array, positions_T: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, step), stream)
        return jax.random.uniform(key, (length,))[positions_T]

    return jax.vmap(row)(keys_B, positions_BT)


def _at(x_BT: jax.Array, place_BM: Int[jax.Array, "B M"]) -> jax.Array:
    return jnp.take_along_axis(x_BT, place_BM, axis=1)


# The compiled loop is shared by all callers, so what goes into it is the number of a listener, which is found here.
_listeners: dict[int, tuple[Callable[[int, np.ndarray], None], int]] = {}
_numbers = itertools.count()


def _notify(number: Any, step: Any, canvas_BT: Any) -> None:
    listener, padding = _listeners[int(number)]
    listener(int(step), np.asarray(canvas_BT)[:, padding:])


@contextlib.contextmanager
def _listening(on_step: Callable[[int, np.ndarray], None] | None, padding: int) -> Iterator[np.int32 | None]:
    """Gives the number under which a listener is known while the block runs."""
    if on_step is None:
        yield None
        return
    number = next(_numbers) % 2**31
    _listeners[number] = (on_step, padding)
    try:
        yield np.int32(number)
    finally:
        del _listeners[number]
