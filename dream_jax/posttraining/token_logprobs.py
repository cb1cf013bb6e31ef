"""Log-probabilities of given tokens in the distribution from which the sampler draws, with gradients.

The sampler draws a token from softmax(logits / temperature) over the tokens that may be written and that the filters top_p
and top_k leave. `TokenDistribution` describes this distribution. With filters, tokens that were drawn under earlier weights
may lie outside the set that the present weights leave; such a token is added to the set, so that its log-probability is
finite. At the weights that drew it, every token lies inside. The set itself is not differentiated.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import sharding
from dream_jax.bounds import POSITIVE, FloatRange, IntegerRange, check_numbers
from dream_jax.decoding import filters
from dream_jax.masks import Mask
from dream_jax.model import Dream, padded_positions
from dream_jax.sampler import SamplerConfig
from dream_jax.shapes import Array

# Largest number of elements of the array of logits of one chunk, over all rows (512 MiB in float32).
_LOGIT_ELEMENTS = 1 << 27


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDistribution:
    """The distribution from which a sampler draws tokens.

    Attributes:
      temperature: positive number by which the logits are divided.
      top_p: probability mass of the nucleus, in (0, 1); None for all tokens.
      top_k: number of most probable tokens; None for all tokens.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_numbers(
            self,
            temperature=POSITIVE,
            top_p=FloatRange(0.0, 1.0, open_low=True, open_high=True),
            top_k=IntegerRange(1),
        )

    @classmethod
    def of(cls, config: SamplerConfig) -> TokenDistribution:
        """Returns the distribution of these settings of the sampler.

        Raises:
          ValueError: they draw nothing (temperature 0), or change the logits in a way that is not supported here (guidance,
            an end penalty, hooks).
        """
        if not config.temperature:
            raise ValueError(f"{config.temperature=} draws nothing; pass a positive temperature, such as 1.0")
        changed = ("guidance", "end_penalty", "logits_hook", "token_hook")
        given = [name for name in changed if getattr(config, name)]
        if given:
            raise ValueError(
                f"{', '.join(given)} of the sampler changes what is drawn and has no gradient here; leave it out"
            )
        return cls(
            temperature=config.temperature,
            top_p=None if config.top_p == 1.0 else config.top_p,
            top_k=config.top_k,
        )


def token_logprobs(
    model: Dream,
    tokens_BT: Int[jax.Array, "B T"],
    masked_BT: Bool[jax.Array, "B T"],
    valid_BT: Bool[jax.Array, "B T"],
    mask: Mask,
    position_BM: Int[jax.Array, "B M"],
    distribution: TokenDistribution,
    writable_V: Bool[Array, "V"] | None = None,
) -> tuple[Float[jax.Array, "B M"], Float[jax.Array, "B M"]]:
    """Computes log p(token | canvas) at some masked positions of each row.

    Args:
      model: the model; only this argument is differentiated.
      tokens_BT: the tokens, int32.
      masked_BT: true where the model sees a mask token instead.
      valid_BT: false at padding.
      mask: the attention mask of these rows, which hides padding.
      position_BM: positions of the tokens to score, int32 in [0, T). The values of further positions, which only fill up
        the array, are computed too; the caller ignores them.
      distribution: what the tokens are drawn from.
      writable_V: true at the tokens that may be written; None for all tokens. Others have the probability 0.

    Returns:
      The log-probabilities in nats, and the entropies of the distributions in nats, which are not differentiated.
    """
    positions_BT = padded_positions(valid_BT)
    canvas_BT = sharding.constrain(jnp.where(masked_BT, model.config.mask_token_id, tokens_BT), "batch", "tokens")
    hidden_BTD = model.hidden(canvas_BT, mask, positions_BT)
    take = functools.partial(jnp.take_along_axis, axis=1)
    # The right shift, as in the sampler: the first token of a text is predicted from its own position.
    first_BM = (take(positions_BT, position_BM) == 0) | (position_BM == 0)
    source_BM = jnp.where(first_BM, position_BM, position_BM - 1)
    hidden_BMD = take(hidden_BTD, source_BM[:, :, None])
    with jax.named_scope("token_logprobs"):
        return _in_chunks(model, hidden_BMD, take(tokens_BT, position_BM), distribution, writable_V)


