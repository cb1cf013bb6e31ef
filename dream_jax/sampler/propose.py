"""Proposes a token and a confidence for each masked position; computes the logits of a few positions at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dream_jax import decoding, sharding
from dream_jax.model import Dream
from dream_jax.target import current_target

# Maximum number of elements of the [rows, V] array of logits (256 MiB in float32).
_LOGIT_ELEMENTS = 1 << 26
# Minimum number of rows of this array (rows of the batch times positions of a chunk). With fewer rows, reading the
# weights of the output projection takes longer than the matrix product.
_LOGIT_ROWS = 64
# Number of sizes that the last chunk can have, by platform (1 on others): with 16 sizes it has 1/16, 2/16, ... or 16/16
# of the positions of a full chunk, and the smallest sufficient size is used. On a CPU, positions that only fill up a
# chunk take time. On other devices a chunk of any size takes as long as reading the output projection.
_CHUNK_SIZES = {"cpu": 16}
# With a smaller vocabulary than this the last chunk has the full size only: a separate program is compiled for each
# size, and compiling it would take longer than the smaller chunk saves.
_LARGE_VOCABULARY = 1 << 14


class Filters(NamedTuple):
    """Parameters of the token distribution, float32: a scalar, or one number per row [B]; None switches it off.

    Attributes:
      temperature: positive number by which the logits are divided; None takes the most probable token.
      top_p: probability mass of the nucleus, in (0, 1).
      end_penalty: number that is subtracted from the logit of the end-of-text token.
      guidance: g in u + (1 + g) (c - u), the logits that follow from conditional logits c and unconditional logits u.
    """

    temperature: Float[jax.Array, "..."] | None
    top_p: Float[jax.Array, "..."] | None
    end_penalty: Float[jax.Array, "..."] | None = None
    guidance: Float[jax.Array, "..."] | None = None


class TokenLogprobs(NamedTuple):
    """Logarithms of probabilities in the distribution from which the tokens of a step were chosen.

    It is the softmax over the tokens that may be written, at temperature 1, before `top_p` and `top_k`, and after
    guidance, the penalty of the end-of-text token and the logits hook.

    Attributes:
      logprob_BM: float32, of the chosen token of each position.
      top_token_BMK: int32, the most probable tokens, the most probable one first.
      top_logprob_BMK: float32, their logarithms; minus infinity for a token that must not be written.
    """

    logprob_BM: Float[jax.Array, "B M"]
    top_token_BMK: Int[jax.Array, "B M K"]
    top_logprob_BMK: Float[jax.Array, "B M K"]


class Proposal(NamedTuple):
    """What a step may write at M positions of each row.

    Attributes:
      token_BM: int32 token ids.
      confidence_BM: float32, higher is more confident.
      logprobs: the probabilities of the tokens; None if they were not asked for.
    """

    token_BM: Int[jax.Array, "B M"]
    confidence_BM: Float[jax.Array, "B M"]
    logprobs: TokenLogprobs | None


class Writable(NamedTuple):
    """Which tokens may be written: ids below `limit` (None: the whole vocabulary), except those in `forbidden`."""

    limit: int | None
    forbidden: tuple[int, ...]

    def table(self, vocab: int) -> np.ndarray | None:
        """Returns bool [V], true at tokens that may be written; None if all tokens may be written.

        Raises:
          ValueError: a forbidden token is outside the vocabulary, or no token is left.
        """
        if self.limit is None and not self.forbidden:
            return None
        writable = np.arange(vocab) < (vocab if self.limit is None else self.limit)
        for token in self.forbidden:
            if not 0 <= token < vocab:
                raise ValueError(f"forbidden token {token} is outside the vocabulary, 0..{vocab - 1}")
            writable[token] = False
        if not writable.any():
            raise ValueError(f"vocab_limit={self.limit} and forbidden_tokens={self.forbidden} leave no token to write")
        return writable


def propose(
    model: Dream,
    hidden_XMD: Float[jax.Array, "X M D"],
    needed: Int[jax.Array, ""],
    filters: Filters,
    uniform_BM: Float[jax.Array, "B M"] | None,
    *,
    alg: decoding.Alg,
    top_k: int | None,
    writable: Writable,
    hook: Callable[[Int[jax.Array, "B C"], Float[jax.Array, "B C V"]], Float[jax.Array, "B C V"]] | None = None,
    num_top: int | None = None,
) -> Proposal:
    """Returns a token and a confidence for the first `needed` of the M hidden states of each row.

    The logits are computed for one chunk of positions at a time.

    Args:
      model: gives the output projection.
      hidden_XMD: hidden states. X is B, or 2 B under guidance, where each row is followed by its unconditional copy.
      needed: int32 scalar in 0..M: only the first `needed` hidden states of each row are used.
      filters: parameters of the token distribution.
      uniform_BM: float32 numbers in [0, 1) to sample with; may be None without a temperature.
      alg: the definition of confidence, see `decoding.choose_tokens`.
      top_k: number of most probable tokens to sample from; None for all tokens.
      writable: which tokens may be written.
      hook: called for each chunk with the indices of its C positions (into M), int32 [B, C], and their logits, float32
        [B, C, V]; returns the logits to use. Tokens that must not be written are excluded again afterwards.
      num_top: how many of the most probable tokens `Proposal.logprobs` lists; None computes no logprobs.

    Returns:
      The tokens and their confidences at M positions; the values at positions from `needed` on are undefined.

    Raises:
      ValueError: as `Writable.table`; or there is a temperature, but `uniform_BM` is None.
    """
    guided = filters.guidance is not None
    batch, num_positions, _ = hidden_XMD.shape
    batch = batch // 2 if guided else batch
    vocab = model.config.vocab_size
    # A small chunk makes late steps, which have few masked positions, cheap. A large one shares the time to read the
    # output projection among many positions.
    chunk = max(num_positions // 4, -(-_LOGIT_ROWS // batch))
    chunk = max(1, min(num_positions, chunk, _LOGIT_ELEMENTS // (batch * vocab)))
    num_sizes = _CHUNK_SIZES.get(current_target().platform, 1) if vocab >= _LARGE_VOCABULARY else 1
    smallest = -(-chunk // num_sizes)
    num_sizes = -(-chunk // smallest)
    chunk = smallest * num_sizes
    padding = -num_positions % chunk
    hidden_XMD = jnp.pad(hidden_XMD, ((0, 0), (0, padding), (0, 0)))
    if uniform_BM is not None:
        uniform_BM = jnp.pad(uniform_BM, ((0, 0), (0, padding)))
    writable_V = writable.table(vocab)
    num_top = None if num_top is None else min(num_top, vocab)

    def of_rows(value: jax.Array) -> jax.Array:
        return value if value.ndim == 0 else value[:, None, None]

    def propose_chunk(size: int, start: jax.Array, proposed: Proposal) -> Proposal:
        in_chunk = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        logits_BCV = sharding.constrain(model.unembed(in_chunk(hidden_XMD)), "batch", None, "vocab")
        if filters.guidance is not None:
            conditional_BCV, unconditional_BCV = logits_BCV[0::2], logits_BCV[1::2]
            logits_BCV = unconditional_BCV + (1.0 + of_rows(filters.guidance)) * (conditional_BCV - unconditional_BCV)
        if filters.end_penalty is not None:
            end_V = jnp.arange(vocab) == model.config.pad_token_id
            logits_BCV = jnp.where(end_V, logits_BCV - of_rows(filters.end_penalty), logits_BCV)
        allowed = lambda z: z if writable_V is None else jnp.where(writable_V, z, -jnp.inf)
        logits_BCV = allowed(logits_BCV)
        if hook is not None:
            index_C = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), num_positions - 1)
            logits_BCV = allowed(hook(jnp.broadcast_to(index_C, (batch, size)), logits_BCV))
        # A setting of each row becomes a setting of each of its positions.
        of_positions = lambda value: value if value is None or value.ndim == 0 else jnp.repeat(value, size)
        token, confidence = decoding.choose_tokens(
            logits_BCV.reshape(batch * size, vocab),
            alg=alg,
            temperature=0.0 if filters.temperature is None else of_positions(filters.temperature),
            top_p=of_positions(filters.top_p),
            top_k=top_k,
            uniform_R=None if uniform_BM is None else in_chunk(uniform_BM).reshape(-1),
        )
        found = Proposal(
            token.reshape(batch, size),
            confidence.reshape(batch, size),
            None if num_top is None else _logprobs(logits_BCV, token.reshape(batch, size), num_top),
        )
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return jax.tree.map(update, proposed, found)

    width = num_positions + padding
    integers, floats = jnp.zeros((batch, width), jnp.int32), jnp.zeros((batch, width), jnp.float32)
    empty = Proposal(integers, floats, None)
    if num_top is not None:
        repeated = lambda x: jnp.broadcast_to(x[..., None], (*x.shape, num_top))
        empty = Proposal(integers, floats, TokenLogprobs(floats, repeated(integers), repeated(floats)))
    with jax.named_scope("propose"):
        whole_chunk = lambda index, proposed: propose_chunk(chunk, index * chunk, proposed)
        if num_sizes == 1:
            proposal = jax.lax.fori_loop(0, (needed + chunk - 1) // chunk, whole_chunk, empty)
        else:
            # With a single chunk there is no loop. XLA would move the loop-invariant body of such a loop out of the
            # enclosing while_loop, and so compute the whole chunk in every step, even if it is not needed.
            single = width == chunk
            num_full = jnp.int32(0) if single else needed // chunk
            proposed = empty if single else jax.lax.fori_loop(0, num_full, whole_chunk, empty)
            last_chunk = lambda units: (
                lambda proposed: propose_chunk(chunk * units // num_sizes, num_full * chunk, proposed)
            )
            branches = [lambda proposed: proposed, *map(last_chunk, range(1, num_sizes + 1))]
            units = -(-(needed - num_full * chunk) * num_sizes // chunk)
            proposal = jax.lax.switch(units, branches, proposed)
    return jax.tree.map(lambda x: x[:, :num_positions], proposal)


def _logprobs(logits_BCV: Float[jax.Array, "B C V"], token_BC: Int[jax.Array, "B C"], num_top: int) -> TokenLogprobs:
    """Returns the logarithms of the probabilities of the chosen tokens and of the `num_top` most probable tokens."""
    normaliser_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    chosen_BC1 = jnp.take_along_axis(logits_BCV, token_BC[:, :, None], axis=-1)
    batch, size, vocab = logits_BCV.shape
    top, token = jax.lax.top_k(logits_BCV.reshape(batch * size, vocab), num_top)
    return TokenLogprobs(
        (chosen_BC1 - normaliser_BC1)[:, :, 0],
        token.reshape(batch, size, num_top).astype(jnp.int32),
        top.reshape(batch, size, num_top) - normaliser_BC1,
    )
