"""cuDNN's flash attention on NVIDIA GPUs, through jax.nn.dot_product_attention. It stores no scores [T, S].

The kernel itself implements bidirectional and causal attention, padding on the right (given by lengths) and windows that
look back. For rows of several texts it has another layout, see `packed`. Other masks become a bias [B, 1, T, S] in half
precision, which takes 2 N times less memory than the float32 scores [B, N, T, S] of the "xla" backend.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax import masks
from dream_jax.attention import packed
from dream_jax.attention.per_device import per_device, splits_queries
from dream_jax.target import Target

# Compute capability of the oldest GPUs (Ampere) with cuDNN flash kernels. jax does not check it; for older GPUs the
# compilation would fail.
_OLDEST_CAPABILITY = (8, 0)


def refusal(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: masks.Mask, target: Target) -> str | None:
    """Returns why cuDNN does not support a call, with a remedy; None if it does.

    The answer depends on `target`, on the dtype and the head width of the queries, on the installed cuDNN, and on the GPU
    of this machine if there is one. It does not depend on values of the arrays or on the mask.
    """
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
    if jax.default_backend() == "gpu":  # without a GPU here, the program is compiled ahead of time for another machine
        capability = str(jax.local_devices()[0].compute_capability)
        if tuple(map(int, capability.split("."))) < _OLDEST_CAPABILITY:
            return (
                f'it needs compute capability 8.0 (Ampere) or newer, not {capability}; use the backend "xla" or "auto"'
            )
    return None


def _library_refusal(head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why cuDNN does not support this head width and dtype, or that it is not installed; None if it does."""
    # What cuDNN supports depends on its version and on the GPU. jax checks it when it traces a call: here a small one.
    x_BTNH = jax.ShapeDtypeStruct((1, 8, 1, head_dim), dtype)
    try:
        jax.eval_shape(lambda x: jax.nn.dot_product_attention(x, x, x, implementation="cudnn"), x_BTNH)
    except NotImplementedError as error:
        return f'{error} Use the backend "xla" or "auto"'
    except RuntimeError as error:  # cuDNN is not installed
        return f'{error} Install the extra "cuda", or use the backend "xla" or "auto"'
    return None


def attention(
    q_BTNH: Float[jax.Array, "B T N H"],
    k_BSKH: Float[jax.Array, "B S K H"],
    v_BSKH: Float[jax.Array, "B S K H"],
    mask: masks.Mask,
) -> Float[jax.Array, "B T N H"]:
    """Computes `dream_jax.attention.attention` for calls for which `refusal` returns None."""
    batch, num_queries, num_keys = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1]
    native = native_mask(mask, num_queries, num_keys)
    # If a device holds a shard of the queries only, its queries and keys are of different texts: the mask becomes a bias.
    if isinstance(mask, masks.Packed) and num_queries == num_keys and not splits_queries(num_queries):
        repeats = packed.usable(q_BTNH.shape[2], k_BSKH.shape[2], q_BTNH.shape[3], q_BTNH.dtype)
        if repeats is not None:
            kernel = functools.partial(packed.attention, repeats=repeats)
            return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, (jnp.asarray(mask.length_BM), ("batch", None)))
    if native is None:
        allowed_BTS = jnp.broadcast_to(mask.dense(num_queries, num_keys), (batch, num_queries, num_keys))
        return per_device(_with_mask, q_BTNH, k_BSKH, v_BSKH, (allowed_BTS, ("batch", "tokens", None)))
    kernel = functools.partial(_without_mask, causal=native.causal, lookback=native.lookback)
    if native.lengths_B is None:
        return per_device(kernel, q_BTNH, k_BSKH, v_BSKH)
    # The lengths are at least 1, because a softmax over no key is not finite.
    lengths_B = jnp.clip(jnp.asarray(native.lengths_B, jnp.int32), 1, num_keys)
    return per_device(kernel, q_BTNH, k_BSKH, v_BSKH, (jnp.broadcast_to(lengths_B, (batch,)), ("batch",)))


