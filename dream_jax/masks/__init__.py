"""Attention masks as values: which query may look at which key.

A mask is a small frozen object that can be passed through `jax.jit`. True means "may attend"; the last two axes of its
dense form are (query, key). A mask stores its rule in the most compact form (numbers, lengths, segment ids). An
attention backend that understands this form never builds a [T, S] array; for the others, `dense` gives the array. Masks
can be combined (`&`, `|`, `~`) and drawn (`draw`).
"""

from dream_jax.masks.base import And, Bidirectional, Mask, Not, Or, Queries, conjuncts, is_fixed
from dream_jax.masks.names import NAMES, name_of, parse
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
    "name_of",
    "parse",
]
