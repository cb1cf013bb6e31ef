"""The masked-diffusion objective: noise, loss weights, and the cross entropy at the masked positions.

It follows Dream's published SFT trainer: the right shift (position i is predicted from the hidden state at i - 1), four
loss weights, and one denominator for the global batch. Logits are computed for masked positions only, one chunk at a
time, and the gradients of a chunk are computed together with its logits. So no pass stores an array [B, T, V].
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import sharding
from dream_jax.bounds import POSITIVE, FloatRange, check_numbers
from dream_jax.masks import Mask, Packed, conjuncts
from dream_jax.model import Dream, DropoutKeys, check_ids, mask_and_positions
from dream_jax.shapes import Array
from dream_jax.target import current_target

# Maximum number of elements of the [chunk, V] array of logits on each device (512 MiB of float32). Every chunk reads
# and writes the whole gradient of the output projection, so an accelerator is fastest with few large chunks.
_LOGIT_ELEMENTS = 1 << 27
# A CPU is limited by arithmetic, and unmasked positions in the last chunk are wasted work, so a CPU uses smaller
# chunks: at most _CPU_ROWS positions. A chunk is smaller still if it would hold more than 1/8 of the positions of the
# device and more than _CPU_SMALL_BLOCK logits, but it never has fewer than _CPU_FEWEST_ROWS positions. So the logits
# take little memory compared with the output projection.
_CPU_ROWS, _CPU_FEWEST_ROWS, _CPU_SMALL_BLOCK = 256, 64, 1 << 22

NoiseLevels = Float[Array, "B"] | Float[Array, "B T"]
"""The noise level of each row, [B], or of each token if it differs within rows, [B, T]; float32 in [0, 1]."""

# Number of equal ranges of the noise level t, [0, 1/4), [1/4, 1/2), and so on, for which losses are reported.
TIME_BUCKETS = 4


class LossWeight(abc.ABC):
    """The factor on the cross entropy of each masked position.

    Subclasses must be hashable (frozen dataclasses), because a weight is a static argument of jitted functions.
    """

    @abc.abstractmethod
    def __call__(
        self, masked_BT: Bool[Array, "B T"], t: NoiseLevels, start_BT: Bool[Array, "B T"] | None = None
    ) -> Float[jax.Array, "B T"]:
        """Returns the weights, float32 [B, T]. The loss uses only the weights at masked positions.

        Args:
          masked_BT: true where the model receives the mask token.
          t: noise level of each row [B], or of each token [B, T], in [0, 1].
          start_BT: true at the first token of each text, for rows that hold several texts; None for one text a row.
        """


@dataclasses.dataclass(frozen=True)
class UniformWeight(LossWeight):
    """Every masked position has weight 1."""

    def __call__(
        self, masked_BT: Bool[Array, "B T"], t: NoiseLevels, start_BT: Bool[Array, "B T"] | None = None
    ) -> Float[jax.Array, "B T"]:
        """Returns float32 [B, T], all ones."""
        return jnp.ones(masked_BT.shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class LinearWeight(LossWeight):
    """The weight is 1 - t: a masked position counts more when fewer tokens of its row are masked."""

    def __call__(
        self, masked_BT: Bool[Array, "B T"], t: NoiseLevels, start_BT: Bool[Array, "B T"] | None = None
    ) -> Float[jax.Array, "B T"]:
        """Returns float32 [B, T], equal at all positions of a text."""
        return jnp.broadcast_to(1.0 - _of_tokens(t), masked_BT.shape)


@dataclasses.dataclass(frozen=True)
class InverseTimeWeight(LossWeight):
    """The weight is 1 / t, as in the likelihood bound (called "original" in the published code).

    The number of masked positions of a row grows with t, so all rows of a batch have about the same total weight. In
    rows with a small t, each of the few masked positions therefore counts most. The loss is divided by the number of
    masked positions of the batch. With many rows in a batch this number is about the same in every step. With a single row
    of T maskable tokens it is t T on average, so a masked token counts (1 / t) / (t T) = 1 / (t^2 T) in its step, where
    the likelihood bound has 1 / (t T).
    """

    def __call__(
        self, masked_BT: Bool[Array, "B T"], t: NoiseLevels, start_BT: Bool[Array, "B T"] | None = None
    ) -> Float[jax.Array, "B T"]:
        """Returns float32 [B, T], equal at all positions of a text; 0 at t = 0, where no position is masked."""
        t_BT = _of_tokens(t)
        return jnp.broadcast_to(jnp.where(t_BT > 0, 1.0 / jnp.where(t_BT > 0, t_BT, 1.0), 0.0), masked_BT.shape)


@dataclasses.dataclass(frozen=True)
class CartWeight(LossWeight):
    """Dream's context-adaptive weight (CART): a masked position counts more when more unmasked tokens are near it.

    The weight of position i is the sum over all unmasked j other than i of 0.5 p (1 - p)^(|i - j| - 1), where j may be
    in the prompt, the response or the padding. In a row of several texts, j is in the same text as i. Far from the ends
    of a text the mean weight at noise level t is 1 - t. Two first-order recurrences compute all weights of a row in O(T).

    Attributes:
      geometric_p: p in (0, 1). With a larger p only nearer tokens count. The published SFT configuration has 0.1.

    Raises:
      ValueError: `geometric_p` is outside (0, 1).
    """

    geometric_p: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self, geometric_p=FloatRange(0.0, 1.0, open_low=True, open_high=True))

    def __call__(
        self, masked_BT: Bool[Array, "B T"], t: NoiseLevels, start_BT: Bool[Array, "B T"] | None = None
    ) -> Float[jax.Array, "B T"]:
        """Returns float32 [B, T], the weight of every position, masked or not."""
        unmasked_BT = (~jnp.asarray(masked_BT).astype(bool)).astype(jnp.float32)
        decay = 1.0 - self.geometric_p
        end_BT = None
        if start_BT is not None:  # the last token of a text is before the first token of the next one
            end_BT = jnp.pad(jnp.asarray(start_BT)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        before_BT = _decayed_sum(unmasked_BT, decay, start_BT)
        after_BT = jnp.flip(
            _decayed_sum(jnp.flip(unmasked_BT, axis=1), decay, None if end_BT is None else jnp.flip(end_BT, axis=1)),
            axis=1,
        )
        return 0.5 * self.geometric_p * (before_BT + after_BT)


def _of_tokens(t: NoiseLevels) -> Float[jax.Array, "B t"]:
    """Returns the noise levels as float32 [B, 1] or [B, T]."""
    t = jnp.asarray(t, jnp.float32)
    return t[:, None] if t.ndim == 1 else t


def _decayed_sum(
    x_BT: Float[jax.Array, "B T"], decay: float, start_BT: Bool[Array, "B T"] | None = None
) -> Float[jax.Array, "B T"]:
    """Returns y_i = sum over j < i of decay^(i - j - 1) x_j, computed as y_i = decay y_{i-1} + x_{i-1}.

    Where `start_BT` is true, y_i is 0, and the sums of later positions begin there.
    """

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    shifted_BT, decay_BT = jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0))), jnp.full_like(x_BT, decay)
    if start_BT is not None:
        shifted_BT, decay_BT = jnp.where(start_BT, 0.0, shifted_BT), jnp.where(start_BT, 0.0, decay_BT)
    _, y_BT = jax.lax.associative_scan(combine, (decay_BT, shifted_BT), axis=1)
    return y_BT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focal:
    """The focal loss: it replaces the cross entropy CE by alpha (1 - exp(-CE))^gamma CE.

    Positions that the model predicts well then count less. The published configuration does not use it.

    Raises:
      ValueError: alpha is not above 0, or gamma is outside [1, 100].
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_numbers(self, alpha=POSITIVE, gamma=FloatRange(1.0, 100.0))


