"""Scaled dot-product attention with grouped heads: one function that has several backends.

All backends compute the same function. A backend that does not support a call returns the reason (`refusal`). The
projections and the rotary embedding are in `model`.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
from jaxtyping import Float

from dream_jax import masks
from dream_jax.attention import cudnn, splash, two_streams, xla
from dream_jax.attention.kv_cache import KVCache, Window
from dream_jax.attention.two_streams import Sources
from dream_jax.remat import keeps_attention_kernel, named
from dream_jax.target import current_target, target_platform

__all__ = ["Backend", "KVCache", "Sources", "Window", "attention", "choose", "refusal", "target_platform"]

Backend = Literal["auto", "cudnn", "splash", "xla"]


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
    backend: Backend = "auto",
) -> Float[jax.Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v, with N / K query heads for each key/value head.

    Scores and softmax are float32. The output of a query that may attend to no key is finite but has no meaning, and
    differs between backends.

    Args:
      q_BTNH: queries after the rotary embedding.
      k_BSKH: keys after the rotary embedding. N must be a multiple of K.
      v_BSKH: values. All three arrays must have the same dtype.
      mask: the mask that says which query may attend to which key.
      backend: "xla" runs on every platform and stores the scores [B, N, T, S]. "cudnn" (NVIDIA GPUs, bfloat16
        or float16) and "splash" (TPUs) do not store them. "auto" is the first of "cudnn", "splash" and "xla" that
        supports the call: this depends on the target platform, the dtypes, the shapes and the mask. Under a mask of two
        streams no backend stores the scores or a bias of all pairs, and the outputs of the noised tokens of prompts have no
        meaning, see `two_streams`.

    Returns:
      The attended values, in the dtype of the queries.

    Raises:
      ValueError: the backend is unknown or does not support this call, N is not a multiple of K, or the dtypes differ.
    """
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are not a multiple of {k_BSKH.shape[2]} key/value heads")
    if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
        raise ValueError(f"queries, keys and values are {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype}; cast them")
    chosen = choose(backend, q_BTNH, k_BSKH, mask)
    if chosen == "splash":
        return splash.attention(q_BTNH, k_BSKH, v_BSKH, mask, interpret=current_target().interpret)
    chunks = two_streams.chunks(mask, q_BTNH.shape[1], k_BSKH.shape[1])
    if chunks is not None:
        if chosen == "cudnn":
            return two_streams.attention(q_BTNH, k_BSKH, v_BSKH, mask, chunks, cudnn.attention, keeps_attention_kernel)
        return named(two_streams.attention(q_BTNH, k_BSKH, v_BSKH, mask, chunks, xla.attended), "attention")
    if chosen == "cudnn":
        return cudnn.attention(q_BTNH, k_BSKH, v_BSKH, mask)
    return xla.attention(q_BTNH, k_BSKH, v_BSKH, mask)


def choose(backend: Backend, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask) -> Backend:
    """Returns the backend of a call: `backend` itself, or the one that "auto" selects.

    Raises:
      ValueError: the backend is unknown, or does not support this call; the message has the reason and a remedy.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"attention {backend=} is not one of {get_args(Backend)}")
    if backend == "auto":
        return next(name for name in get_args(Backend)[1:] if refusal(name, q_BTNH, k_BSKH, mask) is None)
    reason = refusal(backend, q_BTNH, k_BSKH, mask)
    if reason is not None:
        raise ValueError(f'the attention backend "{backend}" cannot serve this call: {reason}')
    return backend


def refusal(backend: Backend, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask) -> str | None:
    """Returns why a backend does not support a call, with a remedy, or None if it does, as "xla" and "auto" always do."""
    if backend == "cudnn":
        return cudnn.refusal(q_BTNH, k_BSKH, mask, current_target())
    if backend == "splash":
        return splash.refusal(q_BTNH, k_BSKH, mask, current_target())
    return None