def _in_chunks(
    model: Dream,
    hidden_BMD: jax.Array,
    token_BM: jax.Array,
    distribution: TokenDistribution,
    writable_V: Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities and entropies, computed for a few positions at a time, so that few logits are stored."""
    rows, count, _ = hidden_BMD.shape
    vocab = model.config.vocab_size
    chunk = max(1, min(count, _LOGIT_ELEMENTS // (rows * vocab)))
    padding = -count % chunk

    # The logits are computed again in the backward pass, which costs one product with the output projection.
    @jax.checkpoint
    def of_chunk(hidden_BCD: jax.Array, token_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = sharding.constrain(model.unembed(hidden_BCD), "batch", None, "vocab")
        return _scores(logits_BCV, token_BC, distribution, writable_V)

    if chunk == count:
        return of_chunk(hidden_BMD, token_BM)
    hidden_BMD = jnp.pad(hidden_BMD, ((0, 0), (0, padding), (0, 0)))
    token_BM = jnp.pad(token_BM, ((0, 0), (0, padding)))
    split = lambda x: jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)
    found = jax.lax.map(lambda inputs: of_chunk(*inputs), (split(hidden_BMD), split(token_BM)))
    logprob_BM, entropy_BM = (jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :count] for x in found)
    return logprob_BM, entropy_BM


def _scores(
    logits_BCV: Float[jax.Array, "B C V"],
    token_BC: Int[jax.Array, "B C"],
    distribution: TokenDistribution,
    writable_V: Array | None,
) -> tuple[Float[jax.Array, "B C"], Float[jax.Array, "B C"]]:
    """Returns the log-probability of each token, and the entropy of its distribution."""
    log_mass_BCV = logits_BCV / distribution.temperature
    if writable_V is not None:
        log_mass_BCV = jnp.where(writable_V, log_mass_BCV, -jnp.inf)
    is_token_BCV = jnp.arange(logits_BCV.shape[-1], dtype=jnp.int32) == token_BC[:, :, None]
    if distribution.top_p is not None or distribution.top_k is not None:
        kept_BCV = _kept(jax.lax.stop_gradient(log_mass_BCV), distribution) | is_token_BCV
        log_mass_BCV = jnp.where(kept_BCV, log_mass_BCV, -jnp.inf)
    normaliser_BC = jax.nn.logsumexp(log_mass_BCV, axis=-1)
    # A sum and not an index: under tensor parallelism each device holds only a share of the vocabulary.
    logprob_BC = jnp.sum(jnp.where(is_token_BCV, log_mass_BCV, 0.0), axis=-1) - normaliser_BC
    log_p_BCV = jax.lax.stop_gradient(log_mass_BCV - normaliser_BC[:, :, None])
    entropy_BC = -jnp.sum(jnp.where(jnp.isneginf(log_p_BCV), 0.0, jnp.exp(log_p_BCV) * log_p_BCV), axis=-1)
    return logprob_BC, entropy_BC


def _kept(log_mass_BCV: jax.Array, distribution: TokenDistribution) -> Bool[jax.Array, "B C V"]:
    """Returns true at the tokens that the filters leave, by the computation of the sampler."""
    batch, size, vocab = log_mass_BCV.shape
    log_mass_RV = log_mass_BCV.reshape(batch * size, vocab)
    mass_RV = jnp.exp(log_mass_RV - jnp.max(log_mass_RV, axis=-1, keepdims=True))
    top_k = None if distribution.top_k is None or distribution.top_k >= vocab else distribution.top_k
    return (filters.keep_likely(mass_RV, distribution.top_p, top_k) > 0).reshape(batch, size, vocab)