def draw_noise(
    key: jax.Array, row_B: Int[Array, "B"], maskable_BT: Bool[Array, "B T"], global_batch: int
) -> tuple[Float[jax.Array, "B"], Bool[jax.Array, "B T"]]:
    """Draws the noise levels and the masked positions of one training step.

    The noise of a row depends only on the key and on the index of the row, not on the device or process that computes
    it. The noise levels are stratified over the K rows of the global batch: they are (k + u) / K for k = 0..K-1 in
    random order, with one u in [0, 1) for all. So every batch covers all noise levels, and the loss varies less. Each
    maskable position of a row is masked with probability t.

    Args:
      key: the random key of the step.
      row_B: index of each row in the global batch, in [0, K).
      maskable_BT: true where a token may be masked; false in the prompt.
      global_batch: K, the number of rows in the global batch.

    Returns:
      The noise level t of each row, float32 [B] in [0, 1), and the masked positions, bool [B, T].
    """
    t_B, u_BT = row_numbers(key, row_B, maskable_BT.shape[1], global_batch)
    return t_B, jnp.asarray(maskable_BT) & (u_BT < t_B[:, None])


def row_numbers(
    key: jax.Array, row_B: Int[Array, "B"], num_tokens: int, global_batch: int
) -> tuple[Float[jax.Array, "B"], Float[jax.Array, "B T"]]:
    """Returns the random numbers of `draw_noise`: the noise level of each row, and a number in [0, 1) for each token.

    The arguments are those of `draw_noise`, with the number of tokens of a row. Both arrays are float32.
    """
    offset_key, order_key, mask_key = jax.random.split(key, 3)
    stratum_K = jax.random.permutation(order_key, global_batch).astype(jnp.float32)
    t_K = (stratum_K + jax.random.uniform(offset_key)) / global_batch
    t_B = jnp.minimum(t_K, 1.0 - 2.0**-24)[row_B]  # rounding may make t_K equal to 1
    return t_B, jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(mask_key, row), (num_tokens,)))(row_B)


