"""Says under which masks a key/value cache is exact, and measures how wrong it is under the others.

A mask is a graph: an edge leads from a key to each query that may attend to it. The keys and values of the first layer
depend only on the token of their position, and each further layer lets influence pass one more edge. So the keys and values
of layer l (counted from 0) at a position change when other tokens are written if and only if a path of at most l edges
leads from a written position to this position. A cache of all layers is exact if and only if no path of at most L - 1 edges
leads from a position that will still be written to a position that is kept. (The "if" holds for all weights. The "only if"
holds for weights in general position: some weights, for example zeros, use none of the paths.)

`reached` and `exact_to_keep` compute this from a mask. `cached_against_computed` compares the logits of windows that read
the cache with those of passes over all tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from dream_jax.attention import Window
from dream_jax.model import Dream
from mask_study.measures import layout
from mask_study.variants import UnshiftedDream

BLOCK = 4
"""Default number of tokens in a block."""


def reached(
    allowed_TT: Bool[np.ndarray, "T T"], written_T: Bool[np.ndarray, "T"], num_layers: int
) -> Bool[np.ndarray, "L T"]:
    """Returns which keys and values change when some tokens are written.

    Args:
      allowed_TT: true where a query (first axis) may attend to a key (second axis), as `Mask.dense` gives it for a row.
      written_T: true at the positions that are written.
      num_layers: L, the number of layers of the model, at least 1.

    Returns:
      True for each layer and position whose keys and values depend on a written token.
    """
    found = [written_T]
    for _ in range(num_layers - 1):  # A layer also adds to the state of its own position.
        found.append(found[-1] | (allowed_TT & found[-1]).any(axis=1))
    return np.stack(found)


def exact_to_keep(
    allowed_TT: Bool[np.ndarray, "T T"],
    written_T: Bool[np.ndarray, "T"],
    cached_T: Bool[np.ndarray, "T"],
    num_layers: int,
) -> bool:
    """Returns whether the keys and values of all layers at the kept positions stay right when the tokens are written.

    Args:
      allowed_TT, written_T, num_layers: see `reached`.
      cached_T: true at the positions whose keys and values are kept.
    """
    return not (reached(allowed_TT, written_T, num_layers) & cached_T).any()


class CacheError(NamedTuple):
    """The difference between cached logits and those of a full pass, if answers are written in blocks from the left.

    Attributes:
      largest: largest absolute difference between a cached and a full logit, over all logits of all answers.
      divergence: mean over answer positions of KL(full pass || cached), in nats.
      agreement: share of answer positions, in [0, 1], at which both have the same most probable token.
      computed: number of tokens that a window computes / number that a full pass computes.
    """

    largest: float
    divergence: float
    agreement: float
    computed: float


def cached_against_computed(model: Dream, tokens_BT: np.ndarray, prompt_width: int, block: int = BLOCK) -> CacheError:
    """Writes the correct answers block by block, comparing cached logits with those of full passes.

    The logits of a block are compared before it is written. A window contains the block and the block before it. The
    tokens of the block before have just become final, so their keys and values are computed again and are not changed
    later. Keys and values on the right of the window were computed once, when the whole answer was masked.

    Args:
      model: a model that was trained under any mask.
      tokens_BT: int32 [B, T], in each row a prompt and its correct answer, without padding.
      prompt_width: number of tokens of the prompt; this number and T are multiples of `block`.
      block: number of tokens in a block.

    Returns:
      The differences over all rows and blocks.

    Raises:
      ValueError: a width is not a positive multiple of the block, or the model has no right shift.
    """
    length = tokens_BT.shape[1]
    if isinstance(model, UnshiftedDream):
        raise ValueError(
            "the model predicts each position from its own hidden state; use a model with the right shift for a cache"
        )
    if prompt_width < block or prompt_width % block or length % block or length <= prompt_width:
        raise ValueError(
            f"{prompt_width=} and the {length} tokens of a row must be multiples of {block=}, "
            "with at least one block of prompt and one of answer"
        )
    largest, divergence, agreement = (np.asarray(x) for x in _compare(model, tokens_BT, prompt_width, block))
    return CacheError(float(largest), float(divergence), float(agreement), 2 * block / length)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compare(
    model: Dream, tokens_BT: jax.Array, prompt_width: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns largest, divergence and agreement of `CacheError` as float32 scalars."""
    tokens_BT = jnp.asarray(tokens_BT)
    rows, length = tokens_BT.shape
    mask, positions_BT = layout(model, tokens_BT.shape, prompt_width)
    canvas_until = lambda start: jnp.where(jnp.arange(length) < start, tokens_BT, model.config.mask_token_id)
    _, kv_cache = model.hidden_and_kv_cache(canvas_until(prompt_width), mask, positions_BT)
    largest, divergence, agreement = [], [], []
    for start in range(prompt_width, length, block):
        canvas_BT = canvas_until(start)
        predicting = slice(start - 1, start + block - 1)  # Position i is predicted from the hidden state at i - 1.
        full_logits = model.unembed(model.hidden(canvas_BT, mask, positions_BT)[:, predicting])
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
