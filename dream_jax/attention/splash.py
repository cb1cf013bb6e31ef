"""Splash attention, the TPU's flash kernel that comes with jax: no [T, S] scores, no [T, S] mask.

Every mask is put to the kernel as segment ids, one a query and one a key; a query sees the keys with its own id. Lengths
are padded up to whole tiles here, and heads of any grouping are read in place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Float, Int

from dream_jax import masks
from dream_jax.attention.placement import per_device
from dream_jax.target import Target

# Tiles are whole multiples of the TPU's 128 lanes. Larger ones cost less overhead; above 512 they strain the vector memory.
_LANES = 128
_LARGEST_BLOCK = 512

# Ids where there is padding or not. Segments bring their own.
_REAL, _PADDING = 1, 0


def refusal(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask, target: Target) -> str | None:
    """Why splash cannot serve such a call and what to do; None when it can. Looks at shapes and dtypes only."""
    if target.platform != "tpu":
        return (
            f'it is a TPU kernel, and this computation is for "{target.platform}"; use the backend "xla" or "auto", or '
            "compile for a TPU under attention.target_platform"
        )
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not {q_BTNH.dtype}; change the compute dtype"
    if not isinstance(mask, masks.Bidirectional | masks.KeyPadding | masks.KeyLengths | masks.Segments):
        return f'it has no segment ids for the mask {type(mask).__name__}; use the backend "xla" or "auto"'
    return None


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
    kernel = functools.partial(_kernel, interpret=interpret)
    ids = segment_ids(mask, q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1])
    if ids is None:
        return per_device(kernel, q_BTNH, k_BSKH, v_BSKH)
    query_BT, key_BS = ids
    return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, (query_BT, ("batch", "tokens")), (key_BS, ("batch", None)))


def segment_ids(
    mask: masks.Mask, batch: int, num_queries: int, num_keys: int
) -> tuple[Int[jax.Array, "B T"], Int[jax.Array, "B S"]] | None:
    """A mask as int32 ids of queries and keys, of which equal ones see each other; None when all see all.

    Of padding only the keys get an id of their own. Queries that are padding keep that of the real ones: they see real
    keys, as the masks promise, and so are finite in value and gradient.
    """
    if isinstance(mask, masks.Bidirectional):
        return None
    if isinstance(mask, masks.Segments):
        query_BT, key_BS = (jnp.asarray(ids, jnp.int32) for ids in (mask.query_BT, mask.key_BS))
    else:
        query_BT = jnp.full((1, num_queries), _REAL, jnp.int32)
        key_BS = jnp.where(mask.dense(1, num_keys)[:, 0], jnp.int32(_REAL), jnp.int32(_PADDING))
    return jnp.broadcast_to(query_BT, (batch, num_queries)), jnp.broadcast_to(key_BS, (batch, num_keys))


def _kernel(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *ids: jax.Array, interpret: bool) -> jax.Array:
    # What one device computes; `ids` are those of `segment_ids`, or none.
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    num_keys = k_BSKH.shape[1]
    more_T, more_S = -num_queries % _LANES, -num_keys % _LANES
    if not ids and more_S:
        ids = tuple(jnp.full((batch, length), _REAL, jnp.int32) for length in (num_queries, num_keys))
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
    splash = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length_T, length_S))] * num_heads),
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
