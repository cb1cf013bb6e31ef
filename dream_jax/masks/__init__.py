"""Attention masks as values: which query may look at which key.

A mask is a small frozen object that can be passed through `jax.jit`. True means "may attend"; the last two axes of its
dense form are (query, key). A mask keeps what it knows in its cheapest form (numbers, lengths, segment ids), so that an
attention backend that understands that form never builds a [T, S] array; `dense` gives the array everywhere else. Masks
compose (`&`, `|`, `~`) and draw themselves (`draw`).

Knows shapes and booleans. Knows nothing of attention, models or padding policies.
"""

from dream_jax.masks.base import And, Bidirectional, Mask, Not, Or, Queries, conjuncts, is_fixed
from dream_jax.masks.names import NAMES, parse, spelled
from dream_jax.masks.order import Annealed, BlockCausal, Causal, Prefix, SlidingWindow, TwoStream, anneal
from dream_jax.masks.rows import KeyLengths, KeyPadding, Segments

__all__ = [
    "NAMES",
    "And",
    "Annealed",
    "Bidirectional",
    "BlockCausal",
    "Causal",
    "KeyLengths",
    "KeyPadding",
    "Mask",
    "Not",
    "Or",
    "Prefix",
    "Queries",
    "Segments",
    "SlidingWindow",
    "TwoStream",
    "anneal",
    "conjuncts",
    "is_fixed",
    "parse",
    "spelled",
]
