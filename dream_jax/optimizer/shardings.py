"""Computes the sharding and the size in bytes of an optimizer's state."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from dream_jax import sharding
from dream_jax.shapes import ParamTree


def require_host_memory(mesh: sharding.AnyMesh) -> None:
    """Raises ValueError if the devices of a mesh cannot access the pinned memory of their host."""
    if isinstance(mesh, AbstractMesh):  # it has no devices that could be checked
        return
    # If the mesh is only for compiling ahead of time, none of its devices is local.
    device = next(iter(mesh.local_devices), mesh.devices.flat[0])
    kinds = _memory_kinds(device)
    if "pinned_host" not in kinds:
        raise ValueError(
            f"moments_on_host needs the memory 'pinned_host', but {device.platform} devices here have {sorted(kinds)}; "
            "do not set it, or store the moments in less memory (int8)"
        )


def _memory_kinds(device: jax.Device) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


def opt_state_shardings(state: Any, params: ParamTree, mesh: sharding.AnyMesh) -> Any:
    """Returns a tree like `state` with the NamedSharding of each array.

    The path of an array in the state contains the path of its parameter. An array with the shape of the parameter has
    the same sharding. The `absmax` of 8-bit moments, and the row and column averages of Adafactor, are sharded along
    those axes of the parameter that they have. All other arrays are replicated.

    Args:
      state: arrays or shapes, as `OptimizerConfig.make().init` creates them for `params`.
      params: arrays or shapes of the parameters; their paths are those that `sharding.parameter_axes` knows, and
        arrays of other parameters are replicated.
      mesh: the devices of the state.

    Raises:
      ValueError: the moments are on the host, and the devices cannot access its pinned memory.
    """
    shapes = {path_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> Any:
        names = path_names(path)
        spans = (names[start:stop] for start in range(len(names)) for stop in range(start + 1, len(names) + 1))
        name = max((span for span in spans if span in shapes), key=len, default=None)
        axes = None if name is None else _axes_left(names, leaf.shape, name, shapes[name])
        spec = sharding.partition_spec(axes or [None] * len(leaf.shape), leaf.shape, dict(mesh.shape))
        found = jax.sharding.NamedSharding(mesh, spec)
        if "on_host" in names and leaf.shape:
            require_host_memory(mesh)
            return found.with_memory_kind("pinned_host")
        return found

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def _axes_left(
    names: tuple[str, ...], shape: tuple[int, ...], name: tuple[str, ...], param_shape: tuple[int, ...]
) -> tuple[str, ...] | None:
    """Returns the logical axes of an array in the state, or None if it is not sharded like its parameter.

    `names` and `shape` are the path and shape of the array, `name` and `param_shape` those of its parameter.
    """
    axes = sharding.parameter_axes(name)
    if axes is None:
        return None
    if shape == param_shape or (names[-1] == "absmax" and shape[:-1] == param_shape[:-1]):
        return axes
    # The name is needed too, because rows and columns of a square matrix have the same shape but different axes.
    for field, rank in (("v_row", -1), ("v_col", -2)):
        if field in names and len(param_shape) > 1:
            # optax averages v_row over the longest axis, and v_col over the second longest.
            missing = int(np.argsort(param_shape)[rank])
            if shape == (*param_shape[:missing], *param_shape[missing + 1 :]):
                return (*axes[:missing], *axes[missing + 1 :])
    return None


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the keys, field names and indices of a path of `jax.tree_util`, as strings."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def state_bytes(state: Any) -> int:
    """Returns the total size in bytes of all arrays (or shapes) of a state; replicas on other devices do not count."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
