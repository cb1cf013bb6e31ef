"""Computes the token and the confidence of each position from its logits, and chooses the positions to write."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.decoding import filters, sums
from dream_jax.target import current_target

Alg = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

# The published sampler adds this number to the probability inside the logarithm of its entropy.
_ENTROPY_EPSILON = 1e-10

# Number of rows that are processed together on a platform: on a CPU so few that their probabilities stay in its cache.
# On other platforms all rows are processed together.
_GROUP_ROWS = {"cpu": 4}


def choose_tokens(
    logits_RV: Float[jax.Array, "R V"],
    *,
    alg: Alg,
    temperature: float | Float[jax.Array, "..."],
    top_p: float | Float[jax.Array, "..."] | None,
    top_k: int | None,
    uniform_R: Float[jax.Array, "R"] | None,
) -> tuple[Int[jax.Array, "R"], Float[jax.Array, "R"]]:
    """Chooses a token for each row of logits, and computes the confidence in it.

    The order of operations is that of the published code: divide the logits by the temperature (if it is above 0), keep
    the top_p nucleus (with the token that crosses top_p), keep the top_k tokens (with all ties), apply the softmax. The
    token is sampled from the result p, or is the most probable token at temperature 0. The confidence is p[token] for
    `maskgit_plus` and `origin` (which does not use it), the difference of the two largest elements of p for
    `topk_margin`, and sum p log(p + 1e-10) for `entropy`.

    Args:
      logits_RV: logits of R positions. -inf marks tokens that must not be written; one per row must be finite.
      alg: the name of the confidence.
      temperature: a float that is 0 or above, or an array above 0: a scalar, or one number per row ([R]).
      top_p: share of the probability to keep, in (0, 1]: a float, or an array as above; None keeps all tokens.
      top_k: number of tokens to keep, at least 1; None keeps all tokens.
      uniform_R: one random number in [0, 1) per row. Needed if the temperature is above 0, otherwise not used.

    Returns:
      The token ids (int32 [R]) and the confidences (float32 [R]); a higher number means more confident.

    Raises:
      ValueError: the temperature is above 0, and `uniform_R` is None.
    """
    samples = isinstance(temperature, jax.Array) or temperature > 0
    if samples and uniform_R is None:
        raise ValueError(f"{temperature=} samples tokens, which needs random numbers: pass uniform_R, or temperature 0")
    uniform_R = uniform_R if samples else None
    rows, vocab = logits_RV.shape
    top_p = None if not isinstance(top_p, jax.Array) and (top_p is None or top_p >= 1.0) else top_p
    top_k = None if top_k is None or top_k >= vocab else top_k

    # With a barrier XLA computes the probabilities once, and stores them. If it computed them again for each use, with
    # different rounding, a token could be on both sides of a threshold. Without thresholds, a GPU computes them again in
    # less time than it takes to write and read them; a CPU does not.
    is_stored = samples or top_p is not None or top_k is not None or current_target().platform != "gpu"

    # Settings that differ from row to row are divided into groups like the rows.
    settings_R = {
        name: value
        for name, value in (("temperature", temperature), ("top_p", top_p))
        if isinstance(value, jax.Array) and value.ndim == 1
    }

    def choose_rows(
        logits_RV: jax.Array, uniform_R: jax.Array | None, settings_R: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        logits_RV = logits_RV.astype(jnp.float32)
        max_logit_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
        # This is the argmax. On a CPU jnp.argmax takes forty times as long as this line.
        best_R = jnp.min(jnp.where(logits_RV == max_logit_R1, jnp.arange(vocab, dtype=jnp.int32), vocab), axis=-1)
        log_mass_RV = logits_RV - max_logit_R1
        divisor = settings_R["temperature"][:, None] if "temperature" in settings_R else temperature
        log_mass_RV = log_mass_RV / divisor if samples else log_mass_RV
        # Unnormalised probabilities, of which the largest is 1.
        mass_RV = jnp.exp(log_mass_RV)
        if is_stored:
            mass_RV = jax.lax.optimization_barrier(mass_RV)
        if top_p is not None or top_k is not None:
            mass_RV = filters.keep_likely(mass_RV, settings_R.get("top_p", top_p), top_k)
        return _token_and_confidence(mass_RV, log_mass_RV, best_R, alg=alg, uniform_R=uniform_R)

    group_rows = _GROUP_ROWS.get(current_target().platform, rows)
    if rows < group_rows:
        # The rows are padded to a whole group, because a CPU sums one row in another order than several rows, and the
        # result of a row must not depend on the number of rows.
        pad = lambda x: jnp.pad(x, ((0, group_rows - rows), *[(0, 0)] * (x.ndim - 1)))
        pad_settings = functools.partial(jnp.pad, pad_width=(0, group_rows - rows), constant_values=1.0)
        token_R, confidence_R = choose_rows(
            pad(logits_RV),
            None if uniform_R is None else pad(uniform_R),
            {name: pad_settings(value) for name, value in settings_R.items()},
        )
        return token_R[:rows], confidence_R[:rows]
    if rows == group_rows:
        return choose_rows(logits_RV, uniform_R, settings_R)

    def choose_group(index: jax.Array, chosen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last slice overlaps the one before it if `group_rows` does not divide the rows; the results are the same.
        in_group = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * group_rows, slice_size=group_rows
        )
        token_R, confidence_R = choose_rows(
            in_group(logits_RV),
            None if uniform_R is None else in_group(uniform_R),
            {name: in_group(value) for name, value in settings_R.items()},
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * group_rows, axis=0)
        return put(chosen[0], token_R), put(chosen[1], confidence_R)

    empty = (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32))
    return jax.lax.fori_loop(0, -(-rows // group_rows), choose_group, empty)


def most_confident_first(
    confidence_BM: Float[jax.Array, "B M"], candidate_BM: Bool[jax.Array, "B M"]
) -> Int[jax.Array, "B M"]:
    """Returns the indices of each row, sorted: candidates first, then by falling confidence, then by index (int32)."""
    # Candidates come first even if their confidence is minus infinity. Otherwise they might never be written.
    return jnp.lexsort((-confidence_BM, ~candidate_BM), axis=-1).astype(jnp.int32)


def commit(
    order_BM: Int[jax.Array, "B M"], candidate_BM: Bool[jax.Array, "B M"], count_B: Int[jax.Array, "B"]
) -> Bool[jax.Array, "B M"]:
    """Returns bool [B, M], true at the first `count_B` candidates of each row in the order of `most_confident_first`."""
    rank_BM = jnp.argsort(order_BM, axis=-1)
    return candidate_BM & (rank_BM < count_B[:, None])


def _token_and_confidence(
    mass_RV: Float[jax.Array, "R V"],
    log_mass_RV: Float[jax.Array, "R V"],
    best_R: Int[jax.Array, "R"],
    *,
    alg: Alg,
    uniform_R: Float[jax.Array, "R"] | None,
) -> tuple[Int[jax.Array, "R"], Float[jax.Array, "R"]]:
    """Returns the token and the confidence of each row, as `choose_tokens`.

    Args:
      mass_RV: unnormalised probabilities, of which the largest in a row is 1; 0 at tokens that a filter removed.
      log_mass_RV: logarithms of the unnormalised probabilities before the filters.
      best_R: the most probable token of each row.
      alg: the name of the confidence.
      uniform_R: random numbers in [0, 1) to sample with; None chooses the most probable token.
    """
    mass = sums.in_blocks(mass_RV)
    total_R = mass.total()
    if uniform_R is None:
        token_R, chosen_R = best_R, jnp.ones_like(total_R)
    else:
        token_R = sums.first_exceeding(mass, uniform_R * total_R)
        chosen_R = jnp.take_along_axis(mass_RV, token_R[:, None], axis=-1)[:, 0]
    if alg == "entropy":
        return token_R, _negative_entropy(mass_RV, log_mass_RV, total_R)
    if alg == "topk_margin":
        rest_RV = jnp.where(jnp.arange(mass_RV.shape[-1]) == best_R[:, None], 0.0, mass_RV)
        return token_R, (1.0 - jnp.max(rest_RV, axis=-1)) / total_R
    return token_R, chosen_R / total_R


def _negative_entropy(
    mass_RV: Float[jax.Array, "R V"], log_mass_RV: Float[jax.Array, "R V"], total_R: Float[jax.Array, "R"]
) -> Float[jax.Array, "R"]:
    """Returns sum p log(p + epsilon) of each row, where p are the normalised probabilities.

    A term is computed as p log p + p log(1 + epsilon / p), because log p is already known. The second part is
    approximated by epsilon p / (p + epsilon); the error is below 1e-11 per token.
    """
    epsilon_R1 = _ENTROPY_EPSILON * total_R[:, None]
    epsilon_term_RV = epsilon_R1 * mass_RV / (mass_RV + epsilon_R1)
    # With `where` outermost, XLA on a CPU computes the terms before it sums them. This is five times faster than
    # computing them inside the sum.
    sum_R = jnp.sum(jnp.where(mass_RV > 0.0, mass_RV * log_mass_RV + epsilon_term_RV, 0.0), axis=-1)
    return sum_R / total_R - jnp.log(total_R)
