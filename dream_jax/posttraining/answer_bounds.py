"""The likelihood bound of an answer, estimated with a few masks, and the noise of these masks.

A masked diffusion model gives a lower bound of the log-likelihood of an answer of L tokens: the mean, over the number l of
masked tokens (1 to L with equal probability) and over which they are, of L / l times the log-probabilities of the masked
tokens (LLaDA, arXiv 2502.09992, equation 6). It is estimated with n draws of (t, mask), one mask for each t. The noise
levels t are (k + u) / n for k = 0..n-1, so that they cover [0, 1) evenly, and l is floor(t L) + 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import sharding
from dream_jax.masks import Mask
from dream_jax.model import Dream, DropoutKeys
from dream_jax.objective import token_losses
from dream_jax.posttraining.preference_settings import SharedDraws
from dream_jax.shapes import Array

# These numbers make the keys of this noise differ from all others that are made from the same seed (`train_step`).
_PAIRS, _HELD_OUT = (1 << 30) + 16, (1 << 30) + 17


def pair_key(seed: int, *, held_out: bool = False) -> jax.Array:
    """Returns the key of the noise of all pairs of a run, or of all held-out pairs."""
    return jax.random.fold_in(jax.random.key(seed), _HELD_OUT if held_out else _PAIRS)


def draw_masks(
    key: jax.Array,
    draw_P: Int[Array, "P"],
    maskable_PAT: Bool[Array, "P A T"],
    draws: int,
    shared: SharedDraws,
    *,
    of_reference: bool = False,
) -> tuple[Float[jax.Array, "P A n"], Bool[jax.Array, "P A n T"]]:
    """Draws the noise of pairs of answers. It depends on the key and on the number of each pair, and on no other pair.

    The same random numbers belong to the same tokens of both answers, counted from the beginning of the answer.

    Args:
      key: the key of the run.
      draw_P: the number of each pair from which its noise follows.
      maskable_PAT: for both answers (A = 2) of each pair, true at the tokens of the answer.
      draws: n, the number of noise levels.
      shared: between which bounds the noise is the same.
      of_reference: whether the noise is for the reference; it differs only with `shared` "none".

    Returns:
      The noise levels, float32 [P, 2, n] in [0, 1), and the masked tokens, bool [P, 2, n, T]: at least one in each answer
      that has a token.
    """
    length = maskable_PAT.shape[-1]
    keys_P = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, draw_P)
    answers = jnp.arange(2) * int(shared != "all") + 2 * int(of_reference and shared == "none")
    keys_PA = jax.vmap(lambda one: jax.vmap(lambda answer: jax.random.fold_in(one, answer))(answers))(keys_P)

    def numbers(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        level_key, bits_key = jax.random.split(key)
        t_n = (jnp.arange(draws, dtype=jnp.float32) + jax.random.uniform(level_key)) / draws
        # Integers of 32 bits, because equal numbers would mask one token too many, and float32 has fewer values.
        return jnp.minimum(t_n, 1.0 - 2.0**-24), jax.random.bits(bits_key, (draws, length), jnp.uint32)

    t_PAn, bits_PAnT = jax.vmap(jax.vmap(numbers))(keys_PA)
    maskable_PAT = jnp.asarray(maskable_PAT)
    index_PAT = jnp.maximum(jnp.cumsum(maskable_PAT, axis=-1) - 1, 0)
    bits_PAnT = jnp.take_along_axis(bits_PAnT, index_PAT[:, :, None], axis=-1)
    size_PA = jnp.sum(maskable_PAT, axis=-1, dtype=jnp.int32)
    count_PAn = jnp.floor(t_PAn * size_PA[..., None].astype(jnp.float32)).astype(
        jnp.int32
    )  # the number of masked tokens, minus 1
    bits_PAnT = jnp.where(maskable_PAT[:, :, None], bits_PAnT, jnp.uint32(2**32 - 1))
    most_PAn1 = jnp.take_along_axis(jnp.sort(bits_PAnT, axis=-1), count_PAn[..., None], axis=-1)
    return t_PAn, maskable_PAT[:, :, None] & (bits_PAnT <= most_PAn1)


def repeated_rows(x: jax.Array, draws: int) -> jax.Array:
    """Returns an array [P, 2, ...] as [P 2 n, ...], in which each row stands n times, and rows of a pair stay together."""
    x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], draws, *x.shape[2:]))
    return flat_rows(x)


def flat_rows(x: jax.Array) -> jax.Array:
    """Returns an array [P, 2, n, ...] as [P 2 n, ...], sharded over the devices like the rows of a batch."""
    x = x.reshape(-1, *x.shape[3:])
    return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))


def answer_bounds(
    model: Dream,
    tokens_PAT: Int[Array, "P A T"],
    maskable_PAT: Bool[Array, "P A T"],
    masked_PAnT: Bool[Array, "P A n T"],
    valid_PAT: Bool[Array, "P A T"],
    mask: Mask | None = None,
    dropout_keys: DropoutKeys = None,
) -> tuple[Float[jax.Array, "P A n"], Float[jax.Array, "R T"], Bool[jax.Array, "R T"]]:
    """Estimates the likelihood bounds of answers; differentiable with respect to the parameters of the model.

    Args:
      model: the model.
      tokens_PAT: ids of prompts and answers.
      maskable_PAT: true at the tokens of the answers.
      masked_PAnT: true at the masked tokens of each draw.
      valid_PAT: false before the first token of a row.
      mask: the attention mask that the model is trained with; it may depend on rows, of which there are R = P 2 n.
      dropout_keys: one key for each of the R rows; None for no dropout.

    Returns:
      The bound in nats of each answer by each draw, float32 [P, 2, n], 0 for an answer without tokens; and for the R rows
      the cross entropy of each masked token, and whether the most probable token is correct, [R, T].
    """
    draws = masked_PAnT.shape[2]
    tokens_RT, valid_RT = (repeated_rows(jnp.asarray(x), draws) for x in (tokens_PAT, valid_PAT))
    nll_RT, correct_RT = token_losses(
        model, tokens_RT, flat_rows(jnp.asarray(masked_PAnT)), valid_RT, mask=mask, dropout_keys=dropout_keys
    )
    size_PA1 = jnp.sum(maskable_PAT, axis=-1, dtype=jnp.float32)[..., None]
    count_PAn = jnp.sum(masked_PAnT, axis=-1, dtype=jnp.float32)
    nll_PAn = jnp.sum(nll_RT, axis=-1).reshape(masked_PAnT.shape[:3])
    return -nll_PAn * size_PA1 / jnp.maximum(count_PAn, 1.0), nll_RT, correct_RT