def masked_diffusion_loss(
    model: Dream,
    tokens_BT: Int[Array, "B T"],
    masked_BT: Bool[Array, "B T"],
    t_B: Float[Array, "B"] | Float[Array, "B M"],
    weight: LossWeight = CartWeight(0.1),
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | Mask | None = None,
    *,
    mask: Mask | None = None,
    focal: Focal | None = None,
    normalizer: Float[jax.Array, ""] | Int[jax.Array, ""] | None = None,
    dropout_keys: DropoutKeys = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """Computes the weighted cross entropy of the clean tokens: its sum over masked positions, divided by their number.

    Args:
      model: the model, with float32 or bfloat16 parameters.
      tokens_BT: ids of the clean tokens.
      masked_BT: true where the model receives the mask token instead of the clean token.
      t_B: noise level of each row, [B], in [0, 1]; with `masks.Packed` it may be that of each text, [B, M].
      weight: the factor on each masked position: CartWeight(p), InverseTimeWeight(), LinearWeight(), UniformWeight().
      attention_mask: an array that is nonzero at valid tokens, for left-padded batches; or a `Mask`. Padding on the
        right must count as valid: the model attends to it and learns it, and so learns to stop. `masks.Packed` is for
        rows that hold several texts: the loss is then that of the same texts in rows of their own.
      mask: a mask that is combined with `attention_mask` by `&`, to train under a mask other than `Bidirectional`. If
        it depends on rows, it must be the result of `Mask.for_rows`.
      focal: changes the cross entropy of each position to the focal loss; None means no change.
      normalizer: the denominator. The default is the number of masked positions in the (global) batch, at least 1. For
        a microbatch, pass the number of masked positions in the whole batch: the losses of the microbatches then add up
        to the loss of the batch.
      dropout_keys: one random key per row, for the dropout of an adapter; None means no dropout.

    Returns:
      The loss (float32 scalar), and a dict of values to report. `num_masked` and `num_correct` (float32 scalars) are
      the numbers of masked positions, and of those where the most probable token is correct. `nll` is the unweighted
      mean cross entropy of masked positions, in nats. `token_nll` (float32 [B, T]) and `token_correct` (bool [B, T])
      hold the values of each masked position, and 0 or false elsewhere. Only the loss can be differentiated, and only
      with respect to the parameters. The dict and the weights of the positions are constants.

    Raises:
      ValueError: a shape does not match the tokens, or an id is outside the vocabulary (ids are not checked when jax
        traces the call).
    """
    check_ids(tokens_BT, model.config.vocab_size)
    tokens_BT, masked_BT = jnp.asarray(tokens_BT), jnp.asarray(masked_BT).astype(bool)
    if masked_BT.shape != tokens_BT.shape:
        raise ValueError(f"masked has shape {masked_BT.shape}, but the tokens have {tokens_BT.shape}")
    t_B = jnp.asarray(t_B, jnp.float32)
    packed = packed_texts(attention_mask)
    if packed is None and packed_texts(mask) is not None:
        raise ValueError("the argument mask must not contain masks.Packed; pass masks.Packed as attention_mask")
    if packed is not None and packed.length_BM.shape[:1] != tokens_BT.shape[:1]:
        raise ValueError(
            f"masks.Packed has lengths for {len(packed.length_BM)} rows, but the tokens have {len(tokens_BT)} rows"
        )
    if packed is not None and t_B.shape == packed.length_BM.shape:
        t_B = packed.spread(t_B, jnp.zeros((1, 1), jnp.float32), tokens_BT.shape[1])
    elif t_B.shape != tokens_BT.shape[:1]:
        or_text = "" if packed is None else f", or one per text, {packed.length_BM.shape}"
        raise ValueError(f"t has shape {t_B.shape}, expected one noise level per row, {tokens_BT.shape[:1]}{or_text}")
    padding, positions_BT = mask_and_positions(tokens_BT.shape, attention_mask, None)
    mask = padding if mask is None else mask & padding
    with sharding.mesh_context(model):
        arrays = (tokens_BT, masked_BT, t_B, mask, positions_BT, normalizer, dropout_keys, packed)
        return _loss(model, *arrays, weight=weight, focal=focal)


def packed_texts(mask: Any) -> Packed | None:
    """Returns the `Packed` mask that `mask` is, or that it combines with other masks by `&`; None if there is none."""
    found = conjuncts(mask) if isinstance(mask, Mask) else ()
    return next((conjunct for conjunct in found if isinstance(conjunct, Packed)), None)


def sums_by_time(
    token_nll_BT: Float[Array, "B T"], masked_BT: Bool[Array, "B T"], t: NoiseLevels
) -> tuple[Float[jax.Array, "times"], Float[jax.Array, "times"]]:
    """Sums the cross entropies, and counts the masked positions, in each of `TIME_BUCKETS` ranges of noise levels.

    Args:
      token_nll_BT: cross entropy of each masked position in nats, 0 elsewhere, as `masked_diffusion_loss` returns it.
      masked_BT: true at masked positions.
      t: noise level of each row [B], or of each token [B, T], in [0, 1].

    Returns:
      The summed cross entropies and the numbers of masked positions, each float32 [TIME_BUCKETS]. The results of the
      microbatches of a step can be added.
    """
    t_B, masked_BT = jnp.asarray(t), jnp.asarray(masked_BT)
    if t_B.ndim == 2:  # each position is then treated as a row with one token
        t_B, token_nll_BT, masked_BT = t_B.reshape(-1), jnp.reshape(token_nll_BT, (-1, 1)), masked_BT.reshape(-1, 1)
    bucket_B = jnp.clip((t_B * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    in_bucket = (bucket_B[:, None] == jnp.arange(TIME_BUCKETS)).astype(jnp.float32)  # [B, TIME_BUCKETS]
    row_sums = jnp.sum(token_nll_BT, axis=1), jnp.sum(masked_BT, axis=1, dtype=jnp.float32)
    nll, masked = (jnp.sum(in_bucket * sum_B[:, None], axis=0) for sum_B in row_sums)
    return nll, masked


# This function is jitted because each call makes new functions as the bodies of its loops. Without jit, every call
# would compile these loops again.
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
    packed: Packed | None,
    *,
    weight: LossWeight,
    focal: Focal | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes `masked_diffusion_loss` for checked arguments, with one mask that combines both masks.

    `t_B` is [B], or [B, T] if each text of a row has its own noise level.
    """
    noisy_BT = sharding.constrain(jnp.where(masked_BT, model.config.mask_token_id, tokens_BT), "batch", "tokens")
    hidden_BTD = model.hidden(noisy_BT, mask, positions_BT, dropout_keys)
    with jax.named_scope("loss"):
        start_BT = None if packed is None else packed.starts(tokens_BT.shape[1])
        weights_BT = weight(masked_BT, t_B) if start_BT is None else weight(masked_BT, t_B, start_BT)
        weight_BT = jnp.where(masked_BT, weights_BT, 0.0)
        shifted = sharding.token_shards(*tokens_BT.shape)[1] > 1 or start_BT is not None
        if shifted:
            # If the tokens of a row are divided over devices, the right shift is done here, because on the whole array
            # the compiler only has to send one hidden state per row to the neighbouring device. It is also done here for
            # rows of several texts, whose first tokens are predicted from their own position.
            before_BTD = jnp.concatenate([hidden_BTD[:, :1], hidden_BTD[:, :-1]], axis=1)
            hidden_BTD = before_BTD if start_BT is None else jnp.where(start_BT[..., None], hidden_BTD, before_BTD)
            hidden_BTD = sharding.constrain(hidden_BTD, "batch", "tokens", "width")
        return loss_of_states(
            model, hidden_BTD, tokens_BT, masked_BT, weight_BT, normalizer, shifted=shifted, focal=focal
        )


def loss_of_states(
    model: Dream,
    hidden_BTD: Float[jax.Array, "B T D"],
    tokens_BT: Int[jax.Array, "B T"],
    masked_BT: Bool[jax.Array, "B T"],
    weight_BT: Float[jax.Array, "B T"],
    normalizer: Float[jax.Array, ""] | Int[jax.Array, ""] | None,
    *,
    shifted: bool,
    focal: Focal | None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """Returns the loss and the dict of `masked_diffusion_loss`, computed from the hidden states.

    Args:
      model: the model, whose output projection is used.
      hidden_BTD: the hidden states after the final norm, in the compute dtype.
      tokens_BT, masked_BT, normalizer, focal: as in `masked_diffusion_loss`.
      weight_BT: the factor on each masked position, float32, 0 elsewhere.
      shifted: whether the state at a position predicts the token at this position. False means that it predicts the next
        token, and that the first token of a row is predicted from its own position. It must be true if the tokens of a row
        are divided over devices.
    """
    kernel_DV = model.unembedding().astype(model.compute_dtype)
    groups = sharding.token_shards(*tokens_BT.shape)
    total, token_nll_BT, correct_BT = _masked_cross_entropy(
        focal, groups, shifted, hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT
    )
    token_nll_BT = jax.lax.stop_gradient(token_nll_BT)
    num_masked = jnp.sum(masked_BT, dtype=jnp.float32)
    # The denominator is at least 1, so that a batch without masked positions has the loss 0 and not 0 / 0.
    denominator = jnp.maximum(num_masked if normalizer is None else normalizer, 1).astype(jnp.float32)
    aux = {
        "num_masked": num_masked,
        "num_correct": jnp.sum(correct_BT, dtype=jnp.float32),
        "nll": jnp.sum(token_nll_BT) / jnp.maximum(num_masked, 1.0),
        "token_nll": token_nll_BT,
        "token_correct": correct_BT,
    }
    return total / denominator, aux


def token_losses(
    model: Dream,
    tokens_BT: Int[Array, "B T"],
    masked_BT: Bool[Array, "B T"],
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | Mask | None = None,
    *,
    mask: Mask | None = None,
    dropout_keys: DropoutKeys = None,
) -> tuple[Float[jax.Array, "B T"], Bool[jax.Array, "B T"]]:
    """Returns the cross entropy of each masked position, which can be differentiated with respect to the parameters.

    This is for losses that are no sum with constant weights, such as functions of the likelihood of a whole row. The logits
    are computed again in the backward pass, in chunks, so no array [B, T, V] is stored.

    Args:
      model: the model, with float32 or bfloat16 parameters.
      tokens_BT: ids of the clean tokens.
      masked_BT: true where the model receives the mask token instead of the clean token.
      attention_mask, mask, dropout_keys: as in `masked_diffusion_loss`, but without `masks.Packed`.

    Returns:
      The cross entropies in nats, float32 [B, T], 0 at other positions; and whether the most probable token is the clean
      one, bool [B, T], false at other positions.

    Raises:
      ValueError: an id is outside the vocabulary, or rows hold several texts.
    """
    check_ids(tokens_BT, model.config.vocab_size)
    tokens_BT, masked_BT = jnp.asarray(tokens_BT), jnp.asarray(masked_BT).astype(bool)
    if packed_texts(attention_mask) is not None or packed_texts(mask) is not None:
        raise ValueError("masks.Packed is for rows of several texts, but here each row must be one text")
    padding, positions_BT = mask_and_positions(tokens_BT.shape, attention_mask, None)
    mask = padding if mask is None else mask & padding
    with sharding.mesh_context(model):
        return _token_losses(model, tokens_BT, masked_BT, mask, positions_BT, dropout_keys)


@jax.jit
def _token_losses(
    model: Dream,
    tokens_BT: jax.Array,
    masked_BT: jax.Array,
    mask: Mask,
    positions_BT: jax.Array,
    dropout_keys: DropoutKeys,
) -> tuple[jax.Array, jax.Array]:
    """Computes `token_losses` for checked arguments, with one mask that combines both masks."""
    noisy_BT = sharding.constrain(jnp.where(masked_BT, model.config.mask_token_id, tokens_BT), "batch", "tokens")
    hidden_BTD = model.hidden(noisy_BT, mask, positions_BT, dropout_keys)
    with jax.named_scope("loss"):
        groups = sharding.token_shards(*tokens_BT.shape)
        shifted = groups[1] > 1
        if shifted:  # as in `_loss`
            hidden_BTD = jnp.concatenate([hidden_BTD[:, :1], hidden_BTD[:, :-1]], axis=1)
            hidden_BTD = sharding.constrain(hidden_BTD, "batch", "tokens", "width")
        kernel_DV = model.unembedding().astype(model.compute_dtype)
        return _token_cross_entropy(groups, shifted, hidden_BTD, kernel_DV, tokens_BT, masked_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_cross_entropy(
    groups: tuple[int, int],
    shifted: bool,
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    tokens_BT: jax.Array,
    masked_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns two arrays [B, T] for the masked positions: the cross entropy, and whether the prediction is correct."""
    weight_BT = jnp.ones(tokens_BT.shape, jnp.float32)  # without gradients the weights change nothing that is returned
    arrays = (hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT)
    (_, token_nll_BT, correct_BT), _ = _over_chunks(None, groups, shifted, *arrays, gradients="none")
    return token_nll_BT, correct_BT


def _token_forward(groups, shifted, hidden_BTD, kernel_DV, tokens_BT, masked_BT):  # type: ignore[no-untyped-def]
    arrays = tuple(argument.value for argument in (hidden_BTD, kernel_DV, tokens_BT, masked_BT))
    # The second entry says by its length whether the gradient of the kernel is needed: residuals must be arrays.
    return _token_cross_entropy(groups, shifted, *arrays), (arrays, (None,) * kernel_DV.perturbed)


def _token_backward(groups, shifted, residuals, cotangents):  # type: ignore[no-untyped-def]
    (hidden_BTD, kernel_DV, tokens_BT, masked_BT), both = residuals
    # The derivative by the cross entropy of a position is the weight of the position in a weighted sum.
    weight_BT = cotangents[0]
    arrays = (hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT)
    gradients = _over_chunks(None, groups, shifted, *arrays, gradients="both" if both else "hidden")[1]
    assert gradients is not None
    return *gradients, None, None


_token_cross_entropy.defvjp(_token_forward, _token_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _masked_cross_entropy(
    focal: Focal | None,
    groups: tuple[int, int],
    shifted: bool,
    hidden_BTD: Float[jax.Array, "B T D"],
    kernel_DV: Float[jax.Array, "D V"],
    tokens_BT: Int[jax.Array, "B T"],
    masked_BT: Bool[jax.Array, "B T"],
    weight_BT: Float[jax.Array, "B T"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the sum of the weighted cross entropies (float32), and two arrays [B, T] for reports.

    These are the cross entropy of each masked position (float32, 0 elsewhere), and whether its most probable token is
    correct (bool, false elsewhere). `groups` has the number of shards of B and that of T. `shifted` says whether the
    hidden states are shifted already; it must be true if T is sharded.
    """
    arrays = (hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT)
    outputs, _ = _over_chunks(focal, groups, shifted, *arrays, gradients="none")
    return outputs


# `_forward` and `_backward` are the rules of custom_vjp. Only jax calls them, so they have no type annotations.
def _forward(focal, groups, shifted, hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT):  # type: ignore[no-untyped-def]
    arrays = (argument.value for argument in (hidden_BTD, kernel_DV, tokens_BT, masked_BT, weight_BT))
    # With an adapter the kernel is frozen, so its gradient is not needed.
    return _over_chunks(focal, groups, shifted, *arrays, gradients="both" if kernel_DV.perturbed else "hidden")


def _backward(focal, groups, shifted, gradients, cotangents):  # type: ignore[no-untyped-def]
    # Only the sum is differentiated. The outputs for each position are only reported.
    scale = cotangents[0]

    def scaled(gradient: jax.Array) -> jax.Array:
        # The product is float32, because rounding the factor to bfloat16 would change all gradients of the batch by
        # the same factor.
        return (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)

    hidden_gradient, kernel_gradient = gradients
    return scaled(hidden_gradient), None if kernel_gradient is None else scaled(kernel_gradient), None, None, None


# With symbolic_zeros the forward rule learns from `perturbed` which arguments are differentiated.
_masked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(
    focal: Focal | None,
    groups: tuple[int, int],
    shifted: bool,
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    tokens_BT: jax.Array,
    masked_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    gradients: Literal["none", "hidden", "both"],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None] | None]:
    """Computes the outputs of `_masked_cross_entropy`, and their gradients, in one loop over chunks of positions.

    `gradients` says which gradients of the sum are computed: none, that of the hidden states, or also that of the
    kernel. They are computed chunk by chunk, while the logits of the chunk are in memory.

    The B x T positions are divided into S groups of R positions, one for each shard of B and T. Each group is sorted so
    that masked positions come first; no position leaves its device. A chunk has C positions of every group. The loop
    ends after the last masked position of the group with the largest number of masked positions.
    """
    batch, length, width = hidden_BTD.shape
    vocab = kernel_DV.shape[1]
    num_groups, tokens_per_group = math.prod(groups), length // groups[1]
    rows = batch // groups[0] * tokens_per_group
    chunk = chunk_rows(rows, vocab, current_target().platform)
    padding = -rows % chunk
    # The kernel is all-gathered once, before the loop. Otherwise every chunk would gather the kernel again, and also
    # the [chunk, V] gradients of the logits of all devices, which are larger.
    kernel_DV = sharding.constrain(kernel_DV, None, "vocab")

    def on_groups(x: jax.Array, *axes: str | None) -> jax.Array:
        return sharding.constrain(x, "token_group", *axes, *[None] * (x.ndim - 1 - len(axes)))

    def grouped(x: jax.Array) -> jax.Array:
        x = x.reshape(groups[0], batch // groups[0], groups[1], tokens_per_group, *x.shape[2:]).swapaxes(1, 2)
        return on_groups(x.reshape(num_groups, rows, *x.shape[4:]))

    def ungrouped(x: jax.Array) -> jax.Array:
        x = x.reshape(*groups, batch // groups[0], tokens_per_group, *x.shape[2:]).swapaxes(1, 2)
        return sharding.constrain(x.reshape(batch, length, *x.shape[4:]), "batch", "tokens", *[None] * (x.ndim - 4))

    hidden_SRD, token_SR = grouped(hidden_BTD), grouped(tokens_BT)
    masked_SR, weight_SR = grouped(masked_BT), grouped(weight_BT)
    order_SR = jnp.argsort(~masked_SR, axis=1, stable=True)
    # The padding is an index out of range: reads at this index give zeros, and writes are dropped.
    order_SR = jnp.pad(order_SR, ((0, 0), (0, padding)), constant_values=rows)
    count_S = jnp.sum(masked_SR, axis=1, dtype=jnp.int32)

    # vmap over the groups tells XLA's partitioner that no read or write crosses the groups, and so the devices.
    @jax.vmap
    def read(x_R: jax.Array, index_C: jax.Array) -> jax.Array:
        return x_R.at[index_C].get(mode="fill", fill_value=0)

    @jax.vmap
    def write(x_R: jax.Array, index_C: jax.Array, value_C: jax.Array) -> jax.Array:
        return x_R.at[index_C].set(value_C, mode="drop")

    @jax.vmap
    def add(x_R: jax.Array, index_C: jax.Array, value_C: jax.Array) -> jax.Array:
        return x_R.at[index_C].add(value_C, mode="drop")

    def add_chunk(chunk_index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total_S, nll_SR, correct_SR, *gradient_sums = carry
        index_SC = jax.lax.dynamic_slice_in_dim(order_SR, chunk_index * chunk, chunk, axis=1)
        is_masked_SC = chunk_index * chunk + jnp.arange(chunk) < count_S[:, None]
        # The right shift: a token is predicted from the hidden state at the position before it. The first token of a
        # row is predicted from the hidden state at its own position.
        source_SC = index_SC if shifted else jnp.where(index_SC % length == 0, index_SC, index_SC - 1)
        h_SCD = read(hidden_SRD, source_SC)
        target_SC = read(token_SR, index_SC)
        weight_SC = jnp.where(is_masked_SC, read(weight_SR, index_SC), 0.0)

        logits_SCV = jnp.einsum("SCD,DV->SCV", h_SCD, kernel_DV, preferred_element_type=jnp.float32)
        logits_SCV = on_groups(logits_SCV, None, "vocab")
        max_logit_SC = jnp.max(logits_SCV, axis=-1)
        exp_SCV = jnp.exp(logits_SCV - max_logit_SC[..., None])
        sum_exp_SC = jnp.sum(exp_SCV, axis=-1)
        is_target_SCV = jnp.arange(vocab) == target_SC[..., None]
        target_logit_SC = jnp.sum(jnp.where(is_target_SCV, logits_SCV, 0.0), axis=-1)
        nll_SC = jnp.log(sum_exp_SC) + max_logit_SC - target_logit_SC
        value_SC, slope_SC = _focal_value_and_slope(nll_SC, focal)
        total_S = total_S + jnp.sum(weight_SC * value_SC, axis=1)
        written_SC = jnp.where(is_masked_SC, index_SC, rows)
        nll_SR = write(nll_SR, written_SC, nll_SC)
        correct_SR = write(correct_SR, written_SC, target_logit_SC >= max_logit_SC)
        if gradients != "none":
            dnll_SC1 = (weight_SC * slope_SC)[..., None]
            dlogits_SCV = (exp_SCV / sum_exp_SC[..., None] - is_target_SCV.astype(jnp.float32)) * dnll_SC1
            dlogits_SCV = dlogits_SCV.astype(kernel_DV.dtype)
            dhidden_SCD = jnp.einsum("SCV,DV->SCD", dlogits_SCV, kernel_DV, preferred_element_type=jnp.float32)
            # The gradients are added and not set, because positions 0 and 1 of a row read the same hidden state.
            gradient_sums[0] = add(gradient_sums[0], source_SC, dhidden_SCD)
        if gradients == "both":
            dkernel_SDV = jnp.einsum("SCD,SCV->SDV", h_SCD, dlogits_SCV, preferred_element_type=jnp.float32)
            gradient_sums[1] = on_groups(gradient_sums[1] + dkernel_SDV, None, "vocab")
        return total_S, nll_SR, correct_SR, *gradient_sums

    start: tuple[jax.Array, ...] = (
        jnp.zeros((num_groups,), jnp.float32),
        jnp.zeros((num_groups, rows), jnp.float32),
        jnp.zeros((num_groups, rows), bool),
    )
    if gradients != "none":
        start += (on_groups(jnp.zeros((num_groups, rows, width), jnp.float32)),)
    if gradients == "both":
        # There is one partial sum per group. The partial sums are added once, after the loop.
        start += (on_groups(jnp.zeros((num_groups, width, vocab), jnp.float32), None, "vocab"),)
    chunks = (jnp.max(count_S) + chunk - 1) // chunk
    total_S, nll_SR, correct_SR, *gradient_sums = jax.lax.fori_loop(0, chunks, add_chunk, start)
    outputs = (jnp.sum(total_S), ungrouped(nll_SR), ungrouped(correct_SR))
    if gradients == "none":
        return outputs, None
    hidden_gradient = ungrouped(gradient_sums[0]).astype(hidden_BTD.dtype)
    if gradients == "hidden":
        return outputs, (hidden_gradient, None)
    kernel_gradient = sharding.constrain(jnp.sum(gradient_sums[1], axis=0), "embed", "vocab")
    # The barrier makes the compiler finish both gradients now. The gradient of the kernel is first needed by the
    # optimizer, so without the barrier its float32 partial sums [D, V] (2 GiB for Dream-7B) may stay in memory during
    # the whole backward pass.
    hidden_gradient, kernel_gradient = jax.lax.optimization_barrier((hidden_gradient, kernel_gradient))
    # The second barrier keeps the rounding to the dtype of the kernel after the sum, and before the backward pass.
    return outputs, jax.lax.optimization_barrier((hidden_gradient, kernel_gradient.astype(kernel_DV.dtype)))


def chunk_rows(rows: int, vocab: int, platform: str) -> int:
    """Returns the number of positions in a chunk, on a device that holds `rows` positions of the batch.

    Args:
      rows: number of positions on the device, masked or not.
      vocab: number of tokens of the vocabulary.
      platform: the name of the platform in jax: "cpu", "gpu" or "tpu".
    """
    most = rows
    if platform == "cpu":
        most = min(_CPU_ROWS, max(_CPU_FEWEST_ROWS, rows // 8, _CPU_SMALL_BLOCK // vocab))
    return min(rows, most, max(1, _LOGIT_ELEMENTS // vocab))


def _focal_value_and_slope(nll: jax.Array, focal: Focal | None) -> tuple[jax.Array, jax.Array]:
    """Returns the focal loss of each position, and its derivative with respect to the cross entropy `nll`."""
    if focal is None:
        return nll, jnp.ones_like(nll)
    p = jnp.exp(-nll)
    modulation = (1.0 - p) ** focal.gamma
    slope = modulation + focal.gamma * (1.0 - p) ** (focal.gamma - 1.0) * p * nll
    return focal.alpha * modulation * nll, focal.alpha * slope
