"""Whether keys and values can be cached under a mask: how far cached logits are from those of a full pass.

The keys and values of a written token stay valid for good exactly when no token that is written later can influence them,
in any layer. This module measures it: logits of windows that use the cache, against logits of passes over all tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax.attention import Window
from dream_jax.model import Dream
from mask_study.measures import layout
from mask_study.variants import UnshiftedDream

BLOCK = 4


class CacheError(NamedTuple):
    """How cached logits differ from those of a full pass, for answers that are written in blocks from left to right.

    Attributes:
      largest: the largest absolute difference of a logit.
      divergence: mean over positions of KL(full pass || cached), in nats.
      agreement: share of positions at which both have the same most probable token.
      computed: tokens that a window computes, as a share of the tokens of a full pass.
    """

    largest: float
    divergence: float
    agreement: float
    computed: float


def cached_against_computed(model: Dream, tokens_BT: np.ndarray, prompt_width: int, block: int = BLOCK) -> CacheError:
    """Writes the right answers block by block, and compares the two predictions for each block before it is written.

    A window holds the block and the block before it, whose tokens have just become final: their keys and values are
    computed again, and stay in the cache from then on. Keys and values to the right of the window were computed once, when
    the whole answer was masked.

    Args:
      model: trained under any mask; the first `prompt_width` tokens of each row are its prompt.
      tokens_BT: prompts and right answers, without padding.
      prompt_width: tokens of the prompt; it and the answer are each a multiple of `block`.
      block: tokens in a block.

    Raises:
      ValueError: a width that is no multiple of the block, or a model without the right shift.
    """
    length = tokens_BT.shape[1]
    if isinstance(model, UnshiftedDream):
        raise ValueError(
            "the model predicts each position from its own hidden state; the cache serves models with the right shift only"
        )
    if prompt_width < block or prompt_width % block or length % block or length <= prompt_width:
        raise ValueError(
            f"{prompt_width=} and the row's {length} tokens must be whole blocks of {block}, the prompt at least one"
        )
    largest, divergence, agreement = (np.asarray(x) for x in _compare(model, tokens_BT, prompt_width, block))
    return CacheError(float(largest), float(divergence), float(agreement), 2 * block / length)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compare(
    model: Dream, tokens_BT: jax.Array, prompt_width: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens_BT = jnp.asarray(tokens_BT)
    rows, length = tokens_BT.shape
    mask, positions_BT = layout(model, tokens_BT.shape, prompt_width)
    canvas_until = lambda start: jnp.where(jnp.arange(length) < start, tokens_BT, model.config.mask_token_id)
    _, kv_cache = model.hidden_and_kv_cache(canvas_until(prompt_width), mask, positions_BT)
    largest, divergence, agreement = [], [], []
    for start in range(prompt_width, length, block):
        canvas_BT = canvas_until(start)
        source = slice(start - 1, start + block - 1)  # the right shift
        full_logits = model.unembed(model.hidden(canvas_BT, mask, positions_BT)[:, source])
        begin = start - block
        position_BW = jnp.broadcast_to(jnp.arange(begin, start + block, dtype=jnp.int32), (rows, 2 * block))
        window = slice(begin, start + block)
        hidden_BWD, kv_cache = model.hidden_window(
            canvas_BT[:, window], mask.at(position_BW), positions_BT[:, window], Window(kv_cache, position_BW)
        )
        cached_logits = model.unembed(hidden_BWD[:, block - 1 : 2 * block - 1])
        log_full, log_cached = jax.nn.log_softmax(full_logits), jax.nn.log_softmax(cached_logits)
        largest.append(jnp.max(jnp.abs(full_logits - cached_logits)))
        divergence.append(jnp.mean(jnp.sum(jnp.exp(log_full) * (log_full - log_cached), axis=-1)))
        same_token = jnp.argmax(full_logits, -1) == jnp.argmax(cached_logits, -1)
        agreement.append(jnp.mean(same_token.astype(jnp.float32)))
    return jnp.max(jnp.stack(largest)), jnp.mean(jnp.stack(divergence)), jnp.mean(jnp.stack(agreement))
