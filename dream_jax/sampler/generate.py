"""`generate`: checks and pads the prompts, runs the compiled loop on them, and cuts the answers out of the canvas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dream_jax import masks, sharding
from dream_jax.model import Dream
from dream_jax.sampler.callbacks import listening
from dream_jax.sampler.config import SamplerConfig, check_cache, check_first_token
from dream_jax.sampler.growth import extents, filled_up, finished, first_width, grow, wants_more
from dream_jax.sampler.loop import denoise, new_batch, resume
from dream_jax.sampler.pass_counts import PassCounts
from dream_jax.sampler.state import DynamicSettings, Record, Recorded, State, StaticSettings, bucket_length
from dream_jax.shapes import Array

UNDEFINED = (
    "the logits are no numbers (NaN or infinity), so there is no token to write: the weights are damaged or too large for "
    "their dtype, or a setting of the sampler (guidance, a hook) makes the logits too large"
)
"""The reason why `generate` and `Stream` end a row whose logits are no numbers, as the end of a message."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """The result of `generate` for prompts [B, P] and N = max_new_tokens.

    Attributes:
      tokens: int32 [B, P + N], the prompt as it was given (padding included) and the answer.
      commit_step: int32 [B, P + N], id of the step that last wrote each position, from 0; -1 at positions that no step
        has written (tokens of the prompt, forced tokens) or that a token hook has masked again. Without blocks and with
        `Count`, the id is the index in the published schedule, in which steps that write nothing count too; otherwise it
        is the number of forward passes that the row had made before.
      forwards: int32 scalar, number of forward passes made. With a cache, full and window passes count as one each.
      passes: int32 [B], number of forward passes that each row took part in: its cost if it were alone in the batch.
      counts: how many passes of each kind were made, and what each kind computes, from which the work of each row follows.
      mask_token_id: id of the mask token, which stands at positions that are not yet written.
      recorded: what was noted about each written position [B, P + N], if `generate` was asked to record it.
    """

    tokens: Int[jax.Array, "B T"]
    commit_step: Int[jax.Array, "B T"]
    forwards: Int[jax.Array, ""]
    passes: Int[jax.Array, "B"]
    counts: PassCounts
    mask_token_id: int = dataclasses.field(metadata={"static": True})
    recorded: Recorded | None = None

    def canvas_at(self, step: int) -> Int[jax.Array, "B T"]:
        """Returns the canvas after the step with this id (from 0), int32 [B, P + N]; -1 is before the first step."""
        return jnp.where(self.commit_step <= step, self.tokens, self.mask_token_id)


def generate(
    model: Dream,
    prompt_BP: Int[Array, "B P"],
    config: SamplerConfig | None = None,
    key: jax.Array | None = None,
    prompt_mask: Int[Array, "B P"] | Bool[Array, "B P"] | None = None,
    *,
    on_step: Callable[[int, np.ndarray], None] | None = None,
    record: Record = "nothing",
) -> Sample:
    """Denoises `max_new_tokens` mask tokens after each prompt, and any mask tokens inside the prompt (infilling).

    `generate` pads the prompts on the left to one of a few lengths, so that different lengths share compiled programs.
    The attention mask hides the padding, positions count from the first valid token, and the padding that `generate`
    added is cut off the result.

    Args:
      model: any Dream. If its parameters are on a mesh, the batch is sharded over this mesh.
      prompt_BP: integer token ids, numpy or jax; shorter rows must be padded on the left.
      config: the settings of the sampler; None for the defaults of SamplerConfig, or for the preset "exact" if the model
        was trained by block diffusion.
      key: a `jax.random.key`, or one key per row ([B]); required if `config.is_random`. With a single key, row b uses
        `fold_in(key, b)`, so that its result does not depend on the other rows. Old-style keys (`jax.random.PRNGKey`)
        are accepted.
      prompt_mask: nonzero at valid tokens, zero at left padding; None if there is no padding.
      on_step: called with (step, canvas int32 [B, P + N]) after every step that wrote something; `step` is the id of
        the most advanced row's step. Each call copies the canvas to the host.
      record: what is noted about each token when it is written: "nothing", its confidence ("confidences"), or also the
        most probable tokens ("logprobs"), which costs time. The tokens do not depend on it.

    Returns:
      The tokens of prompts and answers, and when each of them was written.

    Raises:
      ValueError: the prompt is no integer array [B, P] with rows, has padding on the right or ids outside the
        vocabulary, or is too long for the model; there are neither prompt tokens nor new tokens; prompt_mask has another
        shape; blocks or cache do not fit to the mask (`config.check_cache`, `config.check_first_token`); a forced or
        forbidden token is outside the vocabulary, or no token may be written; the key is missing, is not a random key, or
        has another number of rows; or the logits of a row are NaN or infinite, for which `generate` waits for the result.
    """
    if config is None:
        blocks = isinstance(masks.parse(model.trained_mask), masks.BlockDiffusion)
        config = SamplerConfig()
        if blocks:
            config = SamplerConfig.preset(
                "exact", max_new_tokens=config.max_new_tokens, trained_mask=model.trained_mask
            )
    prompt = np.asarray(prompt_BP)
    valid_BP = np.ones(prompt.shape, bool) if prompt_mask is None else np.asarray(prompt_mask).astype(bool)
    check_prompt(model, prompt, valid_BP, config)
    check_mask(model, config)
    rows, length = prompt.shape

    padding = bucket_length(length) - length
    canvas, valid_BT = lay_out(model, prompt, valid_BP, config, padding)
    given = np.pad(np.where(valid_BP, 0, prompt), ((0, 0), (0, config.max_new_tokens))).astype(np.int32)
    masked_B = np.sum(canvas == model.config.mask_token_id, axis=1)
    if not np.any(masked_B):
        tokens = jnp.asarray(np.where(valid_BT, canvas, 0)[:, padding:] + given)
        return Sample(
            tokens=tokens,
            commit_step=jnp.full(tokens.shape, -1, jnp.int32),
            forwards=jnp.int32(0),
            passes=jnp.zeros(rows, jnp.int32),
            counts=PassCounts.nothing(rows),
            mask_token_id=model.config.mask_token_id,
        )
    check_key(config, key)

    only_new = not np.any((prompt == model.config.mask_token_id) & valid_BP)
    static = StaticSettings.of(config, min(bucket_length(int(masked_B.max())), canvas.shape[1]), masked_B)
    static = dataclasses.replace(
        static, record=record, first_width=first_width(config, padding + length, only_new=only_new)
    )
    dynamic = DynamicSettings.of(config, static.steps, masked_B)
    extent = extents(config, only_new=only_new, has_listener=on_step is not None)
    with sharding.mesh_context(model), listening(on_step, padding) as listener_id:
        keys_B = _row_keys(key, rows)
        if len(extent) > 1:
            state, counts = _denoise_growing(model, canvas, valid_BT, keys_B, dynamic, extent, static)
        else:
            state = denoise(model, canvas, valid_BT, keys_B, dynamic, listener_id, static=static)
            counts = [counts_of(state, static, canvas.shape[1])]
        if on_step is not None:
            jax.effects_barrier()
    undefined = np.flatnonzero(state.undefined_B)
    if undefined.size:
        raise ValueError(f"row {undefined[0]}: {UNDEFINED}")
    return Sample(
        # The sampler ignores the tokens at padding; the result has those that the caller gave.
        tokens=jnp.where(valid_BT[:, padding:], state.canvas_BT[:, padding:], given),
        commit_step=state.commit_step_BT[:, padding:],
        forwards=state.forwards,
        passes=state.passes_B,
        counts=counts[0] if len(counts) == 1 else PassCounts.joined(counts),
        mask_token_id=model.config.mask_token_id,
        recorded=jax.tree.map(lambda noted: noted[:, padding:], state.recorded),
    )


def _denoise_growing(
    model: Dream,
    canvas: np.ndarray,
    valid_BT: np.ndarray,
    keys_B: jax.Array,
    dynamic: DynamicSettings,
    extent: tuple[int, ...],
    static: StaticSettings,
) -> tuple[State, list[PassCounts]]:
    """Returns what `denoise` returns, but makes the canvas only as long as the texts need it, see `growth`.

    `extent` holds the numbers of new tokens for which the canvas has room, one after the other. The second result has the
    counts after the passes of each of these lengths.
    """
    rows, before = canvas.shape[0], canvas.shape[1] - static.new_tokens
    new_B, idle = np.ones(rows, bool), jnp.int32(rows)
    batch = new_batch(model, rows, before + extent[0], static=dataclasses.replace(static, new_tokens=extent[0]))
    length, counts = before + extent[0], []
    for tokens in extent:
        now = dataclasses.replace(static, new_tokens=tokens)
        if before + tokens > length:
            batch = grow(model, batch, ~new_B, columns=before + tokens - length, static=now)
            length = before + tokens
        start, valid = canvas[:, :length], valid_BT[:, :length]
        batch = resume(model, batch, new_B, start, valid, keys_B, dynamic, idle, static=now)
        new_B = np.zeros(rows, bool)
        counts.append(counts_of(finished(batch), now, length))
        if not np.any(wants_more(model, batch, static=now)):
            break
    return filled_up(finished(batch), canvas.shape[1] - length, model.config.pad_token_id), counts


def counts_of(state: State, static: StaticSettings, length: int) -> PassCounts:
    """Returns the counts of a state. It must be called on the mesh of the program, as `pass_counts.pass_kinds`."""
    kinds = static.pass_kinds(state.passes_B.shape[0], length)
    return PassCounts(kinds, state.needed_BK, state.made_K, state.predicted_B)


def lay_out(
    model: Dream, prompt: np.ndarray, valid_BP: np.ndarray, config: SamplerConfig, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the canvas before the first step.

    Args:
      model: gives the ids of the mask and padding tokens.
      prompt: integer token ids [B, P].
      valid_BP: bool [B, P], true at valid tokens.
      config: gives the number of new tokens and the forced tokens.
      padding: number of columns to add on the left.

    Returns:
      The canvas int32 [B, T], where T is `padding` + P + max_new_tokens, and bool [B, T], false at padding.
    """
    rows, length = prompt.shape
    total = padding + length + config.max_new_tokens
    canvas = np.full((rows, total), model.config.mask_token_id, np.int32)
    canvas[:, padding : padding + length] = prompt
    for offset, token in config.forced_tokens:
        canvas[:, padding + length + offset] = token
    valid_BT = np.ones((rows, total), bool)
    valid_BT[:, :padding] = False
    valid_BT[:, padding : padding + length] = valid_BP
    canvas[~valid_BT] = model.config.pad_token_id
    return canvas, valid_BT


