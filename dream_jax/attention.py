"""Scaled dot-product attention with grouped heads, behind one function.

Knows queries, keys, values and a mask value. Knows nothing of projections, rotary embedding or models. Backends are
looked up by name; each either computes the same function or says why it cannot.
"""

from __future__ import annotations

from typing import Literal, get_args

import einops
import jax
import jax.numpy as jnp
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
      ValueError: unknown backend, or heads that do not fit.
    """
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are no multiple of {k_BSKH.shape[2]} key/value heads")
    if backend not in get_args(Backend):
        raise ValueError(f"attention {backend=} is not one of {get_args(Backend)}")
    # "auto" has one candidate for now; cuDNN and splash join here, chosen by what the device and the mask allow.
    return _xla(q_BTNH, k_BSKH, v_BSKH, mask)


# Added to hidden scores. Finite, so that a row with nothing to attend to stays finite too.
_HIDDEN = -1e30


def _xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: masks.Mask) -> jax.Array:
    # The query heads of a key/value head lie side by side, so that each of the K products is one matrix product over all
    # of them: on a CPU this takes half the time of jax.nn.dot_product_attention.
    q_BKGTH = einops.rearrange(q_BTNH, "B T (K G) H -> B K G T H", K=k_BSKH.shape[2])
    scale = q_BTNH.shape[-1] ** -0.5
    scores_BKGTS = jnp.einsum("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if not isinstance(mask, masks.Bidirectional):
        allowed_BTS = mask.dense(q_BTNH.shape[1], k_BSKH.shape[1])
        scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, _HIDDEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weights_BKGTS, v_BSKH)
    return einops.rearrange(out_BKGTH, "B K G T H -> B T (K G) H")
