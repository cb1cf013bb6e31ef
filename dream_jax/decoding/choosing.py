"""The token that each position would take and how sure that is, from rows of logits."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dream_jax.decoding import filters, sums
from dream_jax.target import current_target

Alg = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

# The published sampler adds it inside the logarithm of its entropy.
_ENTROPY_EPSILON = 1e-10

# Rows that are looked at together: on a CPU few enough that their probabilities stay in its cache, elsewhere all.
_ROWS_TOGETHER = {"cpu": 4}


def choose_tokens(
    logits_RV: Float[jax.Array, "R V"],
    *,
    alg: Alg,
    temperature: float | Float[jax.Array, ""],
    top_p: float | Float[jax.Array, ""] | None,
    top_k: int | None,
    uniform_R: Float[jax.Array, "R"] | None,
) -> tuple[Int[jax.Array, "R"], Float[jax.Array, "R"]]:
    """The token that each row would write, and the confidence in it.

    In the published order: divide by the temperature (if above 0), keep the top_p nucleus (up to and including the token
    that crosses it), keep the top_k (and ties), then softmax. The token is a categorical sample, or the argmax at
    temperature 0. The confidence comes from the filtered distribution: p[token] for `maskgit_plus` (and `origin`, which
    does not use it), p1 - p2 for `topk_margin`, sum p log(p + 1e-10) for `entropy`.

    Args:
      logits_RV: float32; -inf marks tokens that must not be written (at least one must be finite).
      alg: whose confidence.
      temperature: 0 or above; as an array, above 0.
      top_p: in (0, 1], None to switch off.
      top_k: at least 1, None to switch off.
      uniform_R: one number in [0, 1) a row; needed when temperature > 0, ignored otherwise.

    Returns:
      Token ids int32 [R] and confidences float32 [R], higher is surer.
    """
    samples = isinstance(temperature, jax.Array) or temperature > 0
    if samples and uniform_R is None:
        raise ValueError(f"{temperature=} samples tokens, which needs random numbers")
    uniform_R = uniform_R if samples else None
    rows, vocab = logits_RV.shape
    top_p = None if not isinstance(top_p, jax.Array) and (top_p is None or top_p >= 1.0) else top_p
    top_k = None if top_k is None or top_k >= vocab else top_k

    def decide(logits_RV: jax.Array, uniform_R: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        logits_RV = logits_RV.astype(jnp.float32)
        peak_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
        # Not argmax, which on a CPU takes forty times as long.
        best_R = jnp.min(jnp.where(logits_RV == peak_R1, jnp.arange(vocab, dtype=jnp.int32), vocab), axis=-1)
        depth_RV = logits_RV - peak_R1
        depth_RV = depth_RV / temperature if samples else depth_RV
        # Unnormalised probabilities; the largest is 1. Once and for all: computed anew for each use, each in its own way,
        # a token might be on both sides of a threshold.
        mass_RV = jax.lax.optimization_barrier(jnp.exp(depth_RV))
        if top_p is not None or top_k is not None:
            mass_RV = filters.keep_likely(mass_RV, top_p, top_k)
        return _decide(mass_RV, depth_RV, best_R, alg=alg, uniform_R=uniform_R)

    together = _ROWS_TOGETHER.get(current_target().platform, rows)
    if rows < together:
        # Sums over one row are formed in another order than those over several: a row's result must not depend on how
        # many there are.
        filled = lambda x: jnp.pad(x, ((0, together - rows), *[(0, 0)] * (x.ndim - 1)))
        token_R, confidence_R = decide(filled(logits_RV), None if uniform_R is None else filled(uniform_R))
        return token_R[:rows], confidence_R[:rows]
    if rows == together:
        return decide(logits_RV, uniform_R)

    def group(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last slice starts earlier, so as to end with the rows: some are done twice, to the same result.
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=number * together, slice_size=together)
        token_R, confidence_R = decide(part(logits_RV), None if uniform_R is None else part(uniform_R))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=number * together, axis=0)
        return put(found[0], token_R), put(found[1], confidence_R)

    empty = (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32))
    return jax.lax.fori_loop(0, -(-rows // together), group, empty)


def _decide(
    mass_RV: Float[jax.Array, "R V"],
    depth_RV: Float[jax.Array, "R V"],
    best_R: Int[jax.Array, "R"],
    *,
    alg: Alg,
    uniform_R: Float[jax.Array, "R"] | None,
) -> tuple[Int[jax.Array, "R"], Float[jax.Array, "R"]]:
    """Token and confidence of each row.

    Args:
      mass_RV: unnormalised probabilities: 0 where removed, the largest 1.
      depth_RV: their logarithms, before any were removed.
      best_R: the most likely token.
      alg: whose confidence.
      uniform_R: what a sample is drawn with; None takes the most likely token.
    """
    mass = sums.by_block(mass_RV)
    total_R = mass.total()
    if uniform_R is None:
        token_R, chosen_R = best_R, jnp.ones_like(total_R)
    else:
        token_R = sums.passing(mass, uniform_R * total_R)
        chosen_R = jnp.take_along_axis(mass_RV, token_R[:, None], axis=-1)[:, 0]
    if alg == "entropy":
        return token_R, _negative_entropy(mass_RV, depth_RV, total_R)
    if alg == "topk_margin":
        rest_RV = jnp.where(jnp.arange(mass_RV.shape[-1]) == best_R[:, None], 0.0, mass_RV)
        return token_R, (1.0 - jnp.max(rest_RV, axis=-1)) / total_R
    return token_R, chosen_R / total_R


def _negative_entropy(
    mass_RV: Float[jax.Array, "R V"], depth_RV: Float[jax.Array, "R V"], total_R: Float[jax.Array, "R"]
) -> Float[jax.Array, "R"]:
    """sum p log(p + epsilon), with log p as it is known already: p log(1 + epsilon / p) is what the epsilon adds.

    That is epsilon p / (p + epsilon) for p far from epsilon, and together with p log p within 1e-11 of the truth a token.
    """
    epsilon_R1 = _ENTROPY_EPSILON * total_R[:, None]
    added_RV = epsilon_R1 * mass_RV / (mass_RV + epsilon_R1)
    # The choice outermost: a CPU's library for reductions then gets terms that are computed already, which takes a fifth of
    # the time in which it computes them itself.
    whole_R = jnp.sum(jnp.where(mass_RV > 0.0, mass_RV * depth_RV + added_RV, 0.0), axis=-1)
    return whole_R / total_R - jnp.log(total_R)
