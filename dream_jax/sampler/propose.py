"""What each masked position would become: token and confidence, from hidden states, a few rows of logits at a time.

Knows hidden states and the output projection. Knows nothing of canvases or the clock.
"""

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

# Elements of the largest [rows, V] block of logits that is formed at once (256 MiB of float32).
_LOGIT_ELEMENTS = 1 << 26
# Rows of that block, at least (over the whole batch): so many that reading the projection for them pays.
_LOGIT_ROWS = 64
# Sizes that the last block may have, as shares of a whole one. A CPU computes for nothing what fills it up; elsewhere it
# takes as long as reading the projection, whatever its rows.
_LAST_BLOCKS = {"cpu": 16}
# Each size is compiled on its own, which takes longer than it saves where the vocabulary is smaller.
_LARGE_VOCABULARY = 1 << 14


class Filters(NamedTuple):
    """Numbers that shape the token distribution; None switches off."""

    temperature: Float[jax.Array, ""] | None
    top_p: Float[jax.Array, ""] | None
    end_penalty: Float[jax.Array, ""] | None = None
    guidance: Float[jax.Array, ""] | None = None


class Writable(NamedTuple):
    """Which tokens may be written: ids below the limit, less the forbidden ones."""

    limit: int | None
    forbidden: tuple[int, ...]

    def table(self, vocab: int) -> np.ndarray | None:
        """bool [V]; None when all may.

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
    rows_XMD: Float[jax.Array, "X M D"],
    needed: Int[jax.Array, ""],
    filters: Filters,
    uniform_BM: Float[jax.Array, "B M"] | None,
    *,
    alg: decoding.Alg,
    top_k: int | None,
    writable: Writable,
    hook: Callable[[Int[jax.Array, "B C"], Float[jax.Array, "B C V"]], Float[jax.Array, "B C V"]] | None = None,
) -> tuple[Int[jax.Array, "B M"], Float[jax.Array, "B M"]]:
    """Token and confidence of the first `needed` of the M rows; the logits exist a chunk of rows at a time.

    Args:
      model: whose output projection.
      rows_XMD: hidden states; X is B, or 2 B under guidance, where each row is followed by its unconditional one.
      needed: how many of the M rows mean something.
      filters: numbers.
      uniform_BM: needed when there is a temperature.
      alg: whose confidence.
      top_k: number of tokens kept, None for all.
      writable: which tokens may be written.
      hook: from the indices (of M) that are looked at and their logits to other logits.
    """
    guided = filters.guidance is not None
    batch, most, _ = rows_XMD.shape
    batch = batch // 2 if guided else batch
    vocab = model.config.vocab_size
    # Small enough that late steps, with few masked rows, do little; large enough that reading the projection pays.
    chunk = max(most // 4, -(-_LOGIT_ROWS // batch))
    chunk = max(1, min(most, chunk, _LOGIT_ELEMENTS // (batch * vocab)))
    parts = _LAST_BLOCKS.get(current_target().platform, 1) if vocab >= _LARGE_VOCABULARY else 1
    unit = -(-chunk // parts)
    parts = -(-chunk // unit)
    chunk = unit * parts
    padding = -most % chunk
    rows_XMD = jnp.pad(rows_XMD, ((0, 0), (0, padding), (0, 0)))
    if uniform_BM is not None:
        uniform_BM = jnp.pad(uniform_BM, ((0, 0), (0, padding)))
    writable_V = writable.table(vocab)

    Found = tuple[jax.Array, jax.Array]

    def decide(size: int, start: jax.Array, found: Found) -> Found:
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        logits_BCV = sharding.constrain(model.unembed(part(rows_XMD)), "batch", None, "vocab")
        if filters.guidance is not None:
            given_BCV, free_BCV = logits_BCV[0::2], logits_BCV[1::2]
            logits_BCV = free_BCV + (1.0 + filters.guidance) * (given_BCV - free_BCV)
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
            uniform_R=None if uniform_BM is None else part(uniform_BM).reshape(-1),
        )
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return update(found[0], token.reshape(batch, size)), update(found[1], confidence.reshape(batch, size))

    empty = (jnp.zeros((batch, most + padding), jnp.int32), jnp.zeros((batch, most + padding), jnp.float32))
    with jax.named_scope("propose"):
        whole = lambda index, found: decide(chunk, index * chunk, found)
        if parts == 1:
            token_BM, confidence_BM = jax.lax.fori_loop(0, (needed + chunk - 1) // chunk, whole, empty)
        else:
            # A loop over a single block would see the same rows each time it runs: XLA computes such a body before the
            # loop, wanted or not.
            done = jnp.int32(0) if most + padding == chunk else needed // chunk
            found = empty if most + padding == chunk else jax.lax.fori_loop(0, done, whole, empty)
            last = lambda part: lambda found: decide(chunk * part // parts, done * chunk, found)
            sizes = [lambda found: found, *map(last, range(1, parts + 1))]
            token_BM, confidence_BM = jax.lax.switch(-(-(needed - done * chunk) * parts // chunk), sizes, found)
    return token_BM[:, :most], confidence_BM[:, :most]
