"""Proposes a token and a confidence for each masked position from its hidden state, a few rows of logits at a time."""

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

# Most elements of the [rows, V] array of logits (256 MiB of float32).
_LOGIT_ELEMENTS = 1 << 26
# Fewest rows of that array, over the whole batch: with fewer, reading the projection costs more than the product.
_LOGIT_ROWS = 64
# Into how many sizes a chunk is divided, of which the last chunk takes the smallest that suffices. A CPU would spend
# time on rows that only fill up a chunk; on other devices a chunk takes as long as reading the projection, whatever its
# rows.
_CHUNK_SIZES = {"cpu": 16}
# Below this vocabulary size there is one size only: each is compiled separately, which would take longer than it saves.
_LARGE_VOCABULARY = 1 << 14


class Filters(NamedTuple):
    """Parameters of the token distribution; None switches off."""

    temperature: Float[jax.Array, ""] | None
    top_p: Float[jax.Array, ""] | None
    end_penalty: Float[jax.Array, ""] | None = None
    guidance: Float[jax.Array, ""] | None = None


class Writable(NamedTuple):
    """Which tokens may be written: ids below the limit, except the forbidden ones."""

    limit: int | None
    forbidden: tuple[int, ...]

    def table(self, vocab: int) -> np.ndarray | None:
        """Returns bool [V], true at tokens that may be written; None when all may.

        Raises:
          ValueError: a forbidden token outside the vocabulary, or no token left.
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
) -> tuple[Int[jax.Array, "B M"], Float[jax.Array, "B M"]]:
    """Token and confidence of the first `needed` of the M hidden states of each row; logits exist for one chunk at a
    time.

    Args:
      model: gives the output projection.
      hidden_XMD: hidden states. X is B, or 2 B under guidance, where each row is followed by its unconditional copy.
      needed: how many of the M hidden states are used; the results of the others have no meaning.
      filters: parameters of the token distribution.
      uniform_BM: numbers in [0, 1) to sample with; needed when there is a temperature.
      alg: the definition of confidence, see `decoding.choose_tokens`.
      top_k: number of tokens to sample from, None for all.
      writable: which tokens may be written.
      hook: maps the indices (into M) of a chunk and its logits to the logits to use.
    """
    guided = filters.guidance is not None
    batch, most, _ = hidden_XMD.shape
    batch = batch // 2 if guided else batch
    vocab = model.config.vocab_size
    # Small enough that late steps, with few masked positions, are cheap; large enough to make reading the projection
    # pay.
    chunk = max(most // 4, -(-_LOGIT_ROWS // batch))
    chunk = max(1, min(most, chunk, _LOGIT_ELEMENTS // (batch * vocab)))
    sizes = _CHUNK_SIZES.get(current_target().platform, 1) if vocab >= _LARGE_VOCABULARY else 1
    smallest = -(-chunk // sizes)
    sizes = -(-chunk // smallest)
    chunk = smallest * sizes
    padding = -most % chunk
    hidden_XMD = jnp.pad(hidden_XMD, ((0, 0), (0, padding), (0, 0)))
    if uniform_BM is not None:
        uniform_BM = jnp.pad(uniform_BM, ((0, 0), (0, padding)))
    writable_V = writable.table(vocab)

    Proposed = tuple[jax.Array, jax.Array]  # tokens and confidences, both [B, M]

    def propose_chunk(size: int, start: jax.Array, proposed: Proposed) -> Proposed:
        in_chunk = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        logits_BCV = sharding.constrain(model.unembed(in_chunk(hidden_XMD)), "batch", None, "vocab")
        if filters.guidance is not None:
            conditional_BCV, unconditional_BCV = logits_BCV[0::2], logits_BCV[1::2]
            logits_BCV = unconditional_BCV + (1.0 + filters.guidance) * (conditional_BCV - unconditional_BCV)
        if filters.end_penalty is not None:
            end_V = jnp.arange(vocab) == model.config.pad_token_id
            logits_BCV = jnp.where(end_V, logits_BCV - filters.end_penalty, logits_BCV)
        allowed = lambda z: z if writable_V is None else jnp.where(writable_V, z, -jnp.inf)
        logits_BCV = allowed(logits_BCV)
        if hook is not None:
            index_C = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), most - 1)
            logits_BCV = allowed(hook(jnp.broadcast_to(index_C, (batch, size)), logits_BCV))
        token, confidence = decoding.choose_tokens(
            logits_BCV.reshape(batch * size, vocab),
            alg=alg,
            temperature=0.0 if filters.temperature is None else filters.temperature,
            top_p=filters.top_p,
            top_k=top_k,
            uniform_R=None if uniform_BM is None else in_chunk(uniform_BM).reshape(-1),
        )
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return update(proposed[0], token.reshape(batch, size)), update(proposed[1], confidence.reshape(batch, size))

    empty = (jnp.zeros((batch, most + padding), jnp.int32), jnp.zeros((batch, most + padding), jnp.float32))
    with jax.named_scope("propose"):
        whole_chunk = lambda index, proposed: propose_chunk(chunk, index * chunk, proposed)
        if sizes == 1:
            token_BM, confidence_BM = jax.lax.fori_loop(0, (needed + chunk - 1) // chunk, whole_chunk, empty)
        else:
            # With a single chunk there is no loop: XLA would move its loop-invariant body out of the enclosing
            # while_loop and compute the whole chunk in every step, needed or not.
            single = most + padding == chunk
            done = jnp.int32(0) if single else needed // chunk
            proposed = empty if single else jax.lax.fori_loop(0, done, whole_chunk, empty)
            last = lambda size: lambda proposed: propose_chunk(chunk * size // sizes, done * chunk, proposed)
            branches = [lambda proposed: proposed, *map(last, range(1, sizes + 1))]
            size = -(-(needed - done * chunk) * sizes // chunk)
            token_BM, confidence_BM = jax.lax.switch(size, branches, proposed)
    return token_BM[:, :most], confidence_BM[:, :most]
