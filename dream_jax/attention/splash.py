"""Splash attention, the flash kernel for TPUs that comes with jax. It stores neither scores [T, S] nor a mask [T, S].

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
from dream_jax.attention.per_device import per_device, splits_queries
from dream_jax.target import Target

# The sizes of tiles are multiples of the 128 lanes of a TPU. Larger tiles have less overhead, but above 512 they need
# much vector memory.
_LANES = 128
_LARGEST_BLOCK = 512

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
    fixed, of_rows = _split(mask)
    for conjunct in of_rows:
        if not isinstance(conjunct, masks.KeyPadding | masks.KeyLengths | masks.Segments):
            return (
                f"the mask {type(conjunct).__name__} differs from row to row and cannot be given as segment ids; "
                'use the backend "xla" or "auto"'
            )
    if sum(isinstance(conjunct, masks.Segments) for conjunct in of_rows) > 1:
        return 'a token has one segment id, and these masks give it two; use the backend "xla" or "auto"'
    if isinstance(fixed, masks.Bidirectional):
        return None
    if num_queries != num_keys:
        return f"the mask needs as many queries ({num_queries}) as keys ({num_keys}); give their positions with `at`"
    if splits_queries(num_queries):
        return (
            "the mesh divides the tokens, but the mask is compiled into the kernel, which is the same on all devices; "
            'use the backend "xla" or "auto", or leave out the third number of the mesh'
        )
    if not _every_query_sees_a_key(fixed, num_queries):
        return 'it has no result for queries that may attend to no key; use the backend "xla" or "auto"'
    return None


def _split(mask: masks.Mask) -> tuple[masks.Mask, list[masks.Mask]]:
    """Returns the combination of all masks that are the same in all rows, and the masks that differ between rows."""
    conjuncts = masks.conjuncts(mask)
    everything: masks.Mask = masks.Bidirectional()
    fixed = functools.reduce(lambda a, b: a & b, filter(masks.is_fixed, conjuncts), everything)
    return fixed, [conjunct for conjunct in conjuncts if not masks.is_fixed(conjunct)]


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
      q_BTNH: queries after the rotary embedding.
      k_BSKH: keys after the rotary embedding.
      v_BSKH: values.
      mask: the mask that says which query may attend to which key.
      interpret: runs the kernel as array operations on any device, for tests.
    """
    fixed, of_rows = _split(mask)
    kernel = functools.partial(_kernel, fixed=fixed, interpret=interpret)
    ids = segment_ids(of_rows, q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1])
    if ids is None:
        return per_device(kernel, q_BTNH, k_BSKH, v_BSKH)
    query_BT, key_BS = ids
    return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, (query_BT, ("batch", "tokens")), (key_BS, ("batch", None)))


def segment_ids(
    of_rows: list[masks.Mask], batch: int, num_queries: int, num_keys: int
) -> tuple[Int[jax.Array, "B T"], Int[jax.Array, "B S"]] | None:
    """Returns int32 ids of the queries and of the keys, equal where all masks allow attention; None without masks.

    Padding gets an id that no query has, but only as a key. As a query it has the id of valid tokens: it attends to
    valid keys, as the masks say, so that its output and gradients are finite.
    """
    if not of_rows:
        return None
    query_BT = jnp.full((1, num_queries), _VALID, jnp.int32)
    key_BS = jnp.full((1, num_keys), _VALID, jnp.int32)
    hidden_id = jnp.int32(_PADDING)  # an id that no query has
    for conjunct in of_rows:
        if isinstance(conjunct, masks.Segments):
            query_BT, key_BS = (jnp.asarray(ids, jnp.int32) for ids in (conjunct.query_BT, conjunct.key_BS))
            hidden_id = jnp.min(query_BT) - 1
    for conjunct in of_rows:
        if not isinstance(conjunct, masks.Segments):
            key_BS = jnp.where(conjunct.dense(1, num_keys)[:, 0], key_BS, hidden_id)
    return jnp.broadcast_to(query_BT, (batch, num_queries)), jnp.broadcast_to(key_BS, (batch, num_keys))


@dataclasses.dataclass(frozen=True)
class _TiledMask(splash_attention_mask.Mask):
    """A mask in the form that the kernel takes: padded to whole tiles, and evaluated one tile at a time.

    The added keys are hidden. The added queries may attend to the same keys as the last query. `padded` has the numbers
    of queries and keys with the padding.
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
    position_T = np.minimum(np.arange(*queries, dtype=np.int32), tiled.num_queries - 1)
    with jax.ensure_compile_time_eval():
        allowed = np.asarray(tiled.mask.allowed(position_T[None], tiled.num_keys))[0]
    allowed = np.broadcast_to(allowed, (len(position_T), tiled.num_keys))
    return np.pad(allowed, ((0, 0), (0, tiled.padded[1] - tiled.num_keys)))


def _compiled_in(fixed: masks.Mask, num_queries: int, num_keys: int, padded: tuple[int, int]) -> Any:
    """Returns the mask in a class of the splash library, for numbers of queries and keys that include padding."""
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
    *ids: jax.Array,
    fixed: masks.Mask,
    interpret: bool,
) -> jax.Array:
    """Computes attention on one device from its shards of the arrays. `ids` are those of `segment_ids`, or empty."""
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    num_keys = k_BSKH.shape[1]
    more_T, more_S = -num_queries % _LANES, -num_keys % _LANES
    if not ids and more_S:
        ids = tuple(jnp.full((batch, length), _VALID, jnp.int32) for length in (num_queries, num_keys))
    segments = None
    if ids:
        query_BT, key_BS = ids
        # The added keys get an id that no query has. The added queries get the id of the last query (mode="edge"), so
        # that they may attend to a key; their outputs are removed again.
        hidden_id = jnp.min(query_BT) - 1
        key_BS = jnp.concatenate([key_BS, jnp.full((batch, more_S), hidden_id, jnp.int32)], axis=1)
        query_BT = jnp.pad(query_BT, ((0, 0), (0, more_T)), mode="edge")
        segments = splash_attention_kernel.SegmentIds(q=query_BT, kv=key_BS)
    # The kernel does not scale the scores by 1 / sqrt(H), so the queries are scaled.
    q_BTNH = (q_BTNH.astype(jnp.float32) * head_dim**-0.5).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))
        for x, more in ((q_BTNH, more_T), (k_BSKH, more_S), (v_BSKH, more_S))
    )
    length_T, length_S = num_queries + more_T, num_keys + more_S
    block_T, block_S = _block(length_T), _block(length_S)
    compiled_in = _compiled_in(fixed, num_queries, num_keys, (length_T, length_S))
    splash = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([compiled_in] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_T,
            block_kv=block_S,
            block_kv_compute=block_S,
            block_q_dkv=block_T,
            block_kv_dkv=block_S,
            block_kv_dkv_compute=block_S,
            block_q_dq=block_T,
            block_kv_dq=block_S,
        ),
        interpret=interpret,
    )
    out_BNTH = jax.vmap(lambda q, k, v, ids: splash(q, k, v, segment_ids=ids))(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.swapaxes(1, 2)[:, :num_queries]


def _block(length: int) -> int:
    """Returns the largest block size that divides the length, as the kernel requires: a multiple of _LANES."""
    return max(block for block in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if length % block == 0)