def check_prompt(model: Dream, prompt: np.ndarray, valid_BP: np.ndarray, config: SamplerConfig) -> None:
    """Raises ValueError if `generate` cannot denoise this prompt [B, P]; its docstring lists the reasons."""
    if prompt.ndim != 2 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"the prompt must be integers of shape [batch, tokens], got {prompt.dtype} {prompt.shape}")
    if prompt.shape[0] == 0:
        raise ValueError(f"the prompt has shape {prompt.shape}: no rows to denoise; pass at least one row")
    if prompt.shape[1] + config.max_new_tokens == 0:
        raise ValueError("the canvas is empty: the prompt has no tokens and max_new_tokens is 0")
    if valid_BP.shape != prompt.shape:
        raise ValueError(f"prompt_mask has shape {valid_BP.shape}, but the prompt has {prompt.shape}")
    if np.any(valid_BP[:, :-1] & ~valid_BP[:, 1:]):
        row = int(np.argmax(np.any(valid_BP[:, :-1] & ~valid_BP[:, 1:], axis=1)))
        raise ValueError(f"prompt_mask row {row} has padding after a valid token; prompts are padded on the left")
    ids = prompt[valid_BP]
    if ids.size and (ids.min() < 0 or ids.max() >= model.config.vocab_size):
        raise ValueError(f"prompt ids span {ids.min()}..{ids.max()}, outside 0..{model.config.vocab_size - 1}")
    for offset, token in config.forced_tokens:
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(f"forced token {token} at offset {offset} is outside the vocabulary")
    total = int(valid_BP.sum(axis=1).max()) + config.max_new_tokens
    if total > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt and max_new_tokens make {total} tokens, more than {model.config.max_position_embeddings=}"
        )


def check_mask(model: Dream, config: SamplerConfig) -> None:
    """Raises ValueError if the blocks or the cache of the configuration do not fit to the mask of the model."""
    mask = masks.parse(model.trained_mask) if config.mask is None else config.mask
    check_cache(config.cache, mask, config.block_length)
    check_first_token(config.first_token_first, mask, config.block_length)


def check_key(config: SamplerConfig, key: jax.Array | None) -> None:
    """Raises ValueError if the configuration is random and there is no key."""
    if config.is_random and key is None:
        raise ValueError(
            f"this sampler is random ({config.alg=}, {config.temperature=}, {config.alg_temp=}): pass key=jax.random.key(0)"
        )


def _row_keys(key: jax.Array | None, rows: int) -> jax.Array:
    """Returns one key per row ([rows]). Raises ValueError if `key` is not a key, or not one key per row."""
    if key is None:
        key = jax.random.key(0)  # the program needs some key, but its result does not depend on it
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"{key=} is not a random key; pass jax.random.key({key if isinstance(key, int) else 0})")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 1:
        if key.shape[0] != rows:
            raise ValueError(f"got {key.shape[0]} keys for {rows} rows; pass one key, or one per row")
        return key
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
