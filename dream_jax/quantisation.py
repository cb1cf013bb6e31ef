"""Stores frozen weights in 8 or 4 bits, as codes with one scale per block, and multiplies matrices with them.

| kind | bytes per weight | codes | maximum error / largest magnitude of the block |
|---|---|---|---|
| int8 | 1 + 4/64 | int8, 255 equally spaced levels | 0.4 % |
| nf4 | 1/2 + 4/64 | uint8 with two weights of 16 levels | 15.2 % |

A block is `BLOCK` neighbours on the last axis, or the whole axis if that is shorter. Codes and scales therefore have
the axes of their kernel and can be sharded like it. nf4 is the data type of the QLoRA paper (Dettmers et al. 2023). The
paper also quantises the scales; here they stay float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax.shapes import ParamTree

CodeKind = Literal["int8", "nf4"]
KINDS: tuple[CodeKind, ...] = get_args(CodeKind)

BLOCK = 64  # elements per scale, as in the QLoRA paper

# From appendix E of the QLoRA paper: means of neighbouring quantiles of a normal distribution, 8 from each side, scaled
# to [-1, 1]; zero is one of the levels.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class QuantisedKernel(NamedTuple):
    """A kernel with one byte or half a byte per element.

    Attributes:
      codes: int8 with the shape of the kernel; or, for nf4, uint8 with two elements per byte. Byte j of a block of w
        elements has element j in its low half and element j + w/2 in its high half, so that packing and unpacking
        need not interleave elements.
      scales: float32 [..., blocks], the largest magnitude of the elements of each block.
    """

    codes: Any
    scales: Any


def _width(size: int) -> int:
    """Returns the number of elements of a block on an axis of this size; even, because nf4 packs two in a byte."""
    return min(BLOCK, size + size % 2)


def _blocks(x: jax.Array) -> jax.Array:
    """Reshapes [..., d] to [..., blocks, width], with zeros at the end of the last block."""
    width = _width(x.shape[-1])
    short = -x.shape[-1] % width
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, width)


def quantise(x: Float[jax.Array, "*b d"], kind: CodeKind) -> QuantisedKernel:
    """Rounds every element of a kernel to the nearest level; the result does not depend on the sharding.

    Zeros and the largest magnitude of each block are exact (in int8 up to float32 rounding). A block with an infinity
    or a NaN has meaningless codes.

    Raises:
      ValueError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind=} is not one of {KINDS}")
    blocks = _blocks(x.astype(jnp.float32))
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    share = blocks / jnp.where(scales == 0.0, 1.0, scales)[..., None]
    if kind == "int8":
        codes = jnp.round(share * 127.0).astype(jnp.int8)
        return QuantisedKernel(codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scales)
    code = jnp.zeros(share.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4_LEVELS):
        code = code + (share > (low + high) / 2).astype(jnp.uint8)
    first, second = jnp.split(code, 2, axis=-1)
    packed = first | (second << jnp.uint8(4))
    return QuantisedKernel(packed.reshape(*x.shape[:-1], -1), scales)


def kind_of(codes: Any) -> CodeKind:
    """Returns the kind of codes (an array or a shape), which follows from their dtype."""
    return "nf4" if codes.dtype == jnp.uint8 else "int8"


def dequantise(x: QuantisedKernel, size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[jax.Array, "*b d"]:
    """Returns the kernel in this dtype, computed in float32; `size` is the size of the last axis of the kernel."""
    width = _width(size)
    if kind_of(x.codes) == "int8":
        # The factor 1/127 is applied to the scales, because there are only 1/64 as many scales as elements.
        values = _blocks(x.codes.astype(jnp.float32)) * (x.scales * jnp.float32(1 / 127))[..., None]
    else:
        packed = x.codes.reshape(*x.codes.shape[:-1], -1, width // 2)
        code = jnp.concatenate([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=-1)
        values = _level(code) * x.scales[..., None]
    return values.reshape(*values.shape[:-2], -1)[..., :size].astype(dtype)


def _level(code: jax.Array) -> jax.Array:
    """Returns the float32 levels of nf4 codes.

    They are chosen bit by bit with 15 selections. XLA fuses these, but not the gather of a look-up in a table.
    """
    choices: list[Any] = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (code & jnp.uint8(1 << bit)) != 0
        choices = [jnp.where(is_set, high, low) for low, high in zip(choices[::2], choices[1::2], strict=True)]
    found: jax.Array = choices[0]
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x_RI: jax.Array, codes: jax.Array, scales: jax.Array, size: int) -> jax.Array:
    """Multiplies x [R, I] with a quantised kernel, reshaped to a matrix [I, O].

    Only x has a gradient. The backward pass dequantises the kernel again: storing the dequantised kernels of all layers
    for it would take as much memory as the model in full precision.

    Args:
      x_RI: float [R, I]; I is the number of inputs of the kernel.
      codes, scales: the fields of a `QuantisedKernel`.
      size: the size of the last axis of the kernel.

    Returns:
      [R, O] in the dtype of x; O is the number of outputs of the kernel.
    """
    return x_RI @ dequantise(QuantisedKernel(codes, scales), size, x_RI.dtype).reshape(x_RI.shape[1], -1)


# The two rules of custom_vjp have no annotations, because only jax calls them, with the types of `product`.
def _forward(x_RI, codes, scales, size):  # type: ignore[no-untyped-def]
    return product(x_RI, codes, scales, size), (codes, scales)


def _backward(size, residuals, gradient_RO):  # type: ignore[no-untyped-def]
    kernel_IO = dequantise(QuantisedKernel(*residuals), size, gradient_RO.dtype).reshape(-1, gradient_RO.shape[1])
    return gradient_RO @ kernel_IO.T, None, None


product.defvjp(_forward, _backward)


def quantised_kernels(params: ParamTree, kind: CodeKind, others: Callable[[jax.Array], jax.Array]) -> ParamTree:
    """Returns the tree with each leaf `kernel` replaced by `codes` and `scales`, and other leaves by `others(leaf)`."""
    new_params: ParamTree = {}
    for name, value in params.items():
        if isinstance(value, dict):
            new_params[name] = quantised_kernels(value, kind, others)
        elif name == "kernel":
            new_params |= quantise(value, kind)._asdict()
        else:
            new_params[name] = others(value)
    return new_params
