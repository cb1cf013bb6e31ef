"""Multiplies matrices in 8-bit floating point (fp8), forward and for both gradients, with one scale per matrix.

Each matrix is divided by a scale, so that its largest magnitude is in the upper half of the range of the format, and is
rounded to 8 bits. The rounded matrices are multiplied with float32 sums, and the product is multiplied by the two scales
(Micikevicius et al. 2022, FP8 Formats for Deep Learning; here a scale is computed from the matrix itself, not from earlier
steps). Inputs and weights are e4m3 (3 bits of mantissa, up to 448). Gradients are e5m2 (2 bits of mantissa, up to 57344),
which has a wider range. On NVIDIA GPUs from Hopper on, XLA compiles this into one fp8 product of cuBLASLt, which has twice
the rate of a product in bfloat16; a test reads the compiled program. On other devices the same code has the same roundings.

`products` is a context manager, and `matrix_product` is the product that `model.Linear` computes. So a model and its
files do not know about fp8: the training step chooses it, and evaluating and sampling multiply in the compute dtype.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Float

from dream_jax.chips import chip_of
from dream_jax.sharding import AnyMesh

Products = Literal["compute", "fp8", "fp8-emulated"]

# A smaller largest magnitude is replaced by this number, so that scales and products of two scales are normal numbers.
_LEAST_MAGNITUDE = 1e-12

# The lowest compute capability for which the compiled fp8 products were checked: that of Hopper.
_LEAST_CAPABILITY = (9, 0)

# A user context is a part of the key of the caches of jax.jit, so another choice makes jax trace a function again.
_chosen_products = jax.make_user_context("compute")


def products(kind: Products) -> contextlib.AbstractContextManager[Any]:
    """Returns a context manager, inside which the layers of a model are traced with products of this kind.

    Args:
      kind: "compute" multiplies in the dtype of the inputs; "fp8" multiplies in fp8 on devices that `check_devices`
        accepts; "fp8-emulated" makes the same roundings on any device, slowly where the device has no fp8 products.

    Raises:
      ValueError: `kind` is unknown.
    """
    if kind not in get_args(Products):
        raise ValueError(f"products={kind!r} is not one of {get_args(Products)}")
    return _chosen_products(kind)


def check_devices(mesh: AnyMesh, kind: Products) -> None:
    """Raises ValueError if `kind` is "fp8" and the devices of the mesh have no products in fp8."""
    if kind != "fp8":
        return
    if isinstance(mesh, AbstractMesh):
        device = mesh.abstract_device
        chip = None if device is None else chip_of(device.device_kind)
        found, able = "these devices", chip is not None and chip.has_fp8
        if device is not None:
            found = device.device_kind
    else:
        device = mesh.devices.flat[0]
        found, able = device.device_kind, device.platform == "gpu" and _capability(device) >= _LEAST_CAPABILITY
    if not able:
        raise ValueError(
            f"--products fp8 needs NVIDIA GPUs from Hopper on (H100, H200, B200), but this is {found}; leave it out, or "
            "try what it does to a training with --products fp8-emulated, which is slow"
        )


def _capability(device: jax.Device) -> tuple[int, ...]:
    """Returns the compute capability of an NVIDIA GPU, such as (9, 0); (0,) for a GPU of another maker."""
    parts = str(device.compute_capability).split(".")  # a GPU of AMD has a name here, such as "gfx942"
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else (0,)


def matrix_product(x_RI: Float[jax.Array, "R I"], kernel_IO: Float[jax.Array, "I O"]) -> Float[jax.Array, "R O"]:
    """Multiplies two matrices of one dtype, in the way that `products` has chosen.

    Returns:
      [R, O], in the dtype of the inputs.
    """
    kind: Products = _chosen_products.value
    return x_RI @ kernel_IO if kind == "compute" else product(x_RI, kernel_IO)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns x / scale in the 8-bit format `dtype`, and the scale, a scalar in the dtype of x.

    The scale is the least power of 2 with which the largest magnitude is in the range of the format. So the scale is exact
    in bfloat16, which XLA expects. It is the same on every device of a mesh. A NaN or an infinity in x makes the scale NaN
    or infinite, so that every element of a product with this matrix is NaN.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), _LEAST_MAGNITUDE)
    scale = jnp.exp2(jnp.ceil(jnp.log2(largest / float(jnp.finfo(dtype).max))))
    x8 = (x.astype(jnp.float32) * (1.0 / scale)).astype(dtype)
    # Without the barrier XLA would remove the conversion to 8 bits together with the conversion back in `_exact`.
    return jax.lax.optimization_barrier(x8), scale.astype(x.dtype)


@jax.custom_vjp
def product(x_RI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """Multiplies two matrices after rounding both to e4m3.

    The backward pass rounds the gradient to e5m2, and uses the rounded inputs, which are saved for it in 8 bits.

    Args:
      x_RI: inputs [R, I], in the compute dtype.
      kernel_IO: weights [I, O], in the same dtype.

    Returns:
      [R, O], in the dtype of x.
    """
    return _forward(x_RI, kernel_IO)[0]


def _exact(x: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the array that a result of `rounded` represents. XLA recognises the product of two as a product in fp8."""
    return x[0].astype(x[1].dtype) * x[1]


# The two rules of custom_vjp have no annotations, because only jax calls them, with the types of `product`.
def _forward(x_RI, kernel_IO):  # type: ignore[no-untyped-def]
    x8_RI, kernel8_IO = rounded(x_RI, jnp.float8_e4m3fn), rounded(kernel_IO, jnp.float8_e4m3fn)
    return _exact(x8_RI) @ _exact(kernel8_IO), (x8_RI, kernel8_IO)


def _backward(residuals, gradient_RO):  # type: ignore[no-untyped-def]
    x8_RI, kernel8_IO = residuals
    gradient8_RO = rounded(gradient_RO, jnp.float8_e5m2)
    return _exact(gradient8_RO) @ _exact(kernel8_IO).T, _exact(x8_RI).T @ _exact(gradient8_RO)


product.defvjp(_forward, _backward)
