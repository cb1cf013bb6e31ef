"""The mask of two streams for splash, the flash kernel for TPUs, with blocks that begin at other tokens in each row.

A mask that is compiled into the kernel is the same in all rows. Therefore the kernel is compiled with the information
which tiles (of queries and keys) a row can need at all; this follows from the size of the blocks. It skips the other
tiles. Within a tile it computes the mask from one number for each query, which contains both ends of the block of the
query. The numbers are an argument of the kernel, so they may differ between rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Int

from dream_jax import masks
from dream_jax.attention.two_streams import Sources, spans

# The number of a query has 31 bits: the index of the token after the last one of its block (bits 0 to 14), the index of
# the first token of its block (bits 15 to 29), and 1 if the query is in the clean stream (bit 30).
_BITS = 15
MOST_TOKENS = 2**_BITS - 1
"""The maximum number of tokens of a stream: an index in a number of a query has 15 bits."""


@dataclasses.dataclass(frozen=True)
class StreamBlocks:
    """The queries of a call, and the sizes from which follows which tiles a row may need.

    Attributes:
      size: the maximum number of tokens of a block of an answer.
      tokens: number of tokens of a stream.
      of_sources: whether the queries are the sources of the tokens (`Sources`), or the tokens of both streams.
    """

    size: int
    tokens: int
    of_sources: bool

    def tiles(self, padded: tuple[int, int]) -> StreamTiles:
        """Returns the tiles that a row may need, for these numbers of queries and keys."""
        return StreamTiles(self, padded)

    def with_codes(self, splash: Any, code_BT: Int[jax.Array, "B T"]) -> Any:
        """Returns a function from the numbers of the queries of one row, int32 [T], to the kernel with these numbers.

        The kernel also skips the tiles that no query of the batch on this device needs.

        Args:
          splash: the kernel that was made from `StreamTiles`.
          code_BT: int32 [B, T], the numbers of the queries of all rows, also of the queries that were added to fill
            tiles.
        """
        sizes = splash.kwargs["block_sizes"]
        start_BT, stop_BT, clean_BT = _decoded(code_BT)
        limit_BT = jnp.where(clean_BT, self.tokens + stop_BT, jnp.maximum(self.tokens + start_BT, stop_BT))
        limit_T = jnp.max(limit_BT, axis=0)  # in no row of this device does the query see a key from this index on

        def pruned(info: Any, query_block: int, key_block: int, *, of_keys: bool) -> Any:
            limit_I = jnp.max(limit_T.reshape(-1, query_block), axis=1)
            # The first axis of these arrays has size 1: the mask is the same for all heads. An entry of `block_mask`
            # that is not 0 is a tile to compute. The entry of `data_next` with the same indices is its tile of keys; in
            # the gradients of the keys, its tile of queries.
            other = info.data_next.astype(jnp.int32)
            if of_keys:
                key_IJ, needed_IJ = jnp.arange(other.shape[2])[None, None], limit_I[other]
            else:
                key_IJ, needed_IJ = other, limit_I[None, :, None]
            marked = jnp.where(key_IJ * key_block < needed_IJ, info.block_mask, jnp.zeros_like(info.block_mask))
            return info._replace(block_mask=marked)

        infos = (
            pruned(splash.fwd_mask_info, sizes.block_q, sizes.block_kv, of_keys=False),
            pruned(splash.dq_mask_info, sizes.block_q_dq, sizes.block_kv_dq, of_keys=False),
            pruned(splash.dkv_mask_info, sizes.block_q_dkv, sizes.block_kv_dkv, of_keys=True),
        )

        def of_row(code_T: jax.Array) -> Any:
            return type(splash)(*(info._replace(q_sequence=code_T) for info in infos), **splash.kwargs)

        return of_row


@dataclasses.dataclass(frozen=True)
class StreamTiles(splash_attention_mask.Mask):
    """The mask from which splash computes its tiles: it allows a pair of query and key if any row may need this pair.

    It is an object of the type that splash reads. Keys that were added to fill tiles are hidden.

    Attributes:
      blocks: the queries and the sizes from which the mask follows.
      padded: the numbers of queries and of keys, with those that were added to fill tiles.
    """

    blocks: StreamBlocks
    padded: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers of queries and keys with the added ones."""
        return self.padded

    @property
    def q_sequence(self) -> np.ndarray:
        """Zeros, int32 [T], which `StreamBlocks.with_codes` replaces by the numbers of the queries."""
        return np.zeros(self.padded[0], np.int32)

    @property
    def mask_function(self) -> Any:
        """The function by which the kernel computes the mask."""
        return _Seen(self.blocks.tokens)

    def __getitem__(self, tile: tuple[slice, slice]) -> np.ndarray:
        query_T1 = np.arange(*tile[0].indices(self.padded[0]))[:, None]
        key_S = np.arange(*tile[1].indices(self.padded[1]))
        size, tokens = self.blocks.size, self.blocks.tokens
        clean_key = key_S >= tokens
        last = tokens - 1 if self.blocks.of_sources else 2 * tokens - 1
        query_T1 = np.minimum(query_T1, last)
        ahead = key_S - query_T1
        if self.blocks.of_sources:
            near = (ahead >= -size) & (ahead < size)
            before = key_S - tokens < query_T1
        else:
            near = np.abs(ahead) < size
            # A token of the prompt sees the whole prompt, and where the prompts end is only known when the program runs.
            before = (key_S - tokens < query_T1) | (query_T1 >= tokens)
        near &= ~clean_key & (query_T1 < tokens)
        return near | (before & clean_key & (key_S < 2 * tokens))


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The function by which the kernel computes the mask, from the numbers of the queries and the indices of the keys."""

    tokens: int

    def __call__(self, code: jax.Array, key: jax.Array) -> jax.Array:
        start, stop, clean = _decoded(code)
        clean_key = key >= self.tokens
        before = clean_key & (key < self.tokens + jnp.where(clean, stop, start))
        return before | (~clean & ~clean_key & (key >= start) & (key < stop))


def _decoded(code: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the parts of numbers: the first token of the block, the token after its last one, and true if clean."""
    return (code >> _BITS) & MOST_TOKENS, code & MOST_TOKENS, code >> (2 * _BITS) > 0


