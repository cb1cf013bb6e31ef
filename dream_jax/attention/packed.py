"""Attention within each text of rows that hold several texts, by cuDNN's packed layout on GPUs.

The kernel gets the start and the length of each text. It stores no scores and no bias [T, S], and computes no scores
between texts. `jax.nn.dot_product_attention` has no arguments for this layout, so this module calls a function of jax that
is not public. Some versions of that function read the keys of other texts if several query heads share a key head (jax pull
request 39521), without an error. So it is used only if it computes the right values and gradients for a small example on
the GPU of this process; otherwise `cudnn` gives the mask to the kernel as a bias.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dream_jax import masks
from dream_jax.attention import xla

# Largest difference between the result for the example and the result of float32 arithmetic, relative to the largest
# value. Rounding to bfloat16 gives less than 0.02; the keys of another text give about 1.
_TOLERANCE = 0.06
_EXAMPLE_LENGTHS = ((40, 30, 17, 0), (9, 64, 0, 0), (96, 0, 0, 0))
_EXAMPLE_TOKENS = 96


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BTKH: Float[jax.Array, "B T K H"],
    v_BTKH: Float[jax.Array, "B T K H"],
    length_BM: Int[jax.Array, "B M"],
    *,
    repeats: int,
) -> Float[jax.Array, "B T N H"]:
    """Computes attention under `masks.Packed(length_BM)` on one device.

    Args:
      q_BTNH: queries, bfloat16 or float16.
      k_BTKH: keys of the same tokens.
      v_BTKH: values of the same tokens.
      length_BM: number of tokens of each text of a row, 0 after the last text.
      repeats: how often each key head and value head is repeated before the call, as `usable` returns it.

    Returns:
      The attended values, of the dtype of the queries.
    """
    # The import is here, because a version of jax without this function can still use the other backends.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    tokens = q_BTNH.shape[1]
    # jax refuses gradients for an odd number of tokens, so an odd number gets one more token of padding.
    q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, ((0, 0), (0, tokens % 2), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    length_BM = jnp.asarray(length_BM, jnp.int32)
    # The padding at the end of a row is one more text, so that every output is written.
    padding_B1 = q_BTNH.shape[1] - jnp.sum(length_BM, axis=1, keepdims=True, dtype=jnp.int32)
    length_BM = jnp.concatenate([length_BM, padding_B1], axis=1)
    start_BM = jnp.cumsum(length_BM, axis=1) - length_BM
    absent = length_BM == 0
    length_BM, start_BM = (jnp.where(absent, -1, x).astype(jnp.int32) for x in (length_BM, start_BM))
    start_BM = jnp.pad(start_BM, ((0, 0), (0, 1)), constant_values=-1)  # the function wants one more entry
    k_BTNH, v_BTNH = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k_BTKH, v_BTKH))
    out_BTNH: jax.Array = dot_product_attention(
        q_BTNH,
        k_BTNH,
        v_BTNH,
        q_seqlen=length_BM,
        kv_seqlen=length_BM,
        q_offsets=start_BM,
        kv_offsets=start_BM,
        scale=q_BTNH.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING,
    )
    return out_BTNH[:, :tokens]


@functools.lru_cache(maxsize=16)
def usable(num_heads: int, num_kv_heads: int, head_dim: int, dtype: Any) -> int | None:
    """Returns the `repeats` with which `attention` is correct on this machine, or None if it is not correct here.

    The result is `num_heads / num_kv_heads`, so that every query head has a key head of its own. It is None without a
    GPU, for a GPU older than Hopper, or if a small example is not computed correctly. `dtype` is the dtype of queries,
    keys and values.

    Fewer key heads than query heads are not even tried. Releases of jax up to 0.10.2 (jax pull request 39521) compute the
    offsets of keys with the number of query heads, so the kernel would write gradients outside of their arrays.
    """
    if jax.default_backend() != "gpu":
        return None
    found: list[int | None] = []

    def check() -> None:
        groups = num_heads // num_kv_heads
        found.append(groups if _is_right(groups, head_dim, dtype) else None)

    # The caller is traced by jax under a mesh. A new thread has neither the trace nor the mesh, so it computes numbers.
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    return found[0] if found else None


def _is_right(groups: int, head_dim: int, dtype: Any) -> bool:
    """Returns whether `attention` gives the right values and gradients for rows with texts of different lengths."""
    length_BM = np.array(_EXAMPLE_LENGTHS, np.int32)
    generator = np.random.default_rng(0)
    batch, kv_heads = len(length_BM), 2
    heads = (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)
    arrays = [generator.normal(size=(batch, _EXAMPLE_TOKENS, number, head_dim)) for number in heads]
    *qkv, weights = (jnp.asarray(array, dtype) for array in arrays)

    def results(attend: Any, qkv: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
        def loss(qkv: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            out = attend(*qkv)
            return jnp.sum((out * weights).astype(jnp.float32)), out

        gradients, out = jax.grad(loss, has_aux=True)(qkv)
        return [out, *gradients]

    try:
        found = jax.jit(
            lambda qkv: results(
                lambda q, k, v: attention(q, k, v, jnp.asarray(length_BM), repeats=groups), qkv, weights
            )
        )(qkv)
        found = [np.asarray(array, np.float32) for array in found]
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):  # errors of XLA are RuntimeErrors
        return False  # jax lacks the function or has changed it, or the GPU or cuDNN does not support the layout
    mask = masks.Packed(length_BM)
    exact = [array.astype(jnp.float32) for array in qkv]
    wanted = jax.jit(
        lambda qkv: results(lambda q, k, v: xla.attention(q, k, v, mask), qkv, weights.astype(jnp.float32))
    )(exact)
    return all(
        bool(np.max(np.abs(one - np.asarray(other))) <= _TOLERANCE * np.max(np.abs(np.asarray(other))))
        for one, other in zip(found, wanted, strict=True)
    )
