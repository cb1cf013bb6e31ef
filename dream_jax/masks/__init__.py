"""Attention masks: objects that say which query may attend to which key.

A mask is a small frozen object that can be an argument of a jitted function. It stores its rule in a compact form, for
example as numbers, lengths or segment ids. An attention backend that supports this form needs no array [T, S]. For the
other backends, `dense` returns a bool array with the last axes (query, key), true where the query may attend to the
key. Masks can be combined (`&`, `|`, `~`) and drawn as text (`draw`).
"""

from dream_jax.masks.base import And, Bidirectional, Mask, Not, Or, Queries, Selection, conjuncts, is_fixed
from dream_jax.masks.blocks import (
    BlockDiffusion,
    OrderedBlocks,
    OrderedStreams,
    TwoStream,
    block_numbers,
    starts_of_blocks,
    starts_of_texts,
    two_streams,
)
from dream_jax.masks.names import NAMES, name_of, parse
from dream_jax.masks.order import Annealed, BlockCausal, Causal, Ordered, Prefix, SlidingWindow, anneal
from dream_jax.masks.rows import KeyLengths, KeyPadding, Packed, Segments

__all__ = [
    "NAMES",
    "And",
    "Annealed",
    "Bidirectional",
    "BlockCausal",
    "BlockDiffusion",
    "Causal",
    "KeyLengths",
    "KeyPadding",
    "Mask",
    "Not",
    "Or",
    "Ordered",
    "OrderedBlocks",
    "OrderedStreams",
    "Packed",
    "Prefix",
    "Queries",
    "Segments",
    "Selection",
    "SlidingWindow",
    "TwoStream",
    "anneal",
    "block_numbers",
    "conjuncts",
    "is_fixed",
    "name_of",
    "parse",
    "starts_of_blocks",
    "starts_of_texts",
    "two_streams",
]
