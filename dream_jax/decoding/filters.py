"""top_p and top_k without a sort: the tokens that they keep are above a threshold, which is found by a search."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.decoding import sums
from dream_jax.target import current_target

# Thresholds that one pass over the vocabulary tries. On a CPU each costs time; on other devices a pass is limited by
# reading the vocabulary, so several thresholds cost the same as one.
_PROBES = {"cpu": 1}
_DEFAULT_PROBES = 15

# With one threshold per pass, the first passes guess it by interpolation. After these, few tokens are left between the
# bounds, or many equal ones, and bisection is used.
_GUESSED_PASSES = 14
# When the same bound has not moved for this many passes, the next pass bisects.
_MOST_STAYS = 4
# Shares of a row's total are clipped to [_LEAST_SHARE, 1 - _LEAST_SHARE] before their log odds are taken.
_LEAST_SHARE = 1e-6
_TINY = 1e-30  # avoids division by 0


def keep_likely(
    mass_RV: Float[jax.Array, "R V"], top_p: float | jax.Array | None, top_k: int | None
) -> Float[jax.Array, "R V"]:
    """Returns the masses, with 0 at the tokens that top_p and top_k remove.

    A token is in the nucleus when the sum of all larger masses is at most top_p of the row's sum, and in the top k when
    fewer than k masses are larger. Both sets are prefixes of the sorted row. Of equal masses (in float32) at the edge
    of the nucleus those of lowest token id are kept; at the edge of the top k all are kept.

    Args:
      mass_RV: unnormalised probabilities in [0, 1], the largest of each row 1.
      top_p: in (0, 1], None to switch off.
      top_k: at least 1, None to switch off.
    """
    keep_RV = mass_RV > 0.0
    if top_p is not None:
        total_R = jnp.sum(mass_RV, axis=-1)
        limit_R = top_p * total_R
        amount = lambda above_RKV: jnp.sum(jnp.where(above_RKV, mass_RV[:, None], 0.0), axis=-1)
        edge = _edge(mass_RV, amount, limit_R, total_R, unit=None)
        last_R = _last_of_equals(mass_RV, edge, limit_R)
        above_RV = mass_RV > edge.high_R[:, None]
        keep_RV &= above_RV | ((mass_RV > edge.low_R[:, None]) & (jnp.arange(mass_RV.shape[1]) <= last_R[:, None]))
    if top_k is not None:
        amount = lambda above_RKV: jnp.sum(above_RKV.astype(jnp.float32), axis=-1)
        limit_R = jnp.full(mass_RV.shape[:1], top_k - 1.0)
        edge = _edge(mass_RV, amount, limit_R, jnp.full(mass_RV.shape[:1], float(mass_RV.shape[1])), unit=1.0)
        keep_RV &= mass_RV > edge.low_R[:, None]
    return jnp.where(keep_RV, mass_RV, 0.0)


class _Edge(NamedTuple):
    """Where a sorted row is cut. Tokens with low < mass <= high have equal mass, and the first of them is kept.

    "Amount" is what the limit counts: the mass for top_p, the number of tokens for top_k.

    Attributes:
      low_R: the amount of the tokens above it is more than the limit; or it is 0.
      high_R: the amount of the tokens above it is within the limit.
      below_R: an upper bound of the amount of the tokens above low.
      above_R: the amount of the tokens above high.
    """

    low_R: Float[jax.Array, "R"]
    high_R: Float[jax.Array, "R"]
    below_R: Float[jax.Array, "R"]
    above_R: Float[jax.Array, "R"]


class _Search(NamedTuple):
    """The state of the search for an edge.

    Bounds on the mass are the bits of nonnegative floats as integers, which have the same order as the floats.

    Attributes:
      low_R, high_R, below_R, above_R: as in `_Edge`.
      low_gap_R, high_gap_R: log odds at the bounds minus the wanted log odds; negative at low, at least 0 at high.
      stays_R: number of passes since a bound moved: positive if it is high, negative if it is low.
      passes_R: passes made so far.
    """

    low_R: Int[jax.Array, "R"]
    high_R: Int[jax.Array, "R"]
    below_R: Float[jax.Array, "R"]
    above_R: Float[jax.Array, "R"]
    low_gap_R: Float[jax.Array, "R"]
    high_gap_R: Float[jax.Array, "R"]
    stays_R: Int[jax.Array, "R"]
    passes_R: Int[jax.Array, "R"]


def _edge(
    mass_RV: Float[jax.Array, "R V"],
    amount: Callable[[Bool[jax.Array, "R K V"]], Float[jax.Array, "R K"]],
    limit_R: Float[jax.Array, "R"],
    total_R: Float[jax.Array, "R"],
    *,
    unit: float | None,
) -> _Edge:
    """Finds the edge by narrowing two bounds around it. The choice of thresholds changes the speed, not the result.

    Several thresholds per pass divide the interval evenly. A single threshold is guessed by regula falsi, with the
    Illinois rule for a bound that does not move. It interpolates the log odds of the amount above a threshold, which
    are
    nearly linear in the logarithm of the mass, and so in its bits: about 10 passes for a nucleus of 40,000 tokens,
      where
    bisection takes 22.

    Args:
      mass_RV: unnormalised probabilities in [0, 1].
      amount: the amount of the marked tokens; must not decrease when more are marked.
      limit_R: largest amount of the tokens above the edge.
      total_R: amount of all tokens.
      unit: amount of one token; None means its mass.
    """
    probes = _PROBES.get(current_target().platform, _DEFAULT_PROBES)
    step_K = jnp.arange(1, probes + 1, dtype=jnp.int32)

    def log_odds(above_R: jax.Array) -> jax.Array:
        share_R = jnp.clip(above_R / total_R, _LEAST_SHARE, 1.0 - _LEAST_SHARE)
        return jnp.log1p(-share_R) - jnp.log(share_R)

    wanted_R = log_odds(limit_R)

    def one(search: _Search) -> jax.Array:
        """The least amount of a token between the bounds."""
        return _as_float(search.low_R) if unit is None else jnp.full_like(total_R, unit)

    def unsettled(search: _Search) -> jax.Array:
        # Less than 1.5 times the least amount of a token means that only one token is left between the bounds.
        return (search.low_R + 1 < search.high_R) & (search.below_R - search.above_R >= 1.5 * one(search))

    def guess(search: _Search) -> Float[jax.Array, "R"]:
        """The share of the way from low to high at which linear interpolation expects the edge."""
        share_R = -search.low_gap_R / jnp.maximum(search.high_gap_R - search.low_gap_R, _TINY)
        # At least as far from each bound as the next token is likely to be: a nearer threshold would separate no token.
        token_R = one(search) / jnp.maximum(search.below_R - search.above_R, _TINY)
        return jnp.clip(share_R, jnp.minimum(token_R, 0.5), 1.0 - jnp.minimum(token_R, 0.5))

    def thresholds(search: _Search) -> Int[jax.Array, "R K"]:
        width_R = search.high_R - search.low_R
        width_R1 = width_R[:, None]
        step_RK = width_R1 // (probes + 1) * step_K + width_R1 % (probes + 1) * step_K // (probes + 1)
        if probes == 1:
            guessed_R = jnp.clip((guess(search) * width_R.astype(jnp.float32)).astype(jnp.int32), 1, width_R - 1)
            stays_R = search.stays_R
            use_guess_R = (search.passes_R < _GUESSED_PASSES) & ((stays_R == 0) | (stays_R % _MOST_STAYS != 0))
            step_RK = jnp.where(use_guess_R, guessed_R, step_RK[:, 0])[:, None]
        return search.low_R[:, None] + step_RK

    def narrow(search: _Search) -> _Search:
        probe_RK = thresholds(search)
        amount_RK = amount(mass_RV[:, None] > _as_float(probe_RK)[:, :, None])
        within_RK = amount_RK <= limit_R[:, None]
        low_R = jnp.maximum(search.low_R, jnp.max(jnp.where(within_RK, 0, probe_RK), axis=-1))
        high_R = jnp.minimum(search.high_R, jnp.min(jnp.where(within_RK, probe_RK, search.high_R[:, None]), axis=-1))
        # The amount above a threshold falls as the threshold rises, so the smallest amount over the limit belongs to
        # low.
        below_R = jnp.min(jnp.where(within_RK, search.below_R[:, None], amount_RK), axis=-1)
        below_R = jnp.minimum(search.below_R, below_R)
        above_R = jnp.maximum(search.above_R, jnp.max(jnp.where(within_RK, amount_RK, 0.0), axis=-1))
        low_moved_R, high_moved_R = low_R > search.low_R, high_R < search.high_R
        # Illinois rule: the gap of a bound that has not moved twice is halved, so that the next guess is nearer to it.
        low_gap_R = jnp.where(search.stays_R < 0, 0.5, 1.0) * search.low_gap_R
        high_gap_R = jnp.where(search.stays_R > 0, 0.5, 1.0) * search.high_gap_R
        narrowed = _Search(
            low_R=low_R,
            high_R=high_R,
            below_R=below_R,
            above_R=above_R,
            low_gap_R=jnp.where(low_moved_R, log_odds(below_R) - wanted_R, low_gap_R),
            high_gap_R=jnp.where(high_moved_R, log_odds(above_R) - wanted_R, high_gap_R),
            stays_R=jnp.where(low_moved_R, jnp.maximum(search.stays_R, 0) + 1, jnp.minimum(search.stays_R, 0) - 1),
            passes_R=search.passes_R + 1,
        )
        # A settled row does not change while the others continue.
        return jax.tree.map(functools.partial(jnp.where, unsettled(search)), narrowed, search)

    zero_R = jnp.zeros_like(total_R)
    low_R = zero_R
    if unit is None:
        # Tokens of at most this mass are together at most half of what top_p removes, so the edge is above it.
        removed_R = total_R - limit_R
        low_R = jnp.where(removed_R > 1e-3 * total_R, removed_R / (2 * mass_RV.shape[1]), 0.0)
    start = _Search(
        low_R=jax.lax.bitcast_convert_type(low_R, jnp.int32),
        high_R=jax.lax.bitcast_convert_type(jnp.ones_like(total_R), jnp.int32),
        below_R=total_R,
        above_R=zero_R,
        low_gap_R=log_odds((limit_R + total_R) / 2) - wanted_R,
        high_gap_R=log_odds(jnp.ones_like(total_R)) - wanted_R,
        stays_R=zero_R.astype(jnp.int32),
        passes_R=zero_R.astype(jnp.int32),
    )
    found = jax.lax.while_loop(lambda search: jnp.any(unsettled(search)), narrow, start)
    return _Edge(_as_float(found.low_R), _as_float(found.high_R), found.below_R, found.above_R)


def _as_float(bits: Int[jax.Array, "*b"]) -> Float[jax.Array, "*b"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _last_of_equals(
    mass_RV: Float[jax.Array, "R V"], edge: _Edge, limit_R: Float[jax.Array, "R"]
) -> Int[jax.Array, "R"]:
    """The highest token id that is kept among equal masses at the edge of the nucleus, as a stable sort would keep them."""
    fit_R = jnp.floor((limit_R - edge.above_R) / edge.high_R) + 1.0
    # The number of tokens between the bounds (or more), from their mass; rounded, so that one token is not counted as
    # two.
    count_R = jnp.round((edge.below_R - edge.above_R) / edge.high_R)

    def by_id() -> Int[jax.Array, "R"]:
        tied_RV = (mass_RV > edge.low_R[:, None]) & (mass_RV <= edge.high_R[:, None])
        last_R = sums.first_exceeding(sums.in_blocks(tied_RV.astype(jnp.float32)), fit_R - 1.0)
        # Rows in which all fit keep all, even if another row needs this computation.
        return jnp.where(count_R > fit_R, last_R, all_R)

    all_R = jnp.full(fit_R.shape, mass_RV.shape[1], jnp.int32)
    return jax.lax.cond(jnp.any(count_R > fit_R), by_id, lambda: all_R)
