"""From logits to decisions: which token each position would take, how sure that is, and which positions are written.

Knows rows of logits and confidences. Knows nothing of canvases, models or the clock. Nothing here sorts the vocabulary:
top_p and top_k look at the largest few, and where these do not settle it, at a threshold found by bisection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

Alg = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

# The published sampler adds it inside the logarithm of its entropy.
_ENTROPY_EPSILON = 1e-10

# Tokens of a row that are sorted. What does not end within them is found by bisection over the whole row.
_CANDIDATES = 512

# Tokens that share a block where the largest of a row are looked for.
_BLOCK = 16

# Rows that bisect the whole vocabulary together: few enough that their logits stay in a CPU's cache.
_FALLBACK_ROWS = 8


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
    z_RV = logits_RV.astype(jnp.float32)
    if samples:
        z_RV = z_RV / temperature
    decide = functools.partial(_decide, alg=alg, uniform_R=uniform_R if samples else None)
    vocab = z_RV.shape[-1]
    top_p = None if not isinstance(top_p, jax.Array) and (top_p is None or top_p >= 1.0) else top_p
    top_k = None if top_k is None or top_k >= vocab else top_k
    if top_p is None and top_k is None:
        peak_R1 = jnp.max(z_RV, axis=-1, keepdims=True)
        return decide(jnp.exp(z_RV - peak_R1))

    z_RV = jnp.where(z_RV == 0.0, 0.0, z_RV)  # -0.0 sorts below 0.0, but is no less probable
    # Almost always a few hundred tokens hold the nucleus, and then the rest of the row only counts by its sum.
    z_RC, token_RC = largest(z_RV, min(_CANDIDATES, vocab))
    mass_RV = jnp.exp(z_RV - z_RC[:, :1])  # unnormalised probabilities; the largest is 1
    mass_RC = jnp.exp(z_RC - z_RC[:, :1])
    keep_RC = jnp.ones(z_RC.shape, bool)
    if top_p is not None:
        above_RC = jnp.cumsum(mass_RC, axis=-1) - mass_RC
        keep_RC &= above_RC <= top_p * _sum(mass_RV)[:, None]
    if top_k is not None:
        keep_RC &= z_RC >= z_RC[:, min(top_k, z_RC.shape[-1]) - 1, None]
    place_R, confidence_R = decide(jnp.where(keep_RC, mass_RC, 0.0))
    token_R = jnp.take_along_axis(token_RC, place_R[:, None], axis=-1)[:, 0]
    if z_RC.shape[-1] == vocab:
        return token_R, confidence_R

    # Where even the last candidate is kept, the nucleus may go on: those rows, a few at a time, look at the whole
    # vocabulary.
    unsettled_R = keep_RC[:, -1]
    rows = z_RV.shape[0]
    group = min(rows, _FALLBACK_ROWS)
    order_R = jnp.pad(jnp.argsort(~unsettled_R, stable=True), (0, -rows % group), constant_values=rows)

    def settle(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index_E = jax.lax.dynamic_slice_in_dim(order_R, number * group, group)
        z_EV = jnp.take(z_RV, index_E, axis=0, mode="clip")
        mass_EV = jnp.exp(z_EV - jnp.max(z_EV, axis=-1, keepdims=True))
        uniform_E = None if uniform_R is None else jnp.take(uniform_R, index_E, mode="clip")
        token_E, confidence_E = _decide(
            _keep_nucleus(z_EV, mass_EV, top_p, top_k), alg=alg, uniform_R=uniform_E if samples else None
        )
        # A settled row may fill up the last group: it keeps its answer, whatever else is in the batch.
        place_E = jnp.where(jnp.take(unsettled_R, index_E, mode="clip") & (index_E < rows), index_E, rows)
        return found[0].at[place_E].set(token_E, mode="drop"), found[1].at[place_E].set(confidence_E, mode="drop")

    groups = (jnp.sum(unsettled_R, dtype=jnp.int32) + group - 1) // group
    return jax.lax.fori_loop(0, groups, settle, (token_R, confidence_R))


def largest(z_RV: Float[jax.Array, "R V"], count: int) -> tuple[Float[jax.Array, "R C"], Int[jax.Array, "R C"]]:
    """The `count` largest values of each row, falling, and where they stand; of equals the first ones. As `lax.top_k`.

    In two steps, which on a CPU take a fraction of its time for a whole vocabulary: the `count` blocks with the largest
    maxima, and then the largest values in these. A value among the largest cannot lie elsewhere: `count` blocks that come
    before its own, by their maximum or, of equal maxima, by their place, would each hold a value that comes before it.
    """
    rows, vocab = z_RV.shape
    # The barriers: XLA would turn a top_k, once its first column is taken on its own, into a sort of everything (540 ms
    # instead of 11 ms for 16 rows of 152,064 on a CPU).
    top = lambda x, count: tuple(jax.lax.optimization_barrier(jax.lax.top_k(x, count)))
    if vocab <= 2 * count * _BLOCK:
        return top(z_RV, count)
    # What fills up the last block comes after everything else: it has the lowest value and the last place.
    z_RGW = jnp.pad(z_RV, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
    block_RC = jnp.sort(top(jnp.max(z_RGW, axis=-1), count)[1], axis=-1)  # in the order of their places
    among_RCW = jnp.take_along_axis(z_RGW, block_RC[:, :, None], axis=1)
    z_RC, place_RC = top(among_RCW.reshape(rows, -1), count)
    return z_RC, jnp.take_along_axis(block_RC, place_RC // _BLOCK, axis=1) * _BLOCK + place_RC % _BLOCK


def _decide(
    mass_RV: Float[jax.Array, "R V"], *, alg: Alg, uniform_R: Float[jax.Array, "R"] | None
) -> tuple[Int[jax.Array, "R"], Float[jax.Array, "R"]]:
    """Index and confidence of each row's choice, from unnormalised probabilities: 0 where removed, the largest 1."""
    total_R = _sum(mass_RV)
    best_R = jnp.argmax(mass_RV, axis=-1).astype(jnp.int32)
    if uniform_R is None:
        token_R, chosen_R = best_R, jnp.ones_like(total_R)
    else:
        token_R = _inverse_cdf(mass_RV, uniform_R * total_R)
        chosen_R = jnp.take_along_axis(mass_RV, token_R[:, None], axis=-1)[:, 0]
    if alg == "entropy":
        p_RV = mass_RV / total_R[:, None]
        return token_R, _sum(p_RV * jnp.log(p_RV + _ENTROPY_EPSILON))
    if alg == "topk_margin":
        rest_RV = jnp.where(jnp.arange(mass_RV.shape[-1]) == best_R[:, None], 0.0, mass_RV)
        return token_R, (1.0 - jnp.max(rest_RV, axis=-1)) / total_R
    return token_R, chosen_R / total_R


