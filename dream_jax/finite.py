"""Finds weights that are no numbers: NaN and infinities, also those that a cast to another dtype would make."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dream_jax.shapes import ParamTree


def largest_magnitude(x: np.ndarray) -> np.ndarray:
    """Returns the largest magnitude in an array of floats, as an array [] of its dtype; NaN if the array has a NaN.

    It compares the bits as integers, which is several times faster than comparing 16-bit floats: without the sign bit,
    integers have the order of the floats, and only those of NaN are larger than those of infinity. It makes no copy.
    """
    bits = 8 * x.itemsize
    sign = 1 << (bits - 1)
    if not x.size:
        return np.zeros((), x.dtype)
    # As signed integers, negative floats are below all others. As unsigned integers, they are above all others.
    positive = max(int(x.view(f"i{x.itemsize}").max()), 0)
    highest = int(x.view(f"u{x.itemsize}").max())
    return np.array(max(positive, highest & (sign - 1)), f"u{x.itemsize}").view(x.dtype)


def check_weights(where: str, x: np.ndarray, dtype: np.dtype | None = None) -> None:
    """Raises ValueError if an array has NaN or infinities, or would have them after a cast to `dtype`.

    Args:
      where: the names of the file and of the tensor, with which the message begins.
      x: floats of 16 or 32 bits.
      dtype: the dtype that the array will be cast to; None for that of the array.
    """
    largest = largest_magnitude(x)
    if not np.isfinite(largest):
        raise ValueError(
            f"{where} holds weights that are no numbers (NaN or infinity): the file is damaged, or the weights are those "
            "of a run that has diverged; use another checkpoint"
        )
    if dtype is not None and dtype != x.dtype:
        with np.errstate(over="ignore"):
            fits = np.isfinite(largest.astype(dtype))
        if not fits:
            raise ValueError(
                f"{where} holds a weight of magnitude {float(largest):g}, which is infinite in {dtype}; choose bfloat16 or "
                "float32 as the dtype"
            )


def check_parameters(where: str, params: ParamTree, mesh: Mesh | None = None) -> None:
    """Raises ValueError if a parameter has NaN or infinities; the message begins with `where` and its dotted path.

    Args:
      where: the directory of the parameters.
      params: nested dict of numpy or jax arrays. All processes must call this with the same arrays of jax.
      mesh: the devices of the jax arrays; None for one device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}
    arrays = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array) and not _on_host(leaf)}
    # All reductions are started before the first result is awaited.
    finite = {name: _all_finite(mesh)(leaf) for name, leaf in arrays.items()}
    for name, leaf in named.items():
        if name not in arrays:
            check_weights(f"{where}: {name}", np.asarray(leaf))
        elif not finite[name]:
            check_weights(f"{where}: {name}", np.full((), np.nan, np.float32))


def _on_host(x: jax.Array) -> bool:
    """Returns whether an array is on one CPU device. numpy reads it without a copy, and without compiling a program."""
    platforms: list[Any] = [device.platform for device in x.devices()]
    return platforms == ["cpu"]


@functools.cache
def _all_finite(mesh: Mesh | None) -> Any:
    """Returns the compiled function from an array on the mesh to whether all its elements are finite."""
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: jnp.all(jnp.isfinite(x)), out_shardings=replicated)
