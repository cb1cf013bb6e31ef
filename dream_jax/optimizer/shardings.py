"""The sharding and the size of an optimizer's state."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from dream_jax import sharding
from dream_jax.shapes import ParamTree


def require_host_memory(mesh: sharding.AnyMesh) -> None:
    """Raises ValueError when the devices of a mesh cannot reach the pinned memory of their host."""
    if isinstance(mesh, AbstractMesh):  # it has sizes but no devices
        return
    # Of a topology that is only compiled for, no device is local.
    device = next(iter(mesh.local_devices), mesh.devices.flat[0])
    kinds = _memory_kinds(device)
    if "pinned_host" not in kinds:
        raise ValueError(
            f"moments_on_host needs the memory 'pinned_host', but {device.platform} devices here have {sorted(kinds)}; "
            "leave it off, or store the moments smaller (int8)"
        )


def _memory_kinds(device: jax.Device) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


def opt_state_shardings(state: Any, params: ParamTree, mesh: sharding.AnyMesh) -> Any:
    """The sharding of each array of an optimizer's state: that of the parameter that its path names, or replicated.

    An array of the parameter's shape has the parameter's sharding. Block maxima, and the rows and columns of Adafactor,
    are sharded along the parameter's axes that they still have.

    Args:
      state: arrays or shapes, as `OptimizerConfig.make` creates them for `params`.
      params: arrays or shapes, with paths of `sharding.PARAMETER_AXES`.
      mesh: the devices.

    Raises:
      ValueError: moments are to be on the host, and the devices cannot reach its memory.
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
    names: tuple[str, ...], shape: tuple[int, ...], name: tuple[str, ...], whole: tuple[int, ...]
) -> tuple[str, ...] | None:
    """The logical axes of an array in the state of a parameter with shape `whole`; None when it has none of them."""
    axes = sharding.PARAMETER_AXES[".".join(name)]
    if shape == whole or (names[-1] == "absmax" and shape[:-1] == whole[:-1]):
        return axes
    # By name as well as by shape: the rows and columns of a square matrix have the same shape but different axes.
    for field, rank in (("v_row", -1), ("v_col", -2)):
        if field in names and len(whole) > 1:
            missing = int(
                np.argsort(whole)[rank]
            )  # optax averages rows over the longest axis, columns over the next one
            if shape == (*whole[:missing], *whole[missing + 1 :]):
                return (*axes[:missing], *axes[missing + 1 :])
    return None


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys, field names and indices along the path of a tree, as strings."""
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays (or shapes) in a state, each counted once, however it is sharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
