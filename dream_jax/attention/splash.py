"""Computes attention with splash, the flash kernel for TPUs in jax, which stores neither scores nor a mask [T, S].

The kernel gets padding and packed texts as segment ids, one for each query and key: a query attends to the keys with the
same id. A mask that is the same in all rows is compiled into the kernel, which skips the tiles that the mask hides.
Lengths are padded to whole tiles. Keys and values are not copied for the query heads that share them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Float, Int

from dream_jax import masks
from dream_jax.attention import splash_streams
from dream_jax.attention.per_device import per_device, splits_queries
from dream_jax.attention.two_streams import Sources
from dream_jax.target import Target

# The sizes of tiles are multiples of the 128 lanes of a TPU. Larger tiles have less overhead, but above 512 they need
# much vector memory.
_LANES = 128
_LARGEST_BLOCK = 512

_DIVIDED = (
    "the mesh divides the tokens, but the mask is compiled into the kernel, which is the same on all devices; "
    'use the backend "xla" or "auto", or leave out the third number of the mesh'
)

# Segment ids of valid tokens and of padding, if the mask does not contain `masks.Segments`.
_VALID, _PADDING = 1, 0


def refusal(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask, target: Target) -> str | None:
    """Returns why splash does not support a call, with a remedy; None if it does. Uses only shapes and dtypes."""
    if target.platform != "tpu":
        return (
            f'it is a TPU kernel, and this computation is for "{target.platform}"; use the backend "xla" or "auto", or '
            "compile for a TPU under attention.target_platform"
        )
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not {q_BTNH.dtype}; change the compute dtype"
    return _mask_refusal(mask, q_BTNH.shape[1], k_BSKH.shape[1])


def _mask_refusal(mask: masks.Mask, num_queries: int, num_keys: int) -> str | None:
    """Returns why splash does not support the mask, with a remedy; None if it does."""
    rest = _beside_streams(mask)
    if rest is not None:
        if num_keys // 2 > splash_streams.MOST_TOKENS:
            return (
                f"it counts at most {splash_streams.MOST_TOKENS} tokens of a stream, and there are {num_keys // 2}; use "
                'the backend "xla" or "auto"'
            )
        return _DIVIDED if splits_queries(num_queries) else _mask_refusal(rest, num_queries, num_keys)
    fixed, of_rows = _split(mask)
    for conjunct in of_rows:
        if not isinstance(conjunct, masks.KeyPadding | masks.KeyLengths | masks.Segments | masks.Packed):
            return (
                f"the mask {type(conjunct).__name__} differs from row to row and cannot be given as segment ids; "
                'use the backend "xla" or "auto"'
            )
    if sum(isinstance(conjunct, masks.Segments | masks.Packed) for conjunct in of_rows) > 1:
        return 'a token has one segment id, and these masks give it two; use the backend "xla" or "auto"'
    if isinstance(fixed, masks.Bidirectional):
        return None
    if num_queries != num_keys:
        return f'this mask needs as many queries ({num_queries}) as keys ({num_keys}); use the backend "xla" or "auto"'
    if splits_queries(num_queries):
        return _DIVIDED
    if not _every_query_sees_a_key(fixed, num_queries):
        return 'it has no result for queries that may attend to no key; use the backend "xla" or "auto"'
    return None


def _split(mask: masks.Mask) -> tuple[masks.Mask, list[masks.Mask]]:
    """Returns the combination of all masks that are the same in all rows, and the masks that differ between rows."""
    conjuncts = masks.conjuncts(mask)
    everything: masks.Mask = masks.Bidirectional()
    fixed = functools.reduce(lambda a, b: a & b, filter(masks.is_fixed, conjuncts), everything)
    return fixed, [conjunct for conjunct in conjuncts if not masks.is_fixed(conjunct)]


def _beside_streams(mask: masks.Mask) -> masks.Mask | None:
    """Returns the mask without its part for two streams: it hides padding and other texts. None for any other mask.

    The result is also None if the blocks begin at the same token in all rows: such a mask is compiled into the kernel.
    """
    streams = mask.mask if isinstance(mask, Sources) else mask
    found = [part for part in masks.conjuncts(streams) if _is_stream(part)]
    if not found or (streams is mask and masks.is_fixed(found[0])):
        return None
    rest: masks.Mask = masks.Bidirectional()
    for conjunct in masks.conjuncts(streams):
        if isinstance(mask, Sources) and isinstance(conjunct, masks.Segments):
            conjunct = masks.Segments(jnp.take_along_axis(conjunct.query_BT, mask.source_BT, axis=1), conjunct.key_BS)
        if not _is_stream(conjunct):
            rest &= conjunct
    return rest


def _is_stream(mask: masks.Mask) -> bool:
    return isinstance(mask, masks.TwoStream | masks.OrderedStreams)


@functools.lru_cache(maxsize=64)
def _every_query_sees_a_key(fixed: masks.Mask, length: int) -> bool:
    if isinstance(fixed, masks.Causal | masks.SlidingWindow | masks.BlockCausal | masks.TwoStream):
        return True  # every query may attend at least to itself
    lazy, step = _TiledMask(fixed, length, length, (length, length)), _LARGEST_BLOCK
    return all(lazy[slice(start, start + step), slice(None)].any(axis=1).all() for start in range(0, length, step))


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """Computes `dream_jax.attention.attention` for calls for which `refusal` returns None.

    Args:
      q_BTNH: queries after the rotary embedding, float32 or bfloat16.
      k_BSKH: keys after the rotary embedding, of the same dtype.
      v_BSKH: values of the same dtype.
      mask: the mask that says which query may attend to which key.
      interpret: whether to run the kernel as array operations on any device, for tests.

    Returns:
      The attention outputs, of the dtype of the queries.
    """
    batch, num_queries, num_keys = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1]
    rest, blocks = _beside_streams(mask), None
    further: list[tuple[jax.Array, tuple[str | None, ...]]] = []
    if rest is not None:
        blocks = splash_streams.StreamBlocks(splash_streams.size_of(mask), num_keys // 2, isinstance(mask, Sources))
        code_BT = jnp.broadcast_to(splash_streams.codes(mask, num_keys), (batch, num_queries))
        further.append((code_BT, ("batch", "tokens")))
    fixed, of_rows = _split(mask if rest is None else rest)
    kernel = functools.partial(_kernel, fixed=fixed, blocks=blocks, interpret=interpret)
    ids = segment_ids(of_rows, batch, num_queries, num_keys)
    if ids is not None:
        query_BT, key_BS = ids
        further += [(query_BT, ("batch", "tokens")), (key_BS, ("batch", None))]
    return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, *further)


def segment_ids(
    of_rows: list[masks.Mask], batch: int, num_queries: int, num_keys: int
) -> tuple[Int[jax.Array, "B T"], Int[jax.Array, "B S"]] | None:
    """Returns segment ids of queries and keys: a query may attend to the keys with its own id.

    A query has the id that `masks.Segments` or `masks.Packed` gives it, or _VALID without such a mask, even if it is
    padding: it then attends to valid keys, as the masks say, so that its output and gradients are finite. A key that the
    other masks hide gets an id that no query has.

    Args:
      of_rows: the masks that differ between rows: KeyPadding, KeyLengths and at most one Segments or Packed.
      batch: number of rows B.
      num_queries: number of queries T of each row.
      num_keys: number of keys S of each row.

    Returns:
      The int32 ids of the queries and of the keys; None if `of_rows` is empty.
    """
    if not of_rows:
        return None
    query_BT = jnp.full((1, num_queries), _VALID, jnp.int32)
    key_BS = jnp.full((1, num_keys), _VALID, jnp.int32)
    hidden_id = jnp.int32(_PADDING)  # an id that no query has
    for conjunct in of_rows:
        segments = conjunct.segments(num_keys) if isinstance(conjunct, masks.Packed) else conjunct
        if isinstance(segments, masks.Segments):
            query_BT, key_BS = (jnp.asarray(ids, jnp.int32) for ids in (segments.query_BT, segments.key_BS))
            hidden_id = jnp.min(query_BT) - 1
    for conjunct in of_rows:
        if not isinstance(conjunct, masks.Segments | masks.Packed):
            key_BS = jnp.where(conjunct.dense(1, num_keys)[:, 0], key_BS, hidden_id)
    return jnp.broadcast_to(query_BT, (batch, num_queries)), jnp.broadcast_to(key_BS, (batch, num_keys))


@dataclasses.dataclass(frozen=True)
class _TiledMask(splash_attention_mask.Mask):
    """A mask in the form that the kernel reads: padded to whole tiles, and evaluated one tile at a time.

    The added keys are hidden. The added queries may attend to the same keys as the last query.

    Attributes:
      mask: a mask that is the same in all rows.
      num_queries, num_keys: numbers of queries and keys without the padding.
      padded: numbers of queries and keys with the padding.
    """

    mask: masks.Mask
    num_queries: int
    num_keys: int
    padded: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.padded

    def __getitem__(self, tile: tuple[slice, slice]) -> np.ndarray:
        return _allowed_for(self, *tile[0].indices(self.padded[0]))[:, tile[1]]


@functools.lru_cache(maxsize=2)  # the kernel reads all tiles of the same queries one after the other
def _allowed_for(tiled: _TiledMask, *queries: int) -> np.ndarray:
    """Returns which keys the queries range(*queries) may attend to, bool [queries, padded keys]."""
    position_T = np.minimum(np.arange(*queries, dtype=np.int32), tiled.num_queries - 1)
    with jax.ensure_compile_time_eval():
        allowed = np.asarray(tiled.mask.allowed(position_T[None], tiled.num_keys))[0]
    allowed = np.broadcast_to(allowed, (len(position_T), tiled.num_keys))
    return np.pad(allowed, ((0, 0), (0, tiled.padded[1] - tiled.num_keys)))


def _compiled_in(fixed: masks.Mask, num_queries: int, num_keys: int, padded: tuple[int, int]) -> Any:
    """Returns a mask of the splash library, of shape `padded`; `num_queries` and `num_keys` do not count the padding.

    Full, causal and window masks do not hide the added keys; `_kernel` hides those by segment ids.
    """
    if isinstance(fixed, masks.Bidirectional):
        return splash_attention_mask.FullMask(padded)
    # The kernel computes causal masks and windows itself. Of other masks it stores the tiles that are partly hidden.
    if isinstance(fixed, masks.Causal):
        return splash_attention_mask.CausalMask(padded)
    if isinstance(fixed, masks.SlidingWindow):
        return splash_attention_mask.LocalMask(padded, (fixed.left, fixed.right), offset=0)
    return _TiledMask(fixed, num_queries, num_keys, padded)


def _kernel(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *further: jax.Array,
    fixed: masks.Mask,
    blocks: splash_streams.StreamBlocks | None,
    interpret: bool,
) -> jax.Array:
    """Computes attention on one device from its shards of the arrays; the result has the dtype of the queries.

    `further` are the numbers of the queries, if `blocks` is given, and the two arrays of `segment_ids`, unless it returns
    None.
    """
    code_BT, ids = (None, further) if blocks is None else (further[0], further[1:])
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    num_keys = k_BSKH.shape[1]
    added_queries, added_keys = -num_queries % _LANES, -num_keys % _LANES
    if not ids and added_keys:
        ids = tuple(jnp.full((batch, length), _VALID, jnp.int32) for length in (num_queries, num_keys))
    segments = None
    if ids:
        query_BT, key_BS = ids
        # The added keys get an id that no query has. The added queries get the id of the last query (mode="edge"), so
        # that they may attend to a key; their outputs are removed again.
        hidden_id = jnp.min(query_BT) - 1
        key_BS = jnp.concatenate([key_BS, jnp.full((batch, added_keys), hidden_id, jnp.int32)], axis=1)
        query_BT = jnp.pad(query_BT, ((0, 0), (0, added_queries)), mode="edge")
        segments = splash_attention_kernel.SegmentIds(q=query_BT, kv=key_BS)
    # The kernel does not scale the scores by 1 / sqrt(H), so the queries are scaled.
    q_BTNH = (q_BTNH.astype(jnp.float32) * head_dim**-0.5).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, added), (0, 0)))
        for x, added in ((q_BTNH, added_queries), (k_BSKH, added_keys), (v_BSKH, added_keys))
    )
    padded = num_queries + added_queries, num_keys + added_keys
    query_block, key_block = _block(padded[0]), _block(padded[1])
    compiled_in = _compiled_in(fixed, num_queries, num_keys, padded) if blocks is None else blocks.tiles(padded)
    splash = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([compiled_in] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_kv_compute=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_kv_dkv_compute=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        # The gradient needs the output and the statistics of the softmax; the kernel gives both this name.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    of_row = lambda code: splash
    if blocks is not None and code_BT is not None:
        code_BT = jnp.pad(code_BT, ((0, 0), (0, added_queries)), mode="edge")
        of_row = blocks.with_codes(splash, code_BT)
    out_BNTH = jax.vmap(lambda q, k, v, ids, code: of_row(code)(q, k, v, segment_ids=ids))(
        q_BNTH, k_BKSH, v_BKSH, segments, code_BT
    )
    return out_BNTH.swapaxes(1, 2)[:, :num_queries]


def _block(length: int) -> int:
    """Returns the largest multiple of _LANES, at most _LARGEST_BLOCK, that divides `length`, as the kernel requires."""
    return max(block for block in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if length % block == 0)
