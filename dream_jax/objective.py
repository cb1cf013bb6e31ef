"""The masked-diffusion objective: noise, weights, and cross entropy at the masked positions.

Sees hidden states and an output projection, never the data. The facts are those of Dream's published SFT trainer: the
right shift (position i is predicted from the hidden state at i - 1), four weightings, and one global denominator.

Only masked positions get logits, a chunk of rows at a time, and the gradient of each chunk is formed while its logits
are there: no [B, T, V] array exists, forward or backward.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import sharding
from dream_jax.masks import Mask
from dream_jax.model import Dream, DropoutKeys, check_ids, mask_and_positions
from dream_jax.shapes import Array
from dream_jax.target import current_target

# Elements of the [rows, V] block of logits that is formed at once on each device (512 MiB of float32). Each block reads and
# writes the whole gradient of the projection, so that few large blocks are cheap where arithmetic is fast.
_LOGIT_ELEMENTS = 1 << 27
# On a CPU arithmetic is what costs: rows of the last block that are not masked are wasted work. A device that holds few
# positions takes fewer at a time, so that the block of a large vocabulary stays small beside the projection.
_CPU_ROWS, _CPU_FEWEST_ROWS, _CPU_SMALL_BLOCK = 256, 64, 1 << 22

# Losses are also reported by noise level: of rows with t in [0, 1/4), [1/4, 1/2), and so on.
TIME_BUCKETS = 4


class LossWeight(abc.ABC):
    """How much the cross entropy of each masked position counts. Subclasses are hashable (frozen dataclasses)."""

    @abc.abstractmethod
    def __call__(self, masked_BT: Bool[Array, "B T"], t_B: Float[Array, "B"]) -> Float[jax.Array, "B T"]:
        """Weights float32 [B, T]; only those at masked positions are used."""


@dataclasses.dataclass(frozen=True)
class UniformWeight(LossWeight):
    """1."""

    def __call__(self, masked_BT: Bool[Array, "B T"], t_B: Float[Array, "B"]) -> Float[jax.Array, "B T"]:
        """All ones."""
        return jnp.ones(masked_BT.shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class LinearWeight(LossWeight):
    """1 - t: the more is visible, the more a mistake counts."""

    def __call__(self, masked_BT: Bool[Array, "B T"], t_B: Float[Array, "B"]) -> Float[jax.Array, "B T"]:
        """The same for all positions of a row."""
        return jnp.broadcast_to(1.0 - jnp.asarray(t_B, jnp.float32)[:, None], masked_BT.shape)


@dataclasses.dataclass(frozen=True)
class InverseTimeWeight(LossWeight):
    """1 / t, the weight of the likelihood bound (published as "original").

    The denominator is the number of masked positions, which itself grows with t: together they act like 1 / t^2.
    """

    def __call__(self, masked_BT: Bool[Array, "B T"], t_B: Float[Array, "B"]) -> Float[jax.Array, "B T"]:
        """The same for all positions of a row; 0 at t = 0, where nothing can be masked."""
        t_B1 = jnp.asarray(t_B, jnp.float32)[:, None]
        return jnp.broadcast_to(jnp.where(t_B1 > 0, 1.0 / jnp.where(t_B1 > 0, t_B1, 1.0), 0.0), masked_BT.shape)


@dataclasses.dataclass(frozen=True)
class CartWeight(LossWeight):
    """Dream's context-adaptive weight: a masked position counts by how much visible context is near it.

    w_i = sum over visible j of 0.5 p (1 - p)^(|i - j| - 1), visible meaning not masked: prompt, response and pads alike.
    In the interior the mean of w at noise level t is 1 - t. Two first-order recurrences, O(T).

    Attributes:
      geometric_p: in (0, 1); larger looks less far. 0.1 in the published SFT configuration.

    Raises:
      ValueError: geometric_p outside (0, 1).
    """

    geometric_p: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.geometric_p < 1.0:
            raise ValueError(f"{self.geometric_p=} is outside (0, 1)")

    def __call__(self, masked_BT: Bool[Array, "B T"], t_B: Float[Array, "B"]) -> Float[jax.Array, "B T"]:
        """Weights of every position, by its visible neighbours."""
        visible_BT = (~jnp.asarray(masked_BT).astype(bool)).astype(jnp.float32)
        decay = 1.0 - self.geometric_p
        before_BT = _decayed_sum(visible_BT, decay)
        after_BT = jnp.flip(_decayed_sum(jnp.flip(visible_BT, axis=1), decay), axis=1)
        return 0.5 * self.geometric_p * (before_BT + after_BT)


def _decayed_sum(x_BT: Float[jax.Array, "B T"], decay: float) -> Float[jax.Array, "B T"]:
    """y_i = sum over j < i of decay^(i - j - 1) x_j, through y_i = decay y_{i-1} + x_{i-1}."""

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    shifted_BT = jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))
    _, y_BT = jax.lax.associative_scan(combine, (jnp.full_like(x_BT, decay), shifted_BT), axis=1)
    return y_BT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focal:
    """alpha (1 - exp(-CE))^gamma CE in place of CE: easy positions count less. Off in the published configuration."""

    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.gamma >= 1):
            raise ValueError(f"focal needs {self.alpha=} > 0 and {self.gamma=} >= 1")


def draw_noise(
    key: jax.Array, row_B: Int[Array, "B"], maskable_BT: Bool[Array, "B T"], global_batch: int
) -> tuple[Float[jax.Array, "B"], Bool[jax.Array, "B T"]]:
    """Times and masks of one step, from (key, row) alone: how rows lie on devices or processes changes nothing.

    Times are stratified over the global batch: a shuffle of (k + u) / K for k = 0..K-1 with one u, so that every batch
    sees all noise levels and the loss varies less. Each maskable position is masked with its row's probability t.

    Args:
      key: the step's key.
      row_B: index of each row within the global batch, each of 0..K-1 once.
      maskable_BT: false at the prompt.
      global_batch: K.

    Returns:
      t float32 [B] in [0, 1), and the masked positions, bool [B, T].
    """
    offset_key, order_key, mask_key = jax.random.split(key, 3)
    stratum_K = jax.random.permutation(order_key, global_batch).astype(jnp.float32)
    t_K = (stratum_K + jax.random.uniform(offset_key)) / global_batch
    t_B = jnp.minimum(t_K, 1.0 - 2.0**-24)[row_B]  # the sum above may round up to K
    length = maskable_BT.shape[1]
    u_BT = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(mask_key, row), (length,)))(row_B)
    return t_B, jnp.asarray(maskable_BT) & (u_BT < t_B[:, None])


def masked_diffusion_loss(
    model: Dream,
    tokens_BT: Int[Array, "B T"],
    masked_BT: Bool[Array, "B T"],
    t_B: Float[Array, "B"],
    weight: LossWeight = CartWeight(0.1),
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | Mask | None = None,
    *,
    mask: Mask | None = None,
    focal: Focal | None = None,
    normalizer: Float[jax.Array, ""] | Int[jax.Array, ""] | None = None,
    dropout_keys: DropoutKeys = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """Weighted cross entropy of the clean tokens at the masked positions, over the number of masked positions.

    Args:
      model: its float32 or bfloat16 parameters are what gradients are taken of.
      tokens_BT: clean token ids.
      masked_BT: true where the model sees the mask token instead.
      t_B: noise level of each row, in (0, 1).
      weight: CartWeight(p) | InverseTimeWeight() | LinearWeight() | UniformWeight().
      attention_mask: nonzero at real tokens; for left-padded batches. Right pads are attended and learned: that is how
        the model learns to stop, so they do not belong in this mask. Or a mask value, which says all there is to say.
      mask: what holds beside `attention_mask`, for training under another mask than the bidirectional; see `Mask.for_rows`.
      focal: optional focal term.
      normalizer: the denominator; by default the number of masked positions in the (global) batch, at least 1. Parts of
        a batch are given the whole batch's, so that their losses add up.
      dropout_keys: one key a row, from which an adapter with dropout draws what it does not see; None drops nothing.

    Returns:
      The loss (float32), and a dict: `num_masked` (float32), `num_correct` (masked positions whose most probable token
      is right), `nll` (unweighted mean cross entropy at masked positions, nats), `token_nll` ([B, T], 0 elsewhere), and
      `token_correct` (bool [B, T], false elsewhere). The dict is for reporting: only the loss has a gradient, in the
      parameters; another weighting is a LossWeight.

    Raises:
      ValueError: shapes that do not fit, or ids outside the vocabulary (which only a trace can hide).
    """
    check_ids(tokens_BT, model.config.vocab_size)
    tokens_BT, masked_BT = jnp.asarray(tokens_BT), jnp.asarray(masked_BT).astype(bool)
    if masked_BT.shape != tokens_BT.shape:
        raise ValueError(f"masked has shape {masked_BT.shape}, but the tokens have {tokens_BT.shape}")
    t_B = jnp.asarray(t_B, jnp.float32)
    if t_B.shape != tokens_BT.shape[:1]:
        raise ValueError(f"t has shape {t_B.shape}, expected one time a row, {tokens_BT.shape[:1]}")
    padding, positions_BT = mask_and_positions(tokens_BT.shape, attention_mask, None)
    mask = padding if mask is None else mask & padding
    with sharding.mesh_context(model):
        arrays = (tokens_BT, masked_BT, t_B, mask, positions_BT, normalizer, dropout_keys)
        return _loss(model, *arrays, weight=weight, focal=focal)


def sums_by_time(
    token_nll_BT: Float[Array, "B T"], masked_BT: Bool[Array, "B T"], t_B: Float[Array, "B"]
) -> tuple[Float[jax.Array, "times"], Float[jax.Array, "times"]]:
    """Cross entropy and masked positions summed over the rows of each of the `TIME_BUCKETS` of t; parts of a batch add up.

    Args:
      token_nll_BT: as in the dict of `masked_diffusion_loss`.
      masked_BT: the positions that it is of.
      t_B: noise level of each row, in [0, 1].
    """
    bucket_B = jnp.clip((jnp.asarray(t_B) * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    inside = (bucket_B[:, None] == jnp.arange(TIME_BUCKETS)).astype(jnp.float32)  # [B, TIME_BUCKETS]
    of_rows = jnp.sum(token_nll_BT, axis=1), jnp.sum(masked_BT, axis=1, dtype=jnp.float32)
    nll, masked = (jnp.sum(inside * sum_B[:, None], axis=0) for sum_B in of_rows)
    return nll, masked


# Compiled here: the loops inside are new functions at every call, which outside of a jit would be compiled every time.
@functools.partial(jax.jit, static_argnames=("weight", "focal"))
def _loss(
    model: Dream,
    tokens_BT: jax.Array,
    masked_BT: jax.Array,
    t_B: jax.Array,
    mask: Mask,
    positions_BT: jax.Array,
    normalizer: jax.Array | None,
    dropout_keys: DropoutKeys,
    *,
    weight: LossWeight,
    focal: Focal | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    noisy_BT = sharding.constrain(jnp.where(masked_BT, model.config.mask_token_id, tokens_BT), "batch", "tokens")
    hidden_BTD = model.hidden(noisy_BT, mask, positions_BT, dropout_keys)
    with jax.named_scope("loss"):
        weight_BT = jnp.where(masked_BT, weight(masked_BT, t_B), 0.0)
        kernel_DV = model.unembedding().astype(model.compute_dtype)
        groups = sharding.token_shards(*tokens_BT.shape)
        if groups[1] > 1:
            # Devices share a row: what each needs of its neighbour, one hidden state a row, changes hands here.
            hidden_BTD = jnp.concatenate([hidden_BTD[:, :1], hidden_BTD[:, :-1]], axis=1)
            hidden_BTD = sharding.constrain(hidden_BTD, "batch", "tokens", "width")
        total, token_nll_BT, correct_BT = _masked_cross_entropy(
            focal, groups, hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT
        )
        token_nll_BT = jax.lax.stop_gradient(token_nll_BT)
        num_masked = jnp.sum(masked_BT, dtype=jnp.float32)
        # A batch with no masked position has no loss, rather than 0 / 0.
        denominator = jnp.maximum(num_masked if normalizer is None else normalizer, 1).astype(jnp.float32)
        aux = {
            "num_masked": num_masked,
            "num_correct": jnp.sum(correct_BT, dtype=jnp.float32),
            "nll": jnp.sum(token_nll_BT) / jnp.maximum(num_masked, 1.0),
            "token_nll": token_nll_BT,
            "token_correct": correct_BT,
        }
        return total / denominator, aux


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _masked_cross_entropy(
    focal: Focal | None,
    groups: tuple[int, int],
    hidden_BTD: Float[jax.Array, "B T D"],
    kernel_DV: Float[jax.Array, "D V"],
    tokens_BT: Int[jax.Array, "B T"],
    masked_BT: Bool[jax.Array, "B T"],
    weight_BT: Float[jax.Array, "B T"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of the weighted cross entropies; cross entropy and "argmax is right" of each masked position, [B, T].

    `groups` says how many ways the devices split B and T. Where T is split, the hidden states come shifted already.
    """
    outputs, _ = _over_chunks(focal, groups, hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT, gradients="none")
    return outputs


