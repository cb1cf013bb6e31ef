"""Scaled dot-product attention with grouped heads, behind one function.

Knows queries, keys, values and a mask value. Knows nothing of projections, rotary embedding or models. Backends are
looked up by name; each either computes the same function or says why it cannot.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
from jaxtyping import Float

from dream_jax import masks

Backend = Literal["auto", "xla"]


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
    backend: Backend = "auto",
) -> Float[jax.Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v with N / K query heads to each key/value head; scores and softmax in float32.

    Args:
      q_BTNH: queries, already rotated.
      k_BSKH: keys, already rotated; N must be a multiple of K. Keys are never repeated for the query heads.
      v_BSKH: values.
      mask: who may attend to whom.
      backend: "xla" runs everywhere and forms the [B, N, T, S] scores; "auto" picks the fastest that is supported.

    Returns:
      The attended values in the dtype of the queries.

    Raises:
      ValueError: unknown backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"attention {backend=} is not one of {get_args(Backend)}")
    # "auto" has one candidate for now; cuDNN and splash join here, chosen by what the device and the mask allow.
    return _xla(q_BTNH, k_BSKH, v_BSKH, mask)


def _xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: masks.Mask) -> jax.Array:
    everything = isinstance(mask, masks.Bidirectional)
    allowed = None if everything else mask.dense(q_BTNH.shape[1], k_BSKH.shape[1])[:, None]  # one for all heads
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=allowed, implementation="xla")
