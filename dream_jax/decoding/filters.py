"""The filters top_p and top_k without a sort: a search finds the threshold above which tokens are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.decoding import sums
from dream_jax.target import current_target

# Number of thresholds that one pass over the vocabulary tries. On a CPU each threshold takes time. On other devices a
# pass is limited by reading the probabilities, so several thresholds take the same time as one.
_PROBES = {"cpu": 1}
_DEFAULT_PROBES = 15

# With one threshold per pass, this many first passes guess it by interpolation. After them, few tokens or many equal
# tokens are left between the bounds, and bisection is used.
_GUESSED_PASSES = 14
# If the same bound has not moved for this number of passes, the next pass bisects the interval.
_MOST_STAYS = 4
# A share of the total of a row is clipped to [_LEAST_SHARE, 1 - _LEAST_SHARE] before its log odds are computed.
_LEAST_SHARE = 1e-6
_TINY = 1e-30  # lower bound of denominators, so that nothing is divided by 0


def keep_likely(
    mass_RV: Float[jax.Array, "R V"], top_p: float | jax.Array | None, top_k: int | None
) -> Float[jax.Array, "R V"]:
    """Returns the masses (unnormalised probabilities), with 0 at the tokens that top_p and top_k remove.

    top_p keeps a token if the sum of all larger masses is at most top_p times the sum of the row. top_k keeps a token
    if fewer than k masses are larger. If tokens at the edge have equal masses (in float32), top_p keeps the lowest ids
    of them, and top_k keeps all of them.

    Args:
      mass_RV: unnormalised probabilities in [0, 1]; the largest of each row is 1.
      top_p: share of the probability to keep, in (0, 1]; None keeps all tokens.
      top_k: number of tokens to keep, at least 1; None keeps all tokens.
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
    """The edge between the kept and the removed tokens of each row, in the order of falling mass.

    The tokens with low < mass <= high have equal masses, and the first of them is kept. The "amount" of some tokens is
    their mass for top_p, and their number for top_k. Tokens are kept up to a limit of the amount.

    Attributes:
      low_R: a mass; the amount of the tokens with larger masses is above the limit. Or it is 0.
      high_R: a mass; the amount of the tokens with larger masses is at most the limit.
      below_R: the amount of the tokens with masses above low, or an upper bound of it.
      above_R: the amount of the tokens with masses above high.
    """

    low_R: Float[jax.Array, "R"]
    high_R: Float[jax.Array, "R"]
    below_R: Float[jax.Array, "R"]
    above_R: Float[jax.Array, "R"]


class _Search(NamedTuple):
    """The state of the search for the edge of each row.

    The bounds low and high are the bits of nonnegative floats, as integers. These have the same order as the floats.

    Attributes:
      low_R, high_R, below_R, above_R: as in `_Edge`.
      low_gap_R, high_gap_R: log odds at the bounds minus the wanted log odds; negative at low, at least 0 at high.
      stays_R: number of passes in which one bound has not moved: positive for high, negative for low.
      passes_R: number of passes so far.
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
    """Finds the edge by moving two bounds towards it. The choice of thresholds changes the speed, not the result.

    Several thresholds per pass divide the interval evenly. A single threshold is guessed by regula falsi, with the
    Illinois rule for a bound that does not move. It interpolates the log odds of the amount above a threshold, which
    are nearly linear in the logarithm of the mass, and so in its bits. For a nucleus of 40,000 tokens it takes about 10
    passes, and bisection takes 22.

    Args:
      mass_RV: unnormalised probabilities in [0, 1].
      amount: returns the amount of the tokens that are marked by true. It must not decrease if more are marked.
      limit_R: maximum amount of the tokens above the edge.
      total_R: amount of all tokens of a row.
      unit: amount of one token; None means that it is the mass of the token.
    """
    probes = _PROBES.get(current_target().platform, _DEFAULT_PROBES)
    step_K = jnp.arange(1, probes + 1, dtype=jnp.int32)

    def log_odds(above_R: jax.Array) -> jax.Array:
        share_R = jnp.clip(above_R / total_R, _LEAST_SHARE, 1.0 - _LEAST_SHARE)
        return jnp.log1p(-share_R) - jnp.log(share_R)

    wanted_R = log_odds(limit_R)

    def one(search: _Search) -> jax.Array:
        """Returns a lower bound of the amount of one token between the bounds."""
        return _as_float(search.low_R) if unit is None else jnp.full_like(total_R, unit)

    def unsettled(search: _Search) -> jax.Array:
        # If the amount between the bounds is less than 1.5 times that of one token, only one token is left there.
        return (search.low_R + 1 < search.high_R) & (search.below_R - search.above_R >= 1.5 * one(search))

    def guess(search: _Search) -> Float[jax.Array, "R"]:
        """Returns where linear interpolation expects the edge: 0 is low, 1 is high."""
        share_R = -search.low_gap_R / jnp.maximum(search.high_gap_R - search.low_gap_R, _TINY)
        # The guess keeps the likely distance of one token from each bound: a nearer threshold would separate no token.
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
        # The amount above a threshold falls as the threshold rises. So the smallest amount that is over the limit is
        # that of the largest such threshold, which is low.
        below_R = jnp.min(jnp.where(within_RK, search.below_R[:, None], amount_RK), axis=-1)
        below_R = jnp.minimum(search.below_R, below_R)
        above_R = jnp.maximum(search.above_R, jnp.max(jnp.where(within_RK, amount_RK, 0.0), axis=-1))
        low_moved_R, high_moved_R = low_R > search.low_R, high_R < search.high_R
        # Illinois rule: if a bound does not move twice in a row, its gap is halved, so that the next guess is nearer to it.
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
        # A row whose search is finished does not change while the search of other rows continues.
        return jax.tree.map(functools.partial(jnp.where, unsettled(search)), narrowed, search)

    zero_R = jnp.zeros_like(total_R)
    low_R = zero_R
    if unit is None:
        # All tokens with at most this mass have together at most half of the mass that top_p removes, so the edge is
        # above this mass.
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
    """Returns the float32 numbers that have these int32 bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _last_of_equals(
    mass_RV: Float[jax.Array, "R V"], edge: _Edge, limit_R: Float[jax.Array, "R"]
) -> Int[jax.Array, "R"]:
    """Returns the highest token id that top_p keeps among the equal masses at the edge, as after a stable sort."""
    fit_R = jnp.floor((limit_R - edge.above_R) / edge.high_R) + 1.0
    # The number of tokens between the bounds, or an upper bound of it, computed from their mass. It is rounded, so that
    # one token does not count as two.
    count_R = jnp.round((edge.below_R - edge.above_R) / edge.high_R)

    def by_id() -> Int[jax.Array, "R"]:
        tied_RV = (mass_RV > edge.low_R[:, None]) & (mass_RV <= edge.high_R[:, None])
        last_R = sums.first_exceeding(sums.in_blocks(tied_RV.astype(jnp.float32)), fit_R - 1.0)
        # A row in which all equal tokens fit keeps all of them, even if another row needs this computation.
        return jnp.where(count_R > fit_R, last_R, all_R)

    all_R = jnp.full(fit_R.shape, mass_RV.shape[1], jnp.int32)
    return jax.lax.cond(jnp.any(count_R > fit_R), by_id, lambda: all_R)