# The two rules of custom_vjp are called by jax alone, with the types of the function above: no annotations of their own.
def _forward(focal, groups, hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT):  # type: ignore[no-untyped-def]
    arrays = (argument.value for argument in (hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT))
    # Beneath an adapter nobody asks for the kernel's.
    return _over_chunks(focal, groups, *arrays, gradients="both" if kernel_DV.perturbed else "hidden")


def _backward(focal, groups, gradients, cotangents):  # type: ignore[no-untyped-def]  # the other of the two
    # Only the sum is differentiated; the per-token outputs are for reporting.
    scale = cotangents[0]

    def scaled(gradient: jax.Array) -> jax.Array:
        # The factor stays float32: rounded to bfloat16 it would tilt every gradient of the batch the same way.
        return (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)

    hidden_gradient, kernel_gradient = gradients
    return scaled(hidden_gradient), None if kernel_gradient is None else scaled(kernel_gradient), None, None, None


# symbolic_zeros: the forward rule is told which arguments are differentiated.
_masked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(
    focal: Focal | None,
    groups: tuple[int, int],
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    tokens_BT: jax.Array,
    masked_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    gradients: Literal["none", "hidden", "both"],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None] | None]:
    """One loop over chunks of masked rows that forms the loss and, if asked, its gradients while the logits exist.

    The gradients are those of the hidden states, or of these and the kernel.

    A row is one position of the batch. Rows are sorted "masked first" inside each group of devices that holds a share of
    them (S groups, R rows each), so that no row leaves its device, and the loop ends when the group with most masked
    rows is through.
    """
    batch, length, width = hidden_BTD.shape
    vocab = kernel_DV.shape[1]
    num_groups, tokens_each = math.prod(groups), length // groups[1]
    rows = batch // groups[0] * tokens_each
    chunk = chunk_rows(rows, vocab, current_target().platform)
    padding = -rows % chunk
    # Gathered once, before the loop. Left split over the devices that split the rows, the kernel is gathered anew for
    # every chunk, and so are the [chunk, V] gradients of all devices' logits, which is more.
    kernel_DV = sharding.constrain(kernel_DV, None, "vocab")

    def on_groups(x: jax.Array, *axes: str | None) -> jax.Array:
        return sharding.constrain(x, "token_group", *axes, *[None] * (x.ndim - 1 - len(axes)))

    def grouped(x: jax.Array) -> jax.Array:
        x = x.reshape(groups[0], batch // groups[0], groups[1], tokens_each, *x.shape[2:]).swapaxes(1, 2)
        return on_groups(x.reshape(num_groups, rows, *x.shape[4:]))

    def ungrouped(x: jax.Array) -> jax.Array:
        x = x.reshape(*groups, batch // groups[0], tokens_each, *x.shape[2:]).swapaxes(1, 2)
        return sharding.constrain(x.reshape(batch, length, *x.shape[4:]), "batch", "tokens", *[None] * (x.ndim - 4))

    hidden_SRD, token_SR = grouped(hidden_BTD), grouped(tokens_BT)
    masked_SR, weight_SR = grouped(masked_BT), grouped(weight_BT)
    order_SR = jnp.argsort(~masked_SR, axis=1, stable=True)
    # Past the last row the index points outside: reads are filled with zeros, writes are dropped.
    order_SR = jnp.pad(order_SR, ((0, 0), (0, padding)), constant_values=rows)
    count_S = jnp.sum(masked_SR, axis=1, dtype=jnp.int32)

    # Mapped over the groups, so that the partitioner sees reads and writes that stay within a group's devices.
    @jax.vmap
    def read(x_R: jax.Array, index_C: jax.Array) -> jax.Array:
        return x_R.at[index_C].get(mode="fill", fill_value=0)

    @jax.vmap
    def write(x_R: jax.Array, index_C: jax.Array, value_C: jax.Array) -> jax.Array:
        return x_R.at[index_C].set(value_C, mode="drop")

    @jax.vmap
    def add(x_R: jax.Array, index_C: jax.Array, value_C: jax.Array) -> jax.Array:
        return x_R.at[index_C].add(value_C, mode="drop")

    def visit(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total_S, nll_SR, correct_SR, *sums = carry
        index_SC = jax.lax.dynamic_slice_in_dim(order_SR, number * chunk, chunk, axis=1)
        live_SC = number * chunk + jnp.arange(chunk) < count_S[:, None]
        # The right shift, on indices: the hidden state before the masked token, in its own row of the batch.
        source_SC = index_SC if groups[1] > 1 else jnp.where(index_SC % length == 0, index_SC, index_SC - 1)
        h_SCD = read(hidden_SRD, source_SC)
        target_SC = read(token_SR, index_SC)
        weight_SC = jnp.where(live_SC, read(weight_SR, index_SC), 0.0)

        logits_SCV = jnp.einsum("SCD,DV->SCV", h_SCD, kernel_DV, preferred_element_type=jnp.float32)
        logits_SCV = on_groups(logits_SCV, None, "vocab")
        peak_SC = jnp.max(logits_SCV, axis=-1)
        odds_SCV = jnp.exp(logits_SCV - peak_SC[..., None])
        norm_SC = jnp.sum(odds_SCV, axis=-1)
        is_target_SCV = jnp.arange(vocab) == target_SC[..., None]
        own_SC = jnp.sum(jnp.where(is_target_SCV, logits_SCV, 0.0), axis=-1)
        nll_SC = jnp.log(norm_SC) + peak_SC - own_SC
        value_SC, slope_SC = _focal_value_and_slope(nll_SC, focal)
        total_S = total_S + jnp.sum(weight_SC * value_SC, axis=1)
        place_SC = jnp.where(live_SC, index_SC, rows)
        nll_SR = write(nll_SR, place_SC, nll_SC)
        correct_SR = write(correct_SR, place_SC, own_SC >= peak_SC)
        if gradients != "none":
            scale_SC1 = (weight_SC * slope_SC)[..., None]
            pull_SCV = (odds_SCV / norm_SC[..., None] - is_target_SCV.astype(jnp.float32)) * scale_SC1
            pull_SCV = pull_SCV.astype(kernel_DV.dtype)
            pulled_SCD = jnp.einsum("SCV,DV->SCD", pull_SCV, kernel_DV, preferred_element_type=jnp.float32)
            # Add, not set: positions 0 and 1 of a row read the same hidden state.
            sums[0] = add(sums[0], source_SC, pulled_SCD)
        if gradients == "both":
            more_SDV = jnp.einsum("SCD,SCV->SDV", h_SCD, pull_SCV, preferred_element_type=jnp.float32)
            sums[1] = on_groups(sums[1] + more_SDV, None, "vocab")
        return total_S, nll_SR, correct_SR, *sums

    start: tuple[jax.Array, ...] = (
        jnp.zeros((num_groups,), jnp.float32),
        jnp.zeros((num_groups, rows), jnp.float32),
        jnp.zeros((num_groups, rows), bool),
    )
    if gradients != "none":
        start += (on_groups(jnp.zeros((num_groups, rows, width), jnp.float32)),)
    if gradients == "both":
        # One partial sum a group, added up once at the end rather than after every chunk.
        start += (on_groups(jnp.zeros((num_groups, width, vocab), jnp.float32), None, "vocab"),)
    chunks = (jnp.max(count_S) + chunk - 1) // chunk
    total_S, nll_SR, correct_SR, *sums = jax.lax.fori_loop(0, chunks, visit, start)
    outputs = (jnp.sum(total_S), ungrouped(nll_SR), ungrouped(correct_SR))
    if gradients == "none":
        return outputs, None
    hidden_gradient = ungrouped(sums[0]).astype(hidden_BTD.dtype)
    if gradients == "hidden":
        return outputs, (hidden_gradient, None)
    kernel_gradient = sharding.constrain(jnp.sum(sums[1], axis=0), "embed", "vocab")
    # Both at once: nothing needs the kernel's until the optimizer does, and a compiler that is free to wait keeps the
    # [D, V] float32 partial sums (2 GiB for Dream-7B) all through the backward pass.
    hidden_gradient, kernel_gradient = jax.lax.optimization_barrier((hidden_gradient, kernel_gradient))
    # And rounded at once, behind a barrier of its own: before the first, the devices' sums would be added rounded.
    return outputs, jax.lax.optimization_barrier((hidden_gradient, kernel_gradient.astype(kernel_DV.dtype)))


def chunk_rows(rows: int, vocab: int, platform: str) -> int:
    """How many rows' logits are formed at once on a device that holds `rows` positions of the batch."""
    most = rows
    if platform == "cpu":
        most = min(_CPU_ROWS, max(_CPU_FEWEST_ROWS, rows // 8, _CPU_SMALL_BLOCK // vocab))
    return min(rows, most, max(1, _LOGIT_ELEMENTS // vocab))


def _focal_value_and_slope(nll: jax.Array, focal: Focal | None) -> tuple[jax.Array, jax.Array]:
    """The term of one position as a function of its cross entropy, and the derivative of that function."""
    if focal is None:
        return nll, jnp.ones_like(nll)
    p = jnp.exp(-nll)
    modulation = (1.0 - p) ** focal.gamma
    slope = modulation + focal.gamma * (1.0 - p) ** (focal.gamma - 1.0) * p * nll
    return focal.alpha * modulation * nll, focal.alpha * slope
