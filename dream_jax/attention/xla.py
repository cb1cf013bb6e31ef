"""Attention in plain array operations, the reference. It runs on every platform and stores the scores [B, N, T, S]."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax import masks
from dream_jax.remat import named

# Score of a hidden key. It is finite, so that the output of a query that may attend to no key is finite too.
_HIDDEN = -1e30


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
) -> Float[jax.Array, "B T N H"]:
    """Computes `dream_jax.attention.attention` for any platform, dtype, mask and shape."""
    return named(attended(q_BTNH, k_BSKH, v_BSKH, mask), "attention")


def attended(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
) -> Float[jax.Array, "B T N H"]:
    """Computes the same as `attention`; the result has no name for the policies of `remat`."""
    # In this layout one matrix product serves all query heads of a key/value head. On a CPU this takes half the time of
    # jax.nn.dot_product_attention.
    q_BKGTH = einops.rearrange(q_BTNH, "B T (K G) H -> B K G T H", K=k_BSKH.shape[2])
    scale = q_BTNH.shape[-1] ** -0.5
    scores_BKGTS = jnp.einsum("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if not isinstance(mask, masks.Bidirectional):
        allowed_BTS = mask.dense(q_BTNH.shape[1], k_BSKH.shape[1])
        scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, _HIDDEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weights_BKGTS, v_BSKH)
    return einops.rearrange(out_BKGTH, "B K G T H -> B T (K G) H")
