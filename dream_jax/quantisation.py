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

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax.shapes import ParamTree
from dream_jax.target import current_target

CodeKind = Literal["int8", "nf4"]
KINDS: tuple[CodeKind, ...] = get_args(CodeKind)

BLOCK = 64  # elements per scale, as in the QLoRA paper

# With at most this many rows, a product on a GPU can read int8 codes without writing the dequantised kernel to memory. With
# more rows the arithmetic takes longer than reading the kernel, and a product of float matrices is faster.
MOST_FUSED_ROWS = 256

# XLA's GPU compiler multiplies int8 codes with their scales inside a matrix product only with this option.
COMPILER_OPTIONS = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}

# True inside `fusing`. A user context is a part of the key of the caches of jax.jit.
_fusing = jax.make_user_context(False)

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
      scales: float32 [..., blocks], the largest magnitude of the elements of each block. For sampling they may be
        rounded to bfloat16, see `lora.round_scales`.
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
        values = _blocks(x.codes.astype(jnp.float32)) * (x.scales.astype(jnp.float32) * jnp.float32(1 / 127))[..., None]
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

    A product of few rows on a GPU dequantises the codes while it multiplies, see `is_fused`. All other products, and all
    products that are differentiated, dequantise the whole kernel first.

    Only x has a gradient. The backward pass dequantises the kernel again: storing the dequantised kernels of all layers
    for it would take as much memory as the model in full precision.

    Args:
      x_RI: float [R, I]; I is the number of inputs of the kernel.
      codes, scales: the fields of a `QuantisedKernel`.
      size: the size of the last axis of the kernel.

    Returns:
      [R, O] in the dtype of x; O is the number of outputs of the kernel.
    """
    if is_fused(x_RI, codes, size):
        inputs = x_RI.shape[1]
        axes = next(number for number in range(codes.ndim + 1) if math.prod(codes.shape[:number]) == inputs)
        quantised = QuantisedKernel(*(leaf.reshape(inputs, *leaf.shape[axes:]) for leaf in (codes, scales)))
        return _fused_product(x_RI, quantised).reshape(x_RI.shape[0], -1)
    return x_RI @ dequantise(QuantisedKernel(codes, scales), size, x_RI.dtype).reshape(x_RI.shape[1], -1)


# The two rules of custom_vjp have no annotations, because only jax calls them, with the types of `product`.
def _forward(x_RI, codes, scales, size):  # type: ignore[no-untyped-def]
    kernel = dequantise(QuantisedKernel(codes, scales), size, x_RI.dtype)
    return x_RI @ kernel.reshape(x_RI.shape[1], -1), (codes, scales)


def _backward(size, residuals, gradient_RO):  # type: ignore[no-untyped-def]
    kernel_IO = dequantise(QuantisedKernel(*residuals), size, gradient_RO.dtype).reshape(-1, gradient_RO.shape[1])
    return gradient_RO @ kernel_IO.T, None, None


product.defvjp(_forward, _backward)


def joined_product(x_RI: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Multiplies x [R, I] with a kernel [I, *out_shape] in int8, and keeps the axes of its outputs. See `product`.

    Args:
      x_RI: float [R, I].
      codes, scales: the fields of a `QuantisedKernel` of the kind int8.

    Returns:
      [R, *out_shape] in the dtype of x.
    """
    kernel, size = QuantisedKernel(codes, scales), codes.shape[-1]
    if is_fused(x_RI, codes, size):
        # XLA may divide the inputs among several thread blocks, and must then add their partial sums. With the barrier this
        # happens once, and not in each of the operations that use some of the outputs.
        return jax.lax.optimization_barrier(_fused_product(x_RI, kernel))
    return jax.lax.dot_general(x_RI, dequantise(kernel, size, x_RI.dtype), (((1,), (0,)), ((), ())))


def fusing() -> contextlib.AbstractContextManager[Any]:
    """Returns a context manager, inside which products may dequantise codes while they multiply, see `is_fused`.

    It is for programs that are compiled with `COMPILER_OPTIONS`, such as those of `sampler.compiled.ModelProgram`. Without
    these options XLA would write the dequantised kernels, and the inputs once for each block of outputs, to memory.
    """
    return _fusing(True)


def is_fused(x_RI: jax.Array, codes: Any, size: int) -> bool:
    """Returns whether a product dequantises codes while it multiplies, without writing the kernel to memory.

    This needs the context `fusing`, a GPU as the target (`target.current_target`), int8 codes in blocks of `BLOCK`,
    bfloat16 inputs and at most `MOST_FUSED_ROWS` rows. It is not done for nf4, whose levels XLA does not select inside a
    matrix product.

    Args:
      x_RI: the inputs of the product, [R, I].
      codes: the codes of a `QuantisedKernel`.
      size: number of elements of the kernel along its last axis.
    """
    return (
        bool(_fusing.value)
        and current_target().platform == "gpu"
        and kind_of(codes) == "int8"
        and size % BLOCK == 0
        and x_RI.dtype == jnp.bfloat16
        and x_RI.shape[0] <= MOST_FUSED_ROWS
    )


def _fused_product(x_RI: jax.Array, kernel: QuantisedKernel) -> jax.Array:
    """Returns the product [R, *out_shape] with int8 codes [I, *out_shape], as one kernel of XLA's GPU compiler.

    XLA moves the multiplication of codes and scales into the matrix product only if the scales have all axes of the codes
    but the last one. So the blocks of outputs are batch axes, and each block has one scale for every input. Codes are
    exact in bfloat16. Scales are rounded to bfloat16, because XLA does not round float32 numbers inside a product.
    """
    rows, inputs = x_RI.shape
    outputs = kernel.codes.shape[1:]
    codes = kernel.codes.reshape(inputs, *outputs[:-1], -1, BLOCK).astype(x_RI.dtype)
    scales = kernel.scales.astype(x_RI.dtype)
    blocks = scales.shape[1:]
    x = jnp.broadcast_to(x_RI, (*blocks, rows, inputs))
    batch = range(len(blocks))
    axes = (((len(blocks) + 1,), (0,)), (tuple(batch), tuple(axis + 1 for axis in batch)))
    y = jax.lax.dot_general(x, codes * scales[..., None], axes, preferred_element_type=jnp.float32)
    y = jnp.moveaxis((y * jnp.float32(1 / 127)).astype(x_RI.dtype), -2, 0)
    return y.reshape(rows, *outputs)


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