def _keep_nucleus(
    z_RV: Float[jax.Array, "R V"], mass_RV: Float[jax.Array, "R V"], top_p: float | jax.Array | None, top_k: int | None
) -> Float[jax.Array, "R V"]:
    """`mass_RV` with 0 at the tokens that top_p and top_k remove.

    A token is in the nucleus when the mass strictly above it is at most top_p, and in the top k when fewer than k tokens
    are strictly above it. Both sets are prefixes of the sorted row, so their intersection is the higher threshold.
    """
    order_RV = _sortable(z_RV)
    keep_RV = jnp.ones(z_RV.shape, bool)
    if top_p is not None:
        limit_R = top_p * _sum(mass_RV)
        floor_R = _lowest_key(lambda key_R: _sum(jnp.where(order_RV > key_R[:, None], mass_RV, 0.0)) <= limit_R, z_RV)
        keep_RV &= order_RV >= floor_R[:, None]
        keep_RV &= _break_ties(order_RV, mass_RV, keep_RV, limit_R)
    if top_k is not None:
        floor_R = _lowest_key(lambda key_R: _sum(order_RV > key_R[:, None]) < top_k, z_RV)
        keep_RV &= order_RV >= floor_R[:, None]
    return jnp.where(keep_RV, mass_RV, 0.0)


def _break_ties(
    order_RV: Int[jax.Array, "R V"],
    mass_RV: Float[jax.Array, "R V"],
    keep_RV: Bool[jax.Array, "R V"],
    limit_R: Float[jax.Array, "R"],
) -> Bool[jax.Array, "R V"]:
    """Of equal tokens at the edge of the nucleus, a sort keeps only as many as fit; keep those of lowest id."""
    edge_R1 = jnp.min(jnp.where(keep_RV, order_RV, jnp.iinfo(jnp.int32).max), axis=-1, keepdims=True)
    tied_RV = keep_RV & (order_RV == edge_R1)
    above_R = _sum(jnp.where(keep_RV & ~tied_RV, mass_RV, 0.0))
    one_R = jnp.max(jnp.where(tied_RV, mass_RV, 0.0), axis=-1)
    fit_R = jnp.floor((limit_R - above_R) / one_R).astype(jnp.int32) + 1
    count_R = _sum(tied_RV)

    def by_id() -> Bool[jax.Array, "R V"]:
        rank_RV = jnp.cumsum(tied_RV, axis=-1, dtype=jnp.int32) - 1
        return ~tied_RV | (rank_RV < fit_R[:, None])

    return jax.lax.cond(jnp.any(count_R > fit_R), by_id, lambda: jnp.ones_like(tied_RV))


