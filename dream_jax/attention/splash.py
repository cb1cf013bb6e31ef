"""Splash attention, the TPU's flash kernel that comes with jax: no [T, S] scores, no [T, S] mask.

What rows hold is put to the kernel as segment ids, one a query and one a key; a query sees the keys with its own id. A mask
that is the same in all rows is compiled in: the kernel leaves out the tiles in which it lets nothing be seen. Lengths are
padded up to whole tiles here, and heads of any grouping are read in place.
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

# Tiles are whole multiples of the TPU's 128 lanes. Larger ones cost less overhead; above 512 they strain the vector memory.
_LANES = 128
_LARGEST_BLOCK = 512

# Segment ids of valid tokens and of padding; a mask of segments has its own ids.
_VALID, _PADDING = 1, 0


def refusal(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask, target: Target) -> str | None:
    """Why splash cannot serve such a call and what to do; None when it can. Looks at shapes and dtypes only."""
    if target.platform != "tpu":
        return (
            f'it is a TPU kernel, and this computation is for "{target.platform}"; use the backend "xla" or "auto", or '
            "compile for a TPU under attention.target_platform"
        )
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not {q_BTNH.dtype}; change the compute dtype"
    return _mask_refusal(mask, q_BTNH.shape[1], k_BSKH.shape[1])


def _mask_refusal(mask: masks.Mask, num_queries: int, num_keys: int) -> str | None:
    fixed, of_rows = _parts(mask)
    for part in of_rows:
        if not isinstance(part, masks.KeyPadding | masks.KeyLengths | masks.Segments):
            return (
                f"the mask {type(part).__name__} differs from row to row, and is not told by segment ids; "
                'use the backend "xla" or "auto"'
            )
    if sum(isinstance(part, masks.Segments) for part in of_rows) > 1:
        return 'a token has one segment id, and these masks give it two; use the backend "xla" or "auto"'
    if isinstance(fixed, masks.Bidirectional):
        return None
    if num_queries != num_keys:
        return f"{num_queries} queries are not the {num_keys} keys that the mask places them among; use it with `at`"
    if splits_queries(num_queries):
        return (
            "the mesh splits the tokens, and the kernel has a mask's order compiled in, the same on all devices; "
            'use the backend "xla" or "auto", or no third number in the mesh'
        )
    if not _shows_something(fixed, num_queries):
        return 'it has no result for queries that the mask lets see nothing; use the backend "xla" or "auto"'
    return None


def _parts(mask: masks.Mask) -> tuple[masks.Mask, list[masks.Mask]]:
    """What of a mask is compiled in, and the masks that differ from row to row."""
    parts = masks.conjuncts(mask)
    everything: masks.Mask = masks.Bidirectional()
    fixed = functools.reduce(lambda a, b: a & b, filter(masks.is_fixed, parts), everything)
    return fixed, [part for part in parts if not masks.is_fixed(part)]


@functools.lru_cache(maxsize=64)
def _shows_something(fixed: masks.Mask, length: int) -> bool:
    if isinstance(fixed, masks.Causal | masks.SlidingWindow | masks.BlockCausal | masks.TwoStream):
        return True  # at least the query itself
    lazy = _Compiled(fixed, length, length, (length, length))
    step = _LARGEST_BLOCK
    return all(lazy[slice(at, at + step), slice(None)].any(axis=1).all() for at in range(0, length, step))


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """The function that `dream_jax.attention.attention` describes, for calls that `refusal` lets pass.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      mask: who may attend to whom.
      interpret: carries the kernel out by array operations, on any device.
    """
    fixed, of_rows = _parts(mask)
    kernel = functools.partial(_kernel, fixed=fixed, interpret=interpret)
    ids = segment_ids(of_rows, q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1])
    if ids is None:
        return per_device(kernel, q_BTNH, k_BSKH, v_BSKH)
    query_BT, key_BS = ids
    return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, (query_BT, ("batch", "tokens")), (key_BS, ("batch", None)))


def segment_ids(
    of_rows: list[masks.Mask], batch: int, num_queries: int, num_keys: int
) -> tuple[Int[jax.Array, "B T"], Int[jax.Array, "B S"]] | None:
    """Masks that hold together as int32 ids of queries and keys, of which equal ones see each other; None without masks.

    Of padding only the keys get an id of their own. Queries that are padding keep that of the real ones: they see real
    keys, as the masks promise, and so are finite in value and gradient.
    """
    if not of_rows:
        return None
    query_BT = jnp.full((1, num_queries), _VALID, jnp.int32)
    key_BS = jnp.full((1, num_keys), _VALID, jnp.int32)
    stranger = jnp.int32(_PADDING)
    for part in of_rows:
        if isinstance(part, masks.Segments):
            query_BT, key_BS = (jnp.asarray(ids, jnp.int32) for ids in (part.query_BT, part.key_BS))
            stranger = jnp.min(query_BT) - 1
    for part in of_rows:
        if not isinstance(part, masks.Segments):
            key_BS = jnp.where(part.dense(1, num_keys)[:, 0], key_BS, stranger)
    return jnp.broadcast_to(query_BT, (batch, num_queries)), jnp.broadcast_to(key_BS, (batch, num_keys))


@dataclasses.dataclass(frozen=True)
class _Compiled(splash_attention_mask.Mask):
    """A mask in the kernel's terms, evaluated a tile at a time, and padded: with keys that nobody sees, and with queries
    that see what the last real one sees."""

    mask: masks.Mask
    num_queries: int
    num_keys: int
    padded: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.padded

    def __getitem__(self, tile: tuple[slice, slice]) -> np.ndarray:
        return _seen_by(self, *tile[0].indices(self.padded[0]))[:, tile[1]]


@functools.lru_cache(maxsize=2)  # the tiles of a row of tiles are asked for one after the other
def _seen_by(compiled: _Compiled, *queries: int) -> np.ndarray:
    position_T = np.minimum(np.arange(*queries, dtype=np.int32), compiled.num_queries - 1)
    with jax.ensure_compile_time_eval():
        seen = np.asarray(compiled.mask.allowed(position_T[None], compiled.num_keys))[0]
    seen = np.broadcast_to(seen, (len(position_T), compiled.num_keys))
    return np.pad(seen, ((0, 0), (0, compiled.padded[1] - compiled.num_keys)))


def _compiled_in(fixed: masks.Mask, num_queries: int, num_keys: int, padded: tuple[int, int]) -> Any:
    if isinstance(fixed, masks.Bidirectional):
        return splash_attention_mask.FullMask(padded)
    # These the kernel computes where it needs them; of others the tiles that are neither full nor empty are stored.
    if isinstance(fixed, masks.Causal):
        return splash_attention_mask.CausalMask(padded)
    if isinstance(fixed, masks.SlidingWindow):
        return splash_attention_mask.LocalMask(padded, (fixed.left, fixed.right), offset=0)
    return _Compiled(fixed, num_queries, num_keys, padded)


def _kernel(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *ids: jax.Array,
    fixed: masks.Mask,
    interpret: bool,
) -> jax.Array:
    # What one device computes; `ids` are those of `segment_ids`, or none.
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    num_keys = k_BSKH.shape[1]
    more_T, more_S = -num_queries % _LANES, -num_keys % _LANES
    if not ids and more_S:
        ids = tuple(jnp.full((batch, length), _VALID, jnp.int32) for length in (num_queries, num_keys))
    segments = None
    if ids:
        query_BT, key_BS = ids
        # Keys that fill up the last tile get an id that no query has. Queries that do are cut off again; until then they
        # see what the last real one sees ("edge").
        stranger = jnp.min(query_BT) - 1
        key_BS = jnp.concatenate([key_BS, jnp.full((batch, more_S), stranger, jnp.int32)], axis=1)
        query_BT = jnp.pad(query_BT, ((0, 0), (0, more_T)), mode="edge")
        segments = splash_attention_kernel.SegmentIds(q=query_BT, kv=key_BS)
    # The kernel does not scale.
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
    # The kernel wants blocks that divide the length, which is a multiple of the lanes by now.
    return max(block for block in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if length % block == 0)
