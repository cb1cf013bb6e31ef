"""top_p and top_k without a sort: what they keep lies above a threshold, which is searched for.

Knows unnormalised probabilities. Knows nothing of confidences or samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.decoding import sums
from dream_jax.target import current_target

# Thresholds that one pass over the vocabulary tries. A CPU pays for each; elsewhere a pass costs what reading it costs.
_PROBES = {"cpu": 1}
_PROBES_ELSEWHERE = 15

# Passes with one threshold that are led by a guess. By then few tokens are left between the bounds, or many equal ones,
# which no guess tells apart.
_GUESSED_PASSES = 14
# Where the same bound has stayed so often in a row, the next pass halves what is left.
_MOST_STAYS = 4
# Shares of a row's amount below this are not told from nothing, nor from all.
_LEAST_SHARE = 1e-6
_NOTHING = 1e-30  # in place of 0 below a fraction


def keep_likely(
    mass_RV: Float[jax.Array, "R V"], top_p: float | jax.Array | None, top_k: int | None
) -> Float[jax.Array, "R V"]:
    """The masses, with 0 at the tokens that top_p and top_k remove.

    A token is in the nucleus when the mass strictly above it is at most top_p, and in the top k when fewer than k tokens
    are strictly above it. Both sets are prefixes of the sorted row, so their intersection is the higher threshold.
    Tokens are equal where their masses are, in float32; of equal ones at the edge of the nucleus those of lowest id are
    kept, at the edge of the top k all.

    Args:
      mass_RV: unnormalised probabilities in [0, 1], the largest of each row 1.
      top_p: in (0, 1], None to switch off.
      top_k: at least 1, None to switch off.
    """
    keep_RV = mass_RV > 0.0
    if top_p is not None:
        whole_R = jnp.sum(mass_RV, axis=-1)
        limit_R = top_p * whole_R
        amount = lambda above_RKV: jnp.sum(jnp.where(above_RKV, mass_RV[:, None], 0.0), axis=-1)
        edge = _edge(mass_RV, amount, limit_R, whole_R, unit=None)
        last_R = _last_of_equals(mass_RV, edge, limit_R)
        surely_RV = mass_RV > edge.high_R[:, None]
        keep_RV &= surely_RV | ((mass_RV > edge.low_R[:, None]) & (jnp.arange(mass_RV.shape[1]) <= last_R[:, None]))
    if top_k is not None:
        amount = lambda above_RKV: jnp.sum(above_RKV.astype(jnp.float32), axis=-1)
        limit_R = jnp.full(mass_RV.shape[:1], top_k - 1.0)
        edge = _edge(mass_RV, amount, limit_R, jnp.full(mass_RV.shape[:1], float(mass_RV.shape[1])), unit=1.0)
        keep_RV &= mass_RV > edge.low_R[:, None]
    return jnp.where(keep_RV, mass_RV, 0.0)


class _Edge(NamedTuple):
    """Where a row is cut: of the tokens with low < mass <= high, which are equal or only one, the first is the last kept.

    Attributes:
      low_R: the amount strictly above it is more than the limit, or it is 0.
      high_R: the amount strictly above it is within the limit.
      below_R: the amount strictly above low, or more.
      above_R: the amount strictly above high.
    """

    low_R: Float[jax.Array, "R"]
    high_R: Float[jax.Array, "R"]
    below_R: Float[jax.Array, "R"]
    above_R: Float[jax.Array, "R"]


class _Search(NamedTuple):
    """An edge that is being searched for. Masses are the bits of floats from 0 on: as integers, in the floats' order.

    Attributes:
      low_R, high_R, below_R, above_R: as of `_Edge`.
      low_gap_R, high_gap_R: how far the odds at the bounds are from those wanted, below 0 and from 0 on.
      stays_R: passes after which the same bound has stayed: above 0 for high, below 0 for low.
      passes_R: made so far.
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
    whole_R: Float[jax.Array, "R"],
    *,
    unit: float | None,
) -> _Edge:
    """Narrows two bounds around the edge, whatever the thresholds that are tried: they only say how fast.

    Several thresholds a pass divide what is left evenly. A single one is guessed by regula falsi (with the Illinois rule
    for a bound that stays) on the logarithm of the odds of lying above, which is close to a straight line in the
    logarithm of the mass, and so in its bits: about 10 passes for a nucleus of 40,000 tokens, where halving takes 22.

    Args:
      mass_RV: what is cut.
      amount: of the tokens marked; does not fall as more are marked.
      limit_R: what the tokens strictly above the edge amount to at most.
      whole_R: what all tokens amount to.
      unit: what one token amounts to; None: its mass.
    """
    probes = _PROBES.get(current_target().platform, _PROBES_ELSEWHERE)
    part_K = jnp.arange(1, probes + 1, dtype=jnp.int32)

    def log_odds(above_R: jax.Array) -> jax.Array:
        share_R = jnp.clip(above_R / whole_R, _LEAST_SHARE, 1.0 - _LEAST_SHARE)
        return jnp.log1p(-share_R) - jnp.log(share_R)

    wanted_R = log_odds(limit_R)

    def one(search: _Search) -> jax.Array:
        """The least that a token between the bounds amounts to."""
        return _as_float(search.low_R) if unit is None else jnp.full_like(whole_R, unit)

    def unsettled(search: _Search) -> jax.Array:
        # With less than one and a half of the smallest that a token in between can be, there is one token.
        return (search.low_R + 1 < search.high_R) & (search.below_R - search.above_R >= 1.5 * one(search))

    def guess(search: _Search) -> Float[jax.Array, "R"]:
        """Where between the bounds the edge would be if the odds' logarithm were a straight line in the bits."""
        share_R = -search.low_gap_R / jnp.maximum(search.high_gap_R - search.low_gap_R, _NOTHING)
        # No nearer to a bound than the next token is likely to be: short of it, nothing is learned.
        token_R = one(search) / jnp.maximum(search.below_R - search.above_R, _NOTHING)
        return jnp.clip(share_R, jnp.minimum(token_R, 0.5), 1.0 - jnp.minimum(token_R, 0.5))

    def tried(search: _Search) -> Int[jax.Array, "R K"]:
        width_R = search.high_R - search.low_R
        width_R1 = width_R[:, None]
        step_RK = width_R1 // (probes + 1) * part_K + width_R1 % (probes + 1) * part_K // (probes + 1)
        if probes == 1:
            guessed_R = jnp.clip((guess(search) * width_R.astype(jnp.float32)).astype(jnp.int32), 1, width_R - 1)
            led_R = (search.passes_R < _GUESSED_PASSES) & ((search.stays_R == 0) | (search.stays_R % _MOST_STAYS != 0))
            step_RK = jnp.where(led_R, guessed_R, step_RK[:, 0])[:, None]
        return search.low_R[:, None] + step_RK

    def narrow(search: _Search) -> _Search:
        probe_RK = tried(search)
        amount_RK = amount(mass_RV[:, None] > _as_float(probe_RK)[:, :, None])
        within_RK = amount_RK <= limit_R[:, None]
        low_R = jnp.maximum(search.low_R, jnp.max(jnp.where(within_RK, 0, probe_RK), axis=-1))
        high_R = jnp.minimum(search.high_R, jnp.min(jnp.where(within_RK, probe_RK, search.high_R[:, None]), axis=-1))
        # What lies above a threshold is more the lower it is, so the least of what is too much belongs to the highest.
        below_R = jnp.min(jnp.where(within_RK, search.below_R[:, None], amount_RK), axis=-1)
        below_R = jnp.minimum(search.below_R, below_R)
        above_R = jnp.maximum(search.above_R, jnp.max(jnp.where(within_RK, amount_RK, 0.0), axis=-1))
        rose_R, fell_R = low_R > search.low_R, high_R < search.high_R
        # Illinois: the gap of a bound that stays a second time is halved, so that the next guess moves towards it.
        low_gap_R = jnp.where(search.stays_R < 0, 0.5, 1.0) * search.low_gap_R
        high_gap_R = jnp.where(search.stays_R > 0, 0.5, 1.0) * search.high_gap_R
        narrowed = _Search(
            low_R=low_R,
            high_R=high_R,
            below_R=below_R,
            above_R=above_R,
            low_gap_R=jnp.where(rose_R, log_odds(below_R) - wanted_R, low_gap_R),
            high_gap_R=jnp.where(fell_R, log_odds(above_R) - wanted_R, high_gap_R),
            stays_R=jnp.where(rose_R, jnp.maximum(search.stays_R, 0) + 1, jnp.minimum(search.stays_R, 0) - 1),
            passes_R=search.passes_R + 1,
        )
        # A row that is settled stays as it is, however long the others take.
        return jax.tree.map(functools.partial(jnp.where, unsettled(search)), narrowed, search)

    nothing_R = jnp.zeros_like(whole_R)
    low_R = nothing_R
    if unit is None:
        # Were all tokens of so little mass, they would not be half of what is to be removed.
        removed_R = whole_R - limit_R
        low_R = jnp.where(removed_R > 1e-3 * whole_R, removed_R / (2 * mass_RV.shape[1]), 0.0)
    start = _Search(
        low_R=jax.lax.bitcast_convert_type(low_R, jnp.int32),
        high_R=jax.lax.bitcast_convert_type(jnp.ones_like(whole_R), jnp.int32),
        below_R=whole_R,
        above_R=nothing_R,
        low_gap_R=log_odds((limit_R + whole_R) / 2) - wanted_R,
        high_gap_R=log_odds(jnp.ones_like(whole_R)) - wanted_R,
        stays_R=nothing_R.astype(jnp.int32),
        passes_R=nothing_R.astype(jnp.int32),
    )
    found = jax.lax.while_loop(lambda search: jnp.any(unsettled(search)), narrow, start)
    return _Edge(_as_float(found.low_R), _as_float(found.high_R), found.below_R, found.above_R)


def _as_float(bits: Int[jax.Array, "*b"]) -> Float[jax.Array, "*b"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _last_of_equals(
    mass_RV: Float[jax.Array, "R V"], edge: _Edge, limit_R: Float[jax.Array, "R"]
) -> Int[jax.Array, "R"]:
    """Of equal tokens at the edge of the nucleus, a sort keeps only as many as fit: the id of the last that does."""
    fit_R = jnp.floor((limit_R - edge.above_R) / edge.high_R) + 1.0
    # As many as their mass says, or more, and a rounding of it must not find two in one.
    count_R = jnp.round((edge.below_R - edge.above_R) / edge.high_R)

    def by_id() -> Int[jax.Array, "R"]:
        tied_RV = (mass_RV > edge.low_R[:, None]) & (mass_RV <= edge.high_R[:, None])
        last_R = sums.passing(sums.by_block(tied_RV.astype(jnp.float32)), fit_R - 1.0)
        # Also where another row is why this is done at all.
        return jnp.where(count_R > fit_R, last_R, all_R)

    all_R = jnp.full(fit_R.shape, mass_RV.shape[1], jnp.int32)
    return jax.lax.cond(jnp.any(count_R > fit_R), by_id, lambda: all_R)