def codes(mask: masks.Mask, num_keys: int) -> Int[jax.Array, "b T"]:
    """Returns the number of each query, int32 [1, T] or [B, T] for T queries, under a mask of two streams or `Sources`.

    The numbers of the noised tokens of a prompt have only a part of their block, of at most 2 * size - 1 tokens,
    because nothing reads what is computed for these tokens.

    Args:
      mask: the mask.
      num_keys: the number of keys: the tokens of both streams.
    """
    tokens = num_keys // 2
    streams = mask.mask if isinstance(mask, Sources) else mask
    start_bT, stop_bT = spans(streams, tokens)
    index_T, size = jnp.arange(tokens, dtype=jnp.int32), size_of(streams)
    near = jnp.maximum(start_bT, index_T - size + 1), jnp.minimum(stop_bT, index_T + size)
    noised_bT = (near[0] << _BITS) | near[1]
    clean_bT = (start_bT << _BITS) | stop_bT | (1 << (2 * _BITS))
    both_bS = jnp.concatenate([noised_bT, clean_bT], axis=1)
    if not isinstance(mask, Sources):
        return both_bS
    source_BT = jnp.asarray(mask.source_BT, jnp.int32)
    return jnp.take_along_axis(jnp.broadcast_to(both_bS, (source_BT.shape[0], num_keys)), source_BT, axis=1)


def size_of(mask: masks.Mask) -> int:
    """Returns the number of tokens in a block of an answer under a mask of two streams or `Sources`."""
    streams = mask.mask if isinstance(mask, Sources) else mask
    return next(
        part.size for part in masks.conjuncts(streams) if isinstance(part, masks.TwoStream | masks.OrderedStreams)
    )