def _sortable(x: Float[jax.Array, "R V"]) -> Int[jax.Array, "R V"]:
    """int32 keys in the order of float32 values (-0.0 must have become 0.0)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _lowest_key(
    accepts: Callable[[Int[jax.Array, "R"]], Bool[jax.Array, "R"]], z_RV: Float[jax.Array, "R V"]
) -> Int[jax.Array, "R"]:
    """The lowest sortable key that a monotone predicate accepts, a row; the row's highest key must be accepted."""
    finite_RV = jnp.isfinite(z_RV)
    low_R = _sortable(jnp.min(jnp.where(finite_RV, z_RV, jnp.inf), axis=-1, keepdims=True))[:, 0] - 1
    high_R = _sortable(jnp.max(z_RV, axis=-1, keepdims=True))[:, 0]

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_R, high_R = bounds
        middle_R = (low_R & high_R) + ((low_R ^ high_R) >> 1)  # floor of the mean, without overflow
        accepted_R = accepts(middle_R)
        return jnp.where(accepted_R, low_R, middle_R), jnp.where(accepted_R, middle_R, high_R)

    def unsettled(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        low_R, high_R = bounds
        return jnp.any(low_R + 1 < high_R)

    # Invariant: high is accepted; low is not, or lies below every token.
    return jax.lax.while_loop(unsettled, halve, (low_R, high_R))[1]


def _inverse_cdf(mass_RV: Float[jax.Array, "R V"], target_R: Float[jax.Array, "R"]) -> Int[jax.Array, "R"]:
    """The first token at which the running sum of the masses exceeds the target: an exact categorical sample.

    One random number a row instead of one a token. The running sum is taken in two levels (blocks, then inside one).
    """
    rows, vocab = mass_RV.shape
    width = 1 << ((vocab - 1).bit_length() + 1) // 2
    mass_RCW = jnp.pad(mass_RV, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    running_RC = jnp.cumsum(_sum(mass_RCW), axis=-1)
    # Rounding may leave the target at or past the end: the last block or token that has any mass catches it.
    block_R = jnp.minimum(jnp.sum(running_RC <= target_R[:, None], axis=-1), _last_positive(_sum(mass_RCW)))
    before_R = jnp.where(
        block_R > 0, jnp.take_along_axis(running_RC, jnp.maximum(block_R - 1, 0)[:, None], axis=-1)[:, 0], 0.0
    )
    inside_RW = jnp.take_along_axis(mass_RCW, block_R[:, None, None], axis=1)[:, 0]
    running_RW = before_R[:, None] + jnp.cumsum(inside_RW, axis=-1)
    offset_R = jnp.minimum(jnp.sum(running_RW <= target_R[:, None], axis=-1), _last_positive(inside_RW))
    # A token without mass can only be hit by rounding; step to the next one that has some.
    offset_R = jnp.argmax((inside_RW > 0) & (jnp.arange(width) >= offset_R[:, None]), axis=-1)
    return (block_R * width + offset_R).astype(jnp.int32)


def _last_positive(x: Float[jax.Array, "R C"]) -> Int[jax.Array, "R"]:
    size = x.shape[-1]
    return size - 1 - jnp.argmax(jnp.flip(x > 0, axis=-1), axis=-1)


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis; booleans are counted."""
    if x.dtype == bool:
        x = x.astype(jnp.int32)
    return jnp.sum(x, axis=-1)


def surest_first(confidence_BM: Float[jax.Array, "B M"], candidate_BM: Bool[jax.Array, "B M"]) -> Int[jax.Array, "B M"]:
    """Each row's indices, candidates before others, then by falling confidence; equals stay in order."""
    # Candidates before others whatever their confidence: one of minus infinity must not stay masked for ever.
    return jnp.lexsort((-confidence_BM, ~candidate_BM), axis=-1).astype(jnp.int32)


def commit(
    order_BM: Int[jax.Array, "B M"], candidate_BM: Bool[jax.Array, "B M"], count_B: Int[jax.Array, "B"]
) -> Bool[jax.Array, "B M"]:
    """Marks each row's first `count` candidates in an order from `surest_first`."""
    rank_BM = jnp.argsort(order_BM, axis=-1)
    return candidate_BM & (rank_BM < count_B[:, None])
