"""Attention of the two streams of block diffusion, without scores or a bias over all pairs of the 2T tokens.

Rows are [noised | clean], see `masks.TwoStream`. A noised token sees the noised tokens of its block and the clean tokens
before its block; a clean token sees the clean tokens up to the end of its block. So no query sees more than about half
of the keys, and the queries are computed in chunks. From the size of the blocks follows which keys a query of a chunk
can see at most. Only these keys are computed with the chunk, under the part of the mask for them. Within a chunk the
mask is exact, also for prompts, padding and rows of several texts.

The noised tokens of a prompt are an exception. Nothing reads what is computed for them, so they see only some of the
keys that the mask allows: their outputs are finite, but they are not those of the mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import masks
from dream_jax.attention.per_device import splits_queries
from dream_jax.shapes import Array

# The tokens of a stream are divided into at most MOST_CHUNKS chunks, each of a multiple of _LANES tokens (the last one
# may be shorter). With n chunks, (n + 1) / 2n of all pairs of queries and keys are computed for a part of the mask that
# is about causal. The keys of a chunk begin and end at multiples of _ALIGNED, or at the end of the stream.
MOST_CHUNKS = 8
_LANES = 128
_ALIGNED = 64

Span = tuple[int, int]
"""The first index of a range of tokens, and the index after its last one."""

Kernel = Callable[[jax.Array, jax.Array, jax.Array, masks.Mask], jax.Array]
"""A function of queries, keys, values and a mask that returns the attended values."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sources(masks.Mask):
    """The mask of a call in which only T of the 2T tokens of a row are queries: the sources of the T tokens.

    The source of a token is the token from whose state it is predicted. The source of token i is the noised token i if
    i is the first token of a text, otherwise the clean token i - 1 if i is the first token of a block, and otherwise
    the noised token i - 1.

    Attributes:
      mask: a mask of both streams, as `masks.two_streams` returns it.
      source_BT: int32 [B, T], for each token the index of its source among the 2T tokens.
    """

    mask: masks.Mask
    source_BT: Int[Array, "B T"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S], true where the source of the token at an index may attend to a key."""
        return self.mask.at(self.source_BT).allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [B, T, S]. Raises ValueError if `num_queries` differs from the number of sources."""
        return self.mask.at(self.source_BT).dense(num_queries, num_keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Part(masks.Mask):
    """The part of a mask for the queries and the keys of a chunk, as an array, bool [B, T, S]."""

    allowed_BTS: Bool[jax.Array, "b T S"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        return self.allowed_BTS[:, position_bT[0]]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        return self.allowed_BTS


class Chunk(NamedTuple):
    """Queries that are computed together, and the keys that at least one of them may see.

    Attributes:
      queries: the range of the queries.
      keys: ranges of keys, in ascending order, as indices of the 2T tokens.
      more: the ranges that replace `keys` if the block of one of the queries ends after them. A long prompt may do so,
        which is only known when the program runs. None if no block can end after `keys`.
    """

    queries: Span
    keys: tuple[Span, ...]
    more: tuple[Span, ...] | None = None


class _Streams(NamedTuple):
    """The properties of a mask of two streams from which the ranges of keys follow.

    Attributes:
      size: the maximum number of tokens of a block of an answer.
      fixed: whether the blocks of all rows are counted from the first token of the row, so that there are no prompts.
    """

    size: int
    fixed: bool


def _streams(mask: masks.Mask) -> _Streams | None:
    """Returns the properties of a mask of two streams; None for any other mask."""
    for conjunct in masks.conjuncts(mask):
        if isinstance(conjunct, masks.TwoStream):
            return _Streams(conjunct.size, conjunct.start_B is None)
        if isinstance(conjunct, masks.OrderedStreams):
            return _Streams(conjunct.size, False)
    return None


def chunks(mask: masks.Mask, num_queries: int, num_keys: int) -> tuple[Chunk, ...] | None:
    """Returns the chunks of a call under a mask of two streams, or under `Sources`; None for other masks.

    The result is also None if the mesh divides the queries, because a chunk would then be on some of the devices only,
    and if the queries are neither the tokens of both streams nor, with `Sources`, one for each token.

    Args:
      mask: the mask.
      num_queries: number of queries of a row: 2T, or T with `Sources`.
      num_keys: number of keys of a row: 2T.
    """
    of_sources = isinstance(mask, Sources)
    streams = _streams(mask.mask if isinstance(mask, Sources) else mask)
    if streams is None or splits_queries(num_queries) or num_queries != (num_keys // 2 if of_sources else num_keys):
        return None
    return _chunks(streams, num_keys // 2, of_sources=of_sources)


def _chunks(streams: _Streams, tokens: int, *, of_sources: bool) -> tuple[Chunk, ...]:
    """Returns the chunks for the tokens of both streams, or for the sources of the tokens."""
    length = max(_LANES, -(-tokens // (MOST_CHUNKS * _LANES)) * _LANES)
    spans = [(start, min(start + length, tokens)) for start in range(0, tokens, length)]
    if of_sources:
        return tuple(Chunk((a, b), _keys(tokens, (a - streams.size, b - 1 + streams.size), b)) for a, b in spans)
    noised = [Chunk((a, b), _noised_keys(tokens, streams, a, b)) for a, b in spans]
    return (*noised, *(_clean_chunk(tokens, streams, a, b) for a, b in spans))


def computed_keys(size: int, tokens: int) -> float:
    """Returns the mean number of keys with which the two copies of a token together are computed, in whole chunks.

    Without chunks this would be 4 * tokens. The mask itself allows tokens + size. The number is for texts without
    prompts.

    Args:
      size: number of tokens in a block.
      tokens: number of tokens of the text.
    """
    found = _chunks(_Streams(size, False), tokens, of_sources=False)
    return sum((chunk.queries[1] - chunk.queries[0]) * sum(b - a for a, b in chunk.keys) for chunk in found) / tokens


def _noised_keys(tokens: int, streams: _Streams, start: int, stop: int) -> tuple[Span, ...]:
    """Returns the ranges of the keys of the noised queries range(start, stop)."""
    size = streams.size
    if streams.fixed:
        return _keys(tokens, (start // size * size, -(-stop // size) * size), (stop - 1) // size * size)
    return _keys(tokens, (start - size + 1, stop - 1 + size), stop - 1)


def _clean_chunk(tokens: int, streams: _Streams, start: int, stop: int) -> Chunk:
    """Returns the chunk of the clean queries range(start, stop)."""
    size, queries = streams.size, (tokens + start, tokens + stop)
    if streams.fixed:
        return Chunk(queries, _keys(tokens, (0, 0), -(-stop // size) * size))
    keys, everything = _keys(tokens, (0, 0), stop - 1 + size), _keys(tokens, (0, 0), tokens)
    # A token of the prompt sees the whole prompt, and how long the prompts are is only known when the program runs.
    return Chunk(queries, keys, None if keys == everything else everything)


def _keys(tokens: int, noised: Span, clean_stop: int) -> tuple[Span, ...]:
    """Returns the range `noised` of the noised keys and the range of the first `clean_stop` clean keys.

    The ranges are indices of the 2T tokens. Each end is moved outwards to a multiple of _ALIGNED, but not out of its
    stream. Empty ranges are left out.
    """
    start, stop = max(0, noised[0]) // _ALIGNED * _ALIGNED, min(tokens, -(-noised[1] // _ALIGNED) * _ALIGNED)
    clean_stop = min(tokens, -(-clean_stop // _ALIGNED) * _ALIGNED)
    return tuple(span for span in ((start, stop), (tokens, tokens + clean_stop)) if span[0] < span[1])


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
    found: tuple[Chunk, ...],
    kernel: Kernel,
    saved: Callable[..., bool] | None = None,
) -> Float[jax.Array, "B T N H"]:
    """Computes attention chunk by chunk.

    Args:
      q_BTNH: queries, those of the tokens of both streams; with `Sources`, those of the sources.
      k_BSKH: keys of both streams.
      v_BSKH: values of both streams.
      mask: the mask.
      found: the result of `chunks`.
      kernel: computes the attention of one chunk; it gets the mask as an array for the queries and keys of the chunk.
      saved: the policy of `jax.checkpoint` that says which results of the kernel are kept for its gradient; None to
        keep none.

    Returns:
      The attended values, of the dtype of the queries.
    """
    num_keys = k_BSKH.shape[1]
    stop_bT = None if isinstance(mask, Sources) else spans(mask, num_keys // 2)[1]

    def attended(queries: Span, keys: tuple[Span, ...], *arrays: Any) -> jax.Array:
        q_BTNH, k_BSKH, v_BSKH, mask = arrays
        allowed_BTS = mask.allowed(jnp.arange(*queries, dtype=jnp.int32)[None], num_keys)
        part = _Part(_joined(allowed_BTS, keys, axis=2))
        return kernel(q_BTNH[:, slice(*queries)], _joined(k_BSKH, keys, axis=1), _joined(v_BSKH, keys, axis=1), part)

    def computed(chunk: Chunk, stop_bT: jax.Array | None, *arrays: Any) -> jax.Array:
        few = functools.partial(attended, chunk.queries, chunk.keys)
        if chunk.more is None:
            return few(*arrays)
        assert stop_bT is not None
        start, stop = (index - num_keys // 2 for index in chunk.queries)
        is_enough = jnp.max(stop_bT[:, start:stop]) <= chunk.keys[-1][1] - num_keys // 2
        return jax.lax.cond(is_enough, few, functools.partial(attended, chunk.queries, chunk.more), *arrays)

    # The keys, the mask and the scores of a chunk are computed again in the backward pass, so that they exist for one
    # chunk at a time. The policy of the layer keeps the same results as without chunks.
    computed = jax.checkpoint(computed, static_argnums=0, policy=saved)
    arrays = (q_BTNH, k_BSKH, v_BSKH, mask)
    return jnp.concatenate([computed(chunk, stop_bT, *arrays) for chunk in found], axis=1)


def spans(mask: masks.Mask, tokens: int) -> tuple[Int[jax.Array, "b T"], Int[jax.Array, "b T"]]:
    """Returns the indices of the first token of the block of each token, and of the token after the end of this block.

    Both are int32 [1, T] or [B, T], and count the tokens of one stream, from 0. The prompt of a text is one block.

    Args:
      mask: a mask of both streams, as `masks.two_streams` returns it.
      tokens: number of tokens of a stream.
    """
    index_T = jnp.arange(tokens, dtype=jnp.int32)
    begins_bT = index_T[None] == 0  # whether the token before this one is of another block or text
    for part in masks.conjuncts(mask):
        if isinstance(part, masks.TwoStream):
            number_bT = masks.BlockDiffusion(part.size, part.start_B).blocks(index_T[None])
        elif isinstance(part, masks.OrderedStreams):
            number_bT = jnp.asarray(part.block_BT)
        elif isinstance(part, masks.Segments):
            number_bT = jnp.asarray(part.key_BS)[:, :tokens]
        else:
            continue
        begins_bT = begins_bT | jnp.pad(number_bT[:, 1:] != number_bT[:, :-1], ((0, 0), (1, 0)))
    start_bT = jax.lax.cummax(jnp.where(begins_bT, index_T, 0), axis=1)
    ends_bT = jnp.pad(begins_bT[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return start_bT, jax.lax.cummin(jnp.where(ends_bT, index_T + 1, tokens), axis=1, reverse=True)


def _joined(x: jax.Array, spans: tuple[Span, ...], axis: int) -> jax.Array:
    """Returns these ranges of an axis of an array, joined one after the other."""
    return jnp.concatenate([jax.lax.slice_in_dim(x, *span, axis=axis) for span in spans], axis=axis)
