"""Whether keys and values can be kept under a mask, and what keeping them costs and saves.

Keys and values of a written token may be kept for good exactly when nothing that is written later reaches them, in any
layer. Shown here rather than argued: logits with what was kept, against those of a pass that computes everything.
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
from mask_study.variants import InPlace

BLOCK = 4


class Kept(NamedTuple):
    """Logits of answers written in blocks from left to right, all before the block kept, against computing all anew.

    Attributes:
      largest: difference of any logit.
      divergence: mean over positions of KL(all computed || kept), nats.
      agreement: share of positions whose most probable token is the same.
      computed: share of the tokens of a full pass that a window computes.
    """

    largest: float
    divergence: float
    agreement: float
    computed: float


def kept_against_computed(model: Dream, tokens_BT: np.ndarray, prompt_width: int, block: int = BLOCK) -> Kept:
    """Writes right answers a block at a time, and compares what would be predicted for each block as it begins.

    A window is the block and the one before it, whose tokens have just become final: those are computed again and then
    kept for good. What lies to the right was computed once, when all of it was masked.

    Args:
      model: trained under any mask; its first `prompt_width` tokens are given.
      tokens_BT: prompts and right answers, without padding.
      prompt_width: at least a block, like the answer a multiple of it.
      block: tokens.

    Raises:
      ValueError: widths that are not whole blocks, or a model that predicts in place.
    """
    length = tokens_BT.shape[1]
    if isinstance(model, InPlace):
        raise ValueError(
            "the model predicts in place, and windows are not made for that; pass one with the right shift"
        )
    if prompt_width < block or prompt_width % block or length % block or length <= prompt_width:
        raise ValueError(f"prompts of {prompt_width} and rows of {length} tokens must be whole blocks of {block}")
    largest, divergence, agreement = (np.asarray(x) for x in _compare(model, tokens_BT, prompt_width, block))
    return Kept(float(largest), float(divergence), float(agreement), 2 * block / length)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compare(
    model: Dream, tokens_BT: jax.Array, prompt_width: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens_BT = jnp.asarray(tokens_BT)
    rows, length = tokens_BT.shape
    mask, positions_BT = layout(model, tokens_BT.shape, prompt_width)
    written_at = lambda start: jnp.where(jnp.arange(length) < start, tokens_BT, model.config.mask_token_id)
    _, cache = model.hidden_and_kv_cache(written_at(prompt_width), mask, positions_BT)
    largest, divergence, agreement = [], [], []
    for start in range(prompt_width, length, block):
        canvas_BT = written_at(start)
        source = slice(start - 1, start + block - 1)  # the right shift
        exact = model.unembed(model.hidden(canvas_BT, mask, positions_BT)[:, source])
        begin = start - block
        position_BW = jnp.broadcast_to(jnp.arange(begin, start + block, dtype=jnp.int32), (rows, 2 * block))
        window = slice(begin, start + block)
        hidden_BWD, cache = model.hidden_window(
            canvas_BT[:, window], mask.at(position_BW), positions_BT[:, window], Window(cache, position_BW)
        )
        kept = model.unembed(hidden_BWD[:, block - 1 : 2 * block - 1])
        log_exact, log_kept = jax.nn.log_softmax(exact), jax.nn.log_softmax(kept)
        largest.append(jnp.max(jnp.abs(exact - kept)))
        divergence.append(jnp.mean(jnp.sum(jnp.exp(log_exact) * (log_exact - log_kept), axis=-1)))
        agreement.append(jnp.mean((jnp.argmax(exact, -1) == jnp.argmax(kept, -1)).astype(jnp.float32)))
    return jnp.max(jnp.stack(largest)), jnp.mean(jnp.stack(divergence)), jnp.mean(jnp.stack(agreement))