class NativeMask(NamedTuple):
    """The arguments by which the kernel itself implements a mask.

    Attributes:
      lengths_B: number of valid keys of each row, int [B]; None means all keys.
      causal: whether queries may attend only to keys up to their own position.
      lookback: number of tokens before itself to which a causal query may attend; None means all.
    """

    lengths_B: jax.Array | None
    causal: bool
    lookback: int | None


def native_mask(mask: masks.Mask, num_queries: int, num_keys: int) -> NativeMask | None:
    """Returns the mask as arguments of the kernel, or None if the kernel does not implement it and needs a bias."""
    lengths, causal, lookback = [], False, []
    for conjunct in masks.conjuncts(mask):
        if isinstance(conjunct, masks.KeyLengths):
            lengths.append(jnp.asarray(conjunct.lengths_B))
        elif isinstance(conjunct, masks.Causal):
            causal = True
        elif isinstance(conjunct, masks.SlidingWindow) and conjunct.right == 0:  # the kernel's windows only look back
            causal = True
            lookback.append(conjunct.left)
        else:
            return None
    if len(lengths) > 1 or (lengths and lookback):  # a window after the end of its row would contain no valid key
        return None
    # The kernel compares array indices. They are not the positions on a device that holds only a shard of the queries.
    if causal and (num_queries != num_keys or splits_queries(num_queries)):
        return None
    return NativeMask(lengths[0] if lengths else None, causal, min(lookback, default=None))


def _without_mask(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *lengths: jax.Array, causal: bool, lookback: int | None
) -> jax.Array:
    """Computes attention on one device from its shards of the arrays, with a mask that the kernel itself implements.

    lengths: nothing, or one int32 [B], the number of valid keys of each row. causal, lookback: as in `NativeMask`.
    """
    batch, num_queries, num_keys = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1]
    q_BTNH, k_BSKH, v_BSKH = _even(q_BTNH), _even(k_BSKH), _even(v_BSKH)
    options: dict[str, Any] = {}
    if lengths:
        # Only the keys get lengths: queries that are padding attend to the valid keys, as the mask says.
        options["key_value_seq_lengths"] = lengths[0]
    elif num_keys % 2 and not causal:  # a causal mask hides the additional key from all queries but the additional one
        options["key_value_seq_lengths"] = jnp.full((batch,), num_keys, jnp.int32)
    if causal:
        options["is_causal"] = True
    if lookback is not None:
        options["local_window_size"] = (lookback, 0)
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, implementation="cudnn", **options)
    return out_BTNH[:, :num_queries]


def _with_mask(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """Computes attention on one device from its shards of the arrays, with the mask as a bias.

    allowed_BTS: bool [B, T, S], true where a query may attend to a key.
    """
    num_queries, odd_T, odd_S = q_BTNH.shape[1], q_BTNH.shape[1] % 2, k_BSKH.shape[1] % 2
    allowed_BTS = jnp.pad(allowed_BTS, ((0, 0), (0, odd_T), (0, odd_S)))
    q_BTNH, k_BSKH, v_BSKH = _even(q_BTNH), _even(k_BSKH), _even(v_BSKH)
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=allowed_BTS[:, None], implementation="cudnn")
    return out_BTNH[:, :num_queries]


def _even(x_BTNH: jax.Array) -> jax.Array:
    """Returns queries, keys or values with one more token if their number is odd.

    cuDNN's gradients with a mask need even lengths. jax also refuses odd lengths without a mask ("Unsupported sequence
    length"), because it treats the empty array that stands for "no bias" as a bias. The callers remove the output of the
    additional query again, and hide the additional key.
    """
    return jnp.pad(x_BTNH, ((0, 0), (0, x_BTNH.shape[1] % 2), (0, 0), (0, 0)))
