"""The objective of block diffusion: noise for each block of an answer, and the cross entropy at the masked positions.

An answer is divided into blocks, which are sampled one after the other. Each block is sampled as in masked diffusion,
when the prompt and all earlier blocks are known. In training every row is therefore computed as two streams: a noised
one, whose masked tokens are learned, and a clean one, in which the noised blocks see the blocks before them.
`masks.TwoStream` says which tokens a token sees.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks, sharding
from dream_jax.masks import BlockDiffusion, Mask, Packed
from dream_jax.model import Dream, DropoutKeys, check_ids, mask_and_positions
from dream_jax.objective import (
    CartWeight,
    Focal,
    InverseTimeWeight,
    LossWeight,
    loss_of_states,
    packed_texts,
    row_numbers,
)
from dream_jax.packed_noise import text_numbers
from dream_jax.shapes import Array

# The fractional part of the golden ratio, 0.618..., times 2^32. Its multiples, modulo 1, are spread more evenly than
# random numbers.
_GOLDEN_RATIO = 2654435769


def draw_block_noise(
    key: jax.Array,
    row_B: Int[Array, "B"],
    maskable_BT: Bool[Array, "B T"],
    global_batch: int,
    *,
    size: int,
    valid_BT: Bool[Array, "B T"] | None = None,
) -> tuple[Float[jax.Array, "B T"], Bool[jax.Array, "B T"]]:
    """Draws the noise levels and the masked positions of one training step by block diffusion.

    The noise level of block k of a row is t + k * 0.618... modulo 1, with the noise level t that `objective.draw_noise`
    draws for the row. So each level is uniform in [0, 1), and the levels are spread evenly over the blocks of a row and
    over the rows of the batch. A maskable position is masked with a probability that is the noise level of its block.
    The noise of a row does not depend on how the rows are divided over microbatches and devices.

    Args:
      key: the random key of the step.
      row_B: index of each row in the global batch, in [0, K).
      maskable_BT: true where a token may be masked. The answer of a row begins at its first maskable token.
      global_batch: K, the number of rows in the global batch.
      size: number of tokens in a block.
      valid_BT: false at padding; None for rows without padding.

    Returns:
      The noise level of each token, float32 [B, T] in [0, 1), and the masked positions, bool [B, T]. Prompt and
      padding, which are never masked, have the noise level of block 0.
    """
    t_B, u_BT = row_numbers(key, row_B, maskable_BT.shape[1], global_batch)
    mask = _mask_of_rows(size, valid_BT, maskable_BT)
    t_BT = _levels(t_B[:, None], masks.block_numbers(mask, maskable_BT.shape[1]))
    return t_BT, jnp.asarray(maskable_BT) & (u_BT < t_BT)


def draw_packed_block_noise(
    key: jax.Array, packed: Packed, text_BM: Int[Array, "B M"], maskable_BT: Bool[Array, "B T"], *, size: int
) -> tuple[Float[jax.Array, "B T"], Bool[jax.Array, "B T"]]:
    """Draws the noise of `draw_block_noise` for rows that hold several texts, as `packed_noise` describes it.

    Args:
      key: the random key of the step.
      packed: the lengths of the texts of the global batch.
      text_BM: index of each text in the global batch, in [0, K); -1 after the last text of a row.
      maskable_BT: true where a token may be masked; false in the prompts and at padding.
      size: number of tokens in a block.

    Returns:
      The noise level of each token, float32 [B, T] in [0, 1), and the masked positions, bool [B, T].
    """
    num_tokens = maskable_BT.shape[1]
    t_BM, u_BT = text_numbers(key, packed, text_BM, num_tokens)
    t_BT = packed.spread(t_BM, jnp.zeros((1, 1), jnp.float32), num_tokens)
    t_BT = _levels(t_BT, masks.block_numbers(_mask_of_texts(size, packed, maskable_BT), num_tokens))
    return t_BT, jnp.asarray(maskable_BT) & (u_BT < t_BT)


def complement(
    t_BT: Float[Array, "B T"], masked_BT: Bool[Array, "B T"], maskable_BT: Bool[Array, "B T"]
) -> tuple[Float[jax.Array, "B T"], Bool[jax.Array, "B T"]]:
    """Returns the noise of the complementary copy of each row: noise levels, float32 [B, T], and masked positions.

    The masked positions of the copy, bool [B, T], are the maskable ones that are not masked in the row itself. Its
    noise levels are 1 - t. So each maskable token is masked in exactly one of the row and its copy.
    """
    return 1.0 - jnp.asarray(t_BT), jnp.asarray(maskable_BT) & ~jnp.asarray(masked_BT)


def block_diffusion_loss(
    model: Dream,
    tokens_BT: Int[Array, "B T"],
    masked_BT: Bool[Array, "B T"],
    t_BT: Float[Array, "B T"],
    weight: LossWeight = InverseTimeWeight(),  # noqa: B008 - immutable
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | Packed | None = None,
    *,
    size: int,
    answer_BT: Bool[Array, "B T"] | None = None,
    focal: Focal | None = None,
    normalizer: Float[jax.Array, ""] | Int[jax.Array, ""] | None = None,
    dropout_keys: DropoutKeys = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """Computes the loss of block diffusion: the weighted cross entropy of the masked tokens of each block.

    A block is computed with clean tokens before it. The loss is the sum over masked positions, divided by their number,
    as in `masked_diffusion_loss`. The first token of a block is predicted from the state of the clean token before it,
    the other tokens from the state of the noised token before them. The first token of a text without a prompt is
    predicted from its own noised position.

    Args:
      model: the model, with float32 or bfloat16 parameters.
      tokens_BT: ids of the clean tokens.
      masked_BT: true where the noised stream has the mask token; only in answers.
      t_BT: noise level of each token, in [0, 1], equal in all tokens of a block.
      weight: the factor on each masked position: InverseTimeWeight(), LinearWeight() or UniformWeight().
      attention_mask: an array that is nonzero at valid tokens, for left-padded batches; or `masks.Packed` for rows that
        hold several texts. Padding on the right must count as valid, as in `masked_diffusion_loss`.
      size: number of tokens in a block. With the length of the longest answer, or more, every answer is one block.
      answer_BT: true at tokens of the answers. The prompt of a text is what is before the first of these tokens; it is
        clean, and the blocks are counted from its end. None means that the texts have no prompts.
      focal: changes the cross entropy of each position to the focal loss; None means no change.
      normalizer: the denominator. The default is the number of masked positions in the (global) batch, at least 1.
      dropout_keys: one random key per row, for the dropout of an adapter; None means no dropout.

    Returns:
      The loss (float32 scalar), and a dict of values to report, as `masked_diffusion_loss` returns it.

    Raises:
      ValueError: a shape does not match the tokens; `size` is below 1; the weight is a `CartWeight`; `attention_mask`
        is a mask other than `Packed`; a token of a prompt or of padding is masked; or an id is outside the vocabulary.
        Masked positions and ids are not checked when jax traces the call.
    """
    check_weight(weight)
    check_ids(tokens_BT, model.config.vocab_size)
    tokens_BT, masked_BT, t_BT = jnp.asarray(tokens_BT), jnp.asarray(masked_BT).astype(bool), jnp.asarray(t_BT)
    for name, array in [("masked", masked_BT), ("t", t_BT), ("answer", answer_BT)]:
        if array is not None and array.shape != tokens_BT.shape:
            raise ValueError(f"{name} has shape {array.shape}, but the tokens have {tokens_BT.shape}")
    packed = packed_texts(attention_mask)
    if packed is not None and packed.length_BM.shape[:1] != tokens_BT.shape[:1]:
        raise ValueError(
            f"masks.Packed has lengths for {len(packed.length_BM)} rows, but the tokens have {len(tokens_BT)} rows"
        )
    if isinstance(attention_mask, Mask) and attention_mask is not packed:
        raise ValueError(
            f"attention_mask is the mask {type(attention_mask).__name__}, but block diffusion has a mask of its own; pass "
            "an array that is nonzero at valid tokens, or masks.Packed"
        )
    _, positions_BT = mask_and_positions(tokens_BT.shape, attention_mask, None)
    if packed is not None:
        answer_BT = packed.valid(tokens_BT.shape[1]) if answer_BT is None else answer_BT
        mask = _mask_of_texts(size, packed, answer_BT)
    else:
        valid_BT = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        if answer_BT is None:
            answer_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        mask = _mask_of_rows(size, valid_BT, answer_BT)
    if not isinstance(masked_BT, jax.core.Tracer) and masked_BT.is_fully_addressable:
        wrong = masked_BT & (masks.block_numbers(mask, tokens_BT.shape[1]) < 0)
        if not isinstance(wrong, jax.core.Tracer) and bool(wrong.any()):
            raise ValueError(
                f"{int(wrong.sum())} tokens of prompts or padding are masked; under block diffusion prompts are clean: "
                "mask tokens of the answers only, and say with answer_BT where they begin"
            )
    with sharding.mesh_context(model):
        arrays = (tokens_BT, masked_BT, t_BT.astype(jnp.float32), mask, positions_BT, normalizer, dropout_keys)
        return _loss(model, *arrays, weight=weight, focal=focal)


def check_weight(weight: LossWeight) -> None:
    """Raises ValueError for a loss weight that has no meaning under block diffusion."""
    if isinstance(weight, CartWeight):
        raise ValueError(
            "the weight CART counts the unmasked tokens on both sides of a token, but under block diffusion a token sees "
            "nothing after its block; take the weight inverse-time, linear or uniform"
        )


@functools.partial(jax.jit, static_argnames=("weight", "focal"))
def _loss(
    model: Dream,
    tokens_BT: jax.Array,
    masked_BT: jax.Array,
    t_BT: jax.Array,
    mask: Mask,
    positions_BT: jax.Array,
    normalizer: jax.Array | None,
    dropout_keys: DropoutKeys,
    *,
    weight: LossWeight,
    focal: Focal | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes `block_diffusion_loss` for checked arguments; `mask` is that of one stream."""
    clean_BT = sharding.constrain(tokens_BT, "batch", "tokens")
    noised_BT = sharding.constrain(jnp.where(masked_BT, model.config.mask_token_id, tokens_BT), "batch", "tokens")
    source_BTD = model.hidden_two_streams(noised_BT, clean_BT, mask, positions_BT, dropout_keys)
    with jax.named_scope("loss"):
        weight_BT = jnp.where(masked_BT, weight(masked_BT, t_BT), 0.0)
        return loss_of_states(model, source_BTD, tokens_BT, masked_BT, weight_BT, normalizer, shifted=True, focal=focal)


