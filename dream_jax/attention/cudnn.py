"""cuDNN's flash attention on NVIDIA GPUs, through jax.nn.dot_product_attention: no [T, S] scores.

Bidirectional attention needs no mask, padding on the right only its lengths, and the kernel itself knows causal order and
windows that look back. Other masks become a bias of [B, 1, T, S] half-precision numbers, which is 2 N times less than the
scores that plain attention forms.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax import masks
from dream_jax.attention.per_device import per_device, splits_queries
from dream_jax.target import Target

# The first generation (Ampere) that cuDNN has flash kernels for. jax does not ask, and compiling would fail.
_OLDEST_CAPABILITY = (8, 0)


def refusal(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask, target: Target) -> str | None:
    """Why cuDNN cannot serve such a call and what to do, or None when it can. Looks at shapes and dtypes only."""
    if target.platform != "gpu":
        return (
            f'it is for NVIDIA GPUs, and this computation is for "{target.platform}"; use the backend "xla" or "auto", '
            "or compile for a GPU under attention.target_platform"
        )
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f'it computes in bfloat16 or float16, not {q_BTNH.dtype}; change the compute dtype, or use "xla" or "auto"'
        )
    library = _library_refusal(q_BTNH.shape[-1], q_BTNH.dtype)
    if library is not None:
        return library
    if jax.default_backend() == "gpu":  # else compiled ahead of time, for a GPU that nobody can be asked about
        capability = str(jax.local_devices()[0].compute_capability)
        if tuple(map(int, capability.split("."))) < _OLDEST_CAPABILITY:
            return (
                f'it needs compute capability 8.0 (Ampere) or newer, not {capability}; use the backend "xla" or "auto"'
            )
    return None


def _library_refusal(head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    # What cuDNN's kernels can do depends on its version and on the GPU: jax is asked, by tracing the smallest call.
    x_BTNH = jax.ShapeDtypeStruct((1, 8, 1, head_dim), dtype)
    try:
        jax.eval_shape(lambda x: jax.nn.dot_product_attention(x, x, x, implementation="cudnn"), x_BTNH)
    except NotImplementedError as error:
        return f'{error} Use the backend "xla" or "auto"'
    except RuntimeError as error:  # no cuDNN at all
        return f'{error} Install the extra "cuda", or use the backend "xla" or "auto"'
    return None


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
) -> Float[jax.Array, "B T N H"]:
    """The function that `dream_jax.attention.attention` describes, for calls that `refusal` lets pass."""
    batch, num_queries, num_keys = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1]
    native = understood(mask, num_queries, num_keys)
    if native is None:
        allowed_BTS = jnp.broadcast_to(mask.dense(num_queries, num_keys), (batch, num_queries, num_keys))
        return per_device(_with_mask, q_BTNH, k_BSKH, v_BSKH, (allowed_BTS, ("batch", "tokens", None)))
    kernel = functools.partial(_without_mask, causal=native.causal, reach=native.reach)
    if native.lengths_B is None:
        return per_device(kernel, q_BTNH, k_BSKH, v_BSKH)
    # At least 1: a softmax over nothing is not finite.
    lengths_B = jnp.clip(jnp.asarray(native.lengths_B, jnp.int32), 1, num_keys)
    return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, (jnp.broadcast_to(lengths_B, (batch,)), ("batch",)))


class Native(NamedTuple):
    """A mask in the kernel's own terms: lengths of the keys, causal order, and how far back a causal query looks."""

    lengths_B: jax.Array | None
    causal: bool
    reach: int | None


def understood(mask: masks.Mask, num_queries: int, num_keys: int) -> Native | None:
    """What the kernel is told of a mask, or None where it must be shown a bias."""
    lengths, causal, reach = [], False, []
    for part in masks.conjuncts(mask):
        if isinstance(part, masks.KeyLengths):
            lengths.append(jnp.asarray(part.lengths_B))
        elif isinstance(part, masks.Causal):
            causal = True
        elif isinstance(part, masks.SlidingWindow) and part.right == 0:  # it has none that look ahead
            causal = True
            reach.append(part.left)
        else:
            return None
    if len(lengths) > 1 or (lengths and reach):  # windows past a row's end would hold nothing
        return None
    # Causal order is that of the arrays' places, which a device with some of the queries does not have.
    if causal and (num_queries != num_keys or splits_queries(num_queries)):
        return None
    return Native(lengths[0] if lengths else None, causal, min(reach, default=None))


# What one device computes.


def _without_mask(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *lengths: jax.Array, causal: bool, reach: int | None
) -> jax.Array:
    told: dict[str, Any] = {}
    if lengths:
        # Of keys only: queries that are padding see the real keys, as the mask says, and no row of the output is left out.
        told["key_value_seq_lengths"] = lengths[0]
    if causal:
        told["is_causal"] = True
    if reach is not None:
        told["local_window_size"] = (reach, 0)
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, implementation="cudnn", **told)


def _with_mask(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    # Gradients under a mask need even lengths: a hidden key and a query that is cut off again make them so.
    num_queries, odd_T, odd_S = q_BTNH.shape[1], q_BTNH.shape[1] % 2, k_BSKH.shape[1] % 2
    allowed_BTS = jnp.pad(allowed_BTS, ((0, 0), (0, odd_T), (0, odd_S)))
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, odd_T), (0, 0), (0, 0)))
    k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, odd_S), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=allowed_BTS[:, None], implementation="cudnn")
    return out_BTNH[:, :num_queries]
