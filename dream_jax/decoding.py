"""From logits to decisions: which token each position would take, how sure that is, and which positions are written.

Knows rows of logits and confidences. Knows nothing of canvases, models or the clock. Nothing here sorts the vocabulary:
top_p and top_k keep what lies above a threshold, which is found by bisection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.target import current_target

Alg = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

# The published sampler adds it inside the logarithm of its entropy.
_ENTROPY_EPSILON = 1e-10

# Thresholds that one pass over the vocabulary tries. A CPU pays for each; elsewhere a pass costs what reading it costs.
_PROBES = {"cpu": 1}
_PROBES_ELSEWHERE = 15

# Rows that are filtered together: on a CPU few enough that their probabilities stay in its cache, elsewhere all.
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
            mass_RV = _filtered(mass_RV, top_p, top_k)
        return _decide(mass_RV, depth_RV, best_R, alg=alg, uniform_R=uniform_R)

    together = min(_ROWS_TOGETHER.get(current_target().platform, rows), rows)
    if together == rows:
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
    mass_RCW = _blocks(mass_RV)
    total_R = _sum(_sum(mass_RCW))
    if uniform_R is None:
        token_R, chosen_R = best_R, jnp.ones_like(total_R)
    else:
        token_R = _inverse_cdf(mass_RCW, uniform_R * total_R)
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
    whole_R = _sum(jnp.where(mass_RV > 0.0, mass_RV * depth_RV, 0.0) + added_RV)
    return whole_R / total_R - jnp.log(total_R)


def _filtered(
    mass_RV: Float[jax.Array, "R V"], top_p: float | jax.Array | None, top_k: int | None
) -> Float[jax.Array, "R V"]:
    """`mass_RV` with 0 at the tokens that top_p and top_k remove.

    A token is in the nucleus when the mass strictly above it is at most top_p, and in the top k when fewer than k tokens
    are strictly above it. Both sets are prefixes of the sorted row, so their intersection is the higher threshold.
    Tokens are equal where their masses are, in float32.
    """
    keep_RV = mass_RV > 0.0
    if top_p is not None:
        whole_R = _sum(mass_RV)
        limit_R = top_p * whole_R
        amount = lambda above_RKV: jnp.sum(jnp.where(above_RKV, mass_RV[:, None], 0.0), axis=-1)
        edge = _edge(mass_RV, amount, limit_R, whole_R, unit=None)
        keep_RV &= (mass_RV > edge.low_R[:, None]) & _first_of_equals(mass_RV, edge, limit_R)
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
      below_R: the amount strictly above low.
      above_R: the amount strictly above high.
    """

    low_R: Float[jax.Array, "R"]
    high_R: Float[jax.Array, "R"]
    below_R: Float[jax.Array, "R"]
    above_R: Float[jax.Array, "R"]


def _edge(
    mass_RV: Float[jax.Array, "R V"],
    amount: Callable[[Bool[jax.Array, "R K V"]], Float[jax.Array, "R K"]],
    limit_R: Float[jax.Array, "R"],
    whole_R: Float[jax.Array, "R"],
    *,
    unit: float | None,
) -> _Edge:
    """Bisects a row's masses, which lie in [0, 1] and the largest of which is 1.

    Args:
      mass_RV: what is cut.
      amount: of the tokens marked; does not fall as more are marked.
      limit_R: what the tokens strictly above the edge amount to at most.
      whole_R: what all tokens amount to.
      unit: what one token amounts to; None: its mass.
    """
    probes = _PROBES.get(current_target().platform, _PROBES_ELSEWHERE)
    part_K = jnp.arange(1, probes + 1, dtype=jnp.int32)
    # The bits of floats from 0 on, read as integers, are in the floats' order.
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

    Bounds = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def unsettled(low_R: jax.Array, high_R: jax.Array, below_R: jax.Array, above_R: jax.Array) -> jax.Array:
        # With less than one and a half of the smallest that a token in between can be, there is one token.
        one_R = as_float(low_R) if unit is None else unit
        return (low_R + 1 < high_R) & (below_R - above_R >= 1.5 * one_R)

    def narrow(bounds: Bounds) -> Bounds:
        low_R, high_R, below_R, above_R = bounds
        width_R1 = (high_R - low_R)[:, None]
        share_RK = width_R1 // (probes + 1) * part_K + width_R1 % (probes + 1) * part_K // (probes + 1)
        probe_RK = low_R[:, None] + share_RK
        amount_RK = amount(mass_RV[:, None] > as_float(probe_RK)[:, :, None])
        within_RK = amount_RK <= limit_R[:, None]
        narrowed = (
            jnp.maximum(low_R, jnp.max(jnp.where(within_RK, 0, probe_RK), axis=-1)),
            jnp.minimum(high_R, jnp.min(jnp.where(within_RK, probe_RK, high_R[:, None]), axis=-1)),
            jnp.minimum(below_R, jnp.min(jnp.where(within_RK, below_R[:, None], amount_RK), axis=-1)),
            jnp.maximum(above_R, jnp.max(jnp.where(within_RK, amount_RK, 0.0), axis=-1)),
        )
        # A row that is settled stays as it is, however long the others take.
        open_R = unsettled(*bounds)
        return jax.tree.map(functools.partial(jnp.where, open_R), narrowed, bounds)

    nothing_R = jnp.zeros_like(whole_R)
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
    start = (nothing_R.astype(jnp.int32), jnp.full(nothing_R.shape, one), whole_R, nothing_R)
    low_R, high_R, below_R, above_R = jax.lax.while_loop(lambda bounds: jnp.any(unsettled(*bounds)), narrow, start)
    return _Edge(as_float(low_R), as_float(high_R), below_R, above_R)


def _first_of_equals(
    mass_RV: Float[jax.Array, "R V"], edge: _Edge, limit_R: Float[jax.Array, "R"]
) -> Bool[jax.Array, "R V"]:
    """Of equal tokens at the edge of the nucleus, a sort keeps only as many as fit; keeps those of lowest id."""
    fit_R = jnp.floor((limit_R - edge.above_R) / edge.high_R) + 1.0
    # As many as their mass says, and a rounding of it must not find two in one.
    count_R = jnp.round((edge.below_R - edge.above_R) / edge.high_R)

    def by_id() -> Bool[jax.Array, "R V"]:
        tied_RV = (mass_RV > edge.low_R[:, None]) & (mass_RV <= edge.high_R[:, None])
        rank_RV = jnp.cumsum(tied_RV, axis=-1, dtype=jnp.int32) - 1
        return ~tied_RV | (rank_RV.astype(jnp.float32) < fit_R[:, None])

    return jax.lax.cond(jnp.any(count_R > fit_R), by_id, lambda: jnp.ones(mass_RV.shape, bool))


def _blocks(mass_RV: Float[jax.Array, "R V"]) -> Float[jax.Array, "R C W"]:
    """The vocabulary in blocks of about its square root; what fills up the last is 0."""
    rows, vocab = mass_RV.shape
    width = 1 << ((vocab - 1).bit_length() + 1) // 2
    return jnp.pad(mass_RV, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)


def _inverse_cdf(mass_RCW: Float[jax.Array, "R C W"], target_R: Float[jax.Array, "R"]) -> Int[jax.Array, "R"]:
    """The first token at which the running sum of the masses exceeds the target: an exact categorical sample.

    One random number a row instead of one a token. The running sum is taken in two levels (blocks, then inside one).
    """
    width = mass_RCW.shape[-1]
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