def _mask_of_rows(size: int, valid_BT: Bool[Array, "B T"] | None, answer_BT: Bool[Array, "B T"]) -> Mask:
    """Returns the mask of one stream for rows of one text."""
    everywhere_BT = jnp.ones(answer_BT.shape, bool) if valid_BT is None else jnp.asarray(valid_BT)
    mask = BlockDiffusion(size).for_rows(everywhere_BT, answer_BT)
    return mask if valid_BT is None else mask & masks.KeyPadding(everywhere_BT)


def _mask_of_texts(size: int, packed: Packed, answer_BT: Bool[Array, "B T"]) -> Mask:
    """Returns the mask of one stream for rows of several texts."""
    return BlockDiffusion(size).for_texts(packed.positions(answer_BT.shape[1]), answer_BT) & packed


def _levels(t_bT: Float[jax.Array, "B t"], block_bT: Int[jax.Array, "b T"]) -> Float[jax.Array, "B T"]:
    """Returns the noise level of each token from the level of its text and the number of its block."""
    # The multiple of the golden ratio is computed modulo 2^32 by integers, because a float32 product with a large number
    # has too few digits after the point. A prompt has the level of block 0, which is not used.
    turn_bT = jnp.maximum(block_bT, 0).astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO)
    level_BT = t_bT + (turn_bT >> 8).astype(jnp.float32) * 2.0**-24
    return jnp.where(level_BT >= 1.0, level_BT - 1.0, level_BT)
