"""The sharding of every array: two tables, and the device mesh that they refer to.

The first table names the axes of each parameter, the second maps a name of an axis to mesh axes; changing the strategy
means changing one dict.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dream_jax.distributed import provide_cpu_devices
from dream_jax.shapes import ParamTree

MESH_AXES = ("fsdp", "tensor", "sequence")

# A mesh, or one of sizes only, for planning where nothing can even compile for the devices.
AnyMesh = Mesh | AbstractMesh

# Table one: parameter path -> logical axes, one a dimension.
PARAMETER_AXES: Mapping[str, tuple[str, ...]] = {
    "embed.embedding": ("vocab", "embed"),
    "layers.attn_norm.scale": ("layers", "norm"),
    "layers.attn.q.kernel": ("layers", "embed", "heads", "head_dim"),
    "layers.attn.q.bias": ("layers", "heads", "head_dim"),
    "layers.attn.k.kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "layers.attn.k.bias": ("layers", "kv_heads", "head_dim"),
    "layers.attn.v.kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "layers.attn.v.bias": ("layers", "kv_heads", "head_dim"),
    "layers.attn.o.kernel": ("layers", "heads", "head_dim", "embed"),
    "layers.mlp_norm.scale": ("layers", "norm"),
    "layers.mlp.gate.kernel": ("layers", "embed", "mlp"),
    "layers.mlp.up.kernel": ("layers", "embed", "mlp"),
    "layers.mlp.down.kernel": ("layers", "mlp", "embed"),
    # Adapters: a product of two narrow matrices beside each kernel, divided like the kernel's own axes.
    "layers.attn.q.lora_a": ("layers", "embed", "lora_rank"),
    "layers.attn.q.lora_b": ("layers", "lora_rank", "heads", "head_dim"),
    "layers.attn.k.lora_a": ("layers", "embed", "lora_rank"),
    "layers.attn.k.lora_b": ("layers", "lora_rank", "kv_heads", "head_dim"),
    "layers.attn.v.lora_a": ("layers", "embed", "lora_rank"),
    "layers.attn.v.lora_b": ("layers", "lora_rank", "kv_heads", "head_dim"),
    "layers.attn.o.lora_a": ("layers", "heads", "head_dim", "lora_rank"),
    "layers.attn.o.lora_b": ("layers", "lora_rank", "embed"),
    "layers.mlp.gate.lora_a": ("layers", "embed", "lora_rank"),
    "layers.mlp.gate.lora_b": ("layers", "lora_rank", "mlp"),
    "layers.mlp.up.lora_a": ("layers", "embed", "lora_rank"),
    "layers.mlp.up.lora_b": ("layers", "lora_rank", "mlp"),
    "layers.mlp.down.lora_a": ("layers", "mlp", "lora_rank"),
    "layers.mlp.down.lora_b": ("layers", "lora_rank", "embed"),
    "norm.scale": ("norm",),
    "lm_head.kernel": ("embed", "vocab"),
}

# Table two: logical axis -> mesh axis, or several. An axis that its mesh axes do not divide is kept whole (see
# `partition_spec`).
LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...] | None] = {
    # parameters
    "vocab": "tensor",
    # Devices that share a row's tokens need not each hold the same parameters.
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "lora_rank": None,
    "layers": None,
    "norm": None,  # [D] vectors: splitting them saves nothing and costs a collective each
    # activations
    "batch": "fsdp",
    "tokens": "sequence",
    "token_group": ("fsdp", "sequence"),  # the tokens that one group of devices holds, when B and T are one axis
    "width": None,
}


def parse_mesh_shape(text: str) -> tuple[int, int, int]:
    """Reads `FSDPxTENSOR` or `FSDPxTENSORxSEQUENCE`, as in "8x1", into three sizes.

    Raises:
      ValueError: not two or three positive numbers.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
        raise ValueError(
            f"mesh {text!r} is not of the form FSDPxTENSOR, such as 8x1 or 4x2, or FSDPxTENSORxSEQUENCE, such as 2x1x4"
        )
    fsdp, tensor, sequence = [*(int(part) for part in text.split("x")), 1][:3]
    return fsdp, tensor, sequence


def make_mesh(shape: str | tuple[int, ...] | Mesh) -> Mesh:
    """The device mesh of a shape such as "8x1" (fsdp x tensor), over all processes.

    On a CPU backend that is not yet initialised, as many devices as needed are made, so that the same command runs
    anywhere. Of a Mesh that the caller has made, the axes must be `MESH_AXES`, or the first of them; it is taken over
    with automatic axis types, which is what all code here is written for.

    Raises:
      ValueError: fewer devices than the mesh needs, or a Mesh with other axes, with what to do.
    """
    if isinstance(shape, Mesh):
        return _adopt(shape)
    sizes = parse_mesh_shape(shape if isinstance(shape, str) else "x".join(map(str, shape)))
    needed = math.prod(sizes)
    if not jax.distributed.is_initialized():  # otherwise `distributed.join` has done it
        provide_cpu_devices(needed)
    devices = jax.devices()
    if len(devices) < needed:
        here = f"{len(devices)} {devices[0].platform} device(s)"
        text = "x".join(map(str, sizes if sizes[2] > 1 else sizes[:2]))
        raise ValueError(
            f"mesh {text} needs {needed} devices, but there are {here}; pass a smaller mesh"
            + ("" if devices[0].platform != "cpu" else f", or set JAX_NUM_CPU_DEVICES={needed} before jax starts")
        )
    if len(devices) > needed and jax.process_count() > 1:
        raise ValueError(
            f"mesh {shape} uses {needed} of {len(devices)} devices; with several processes it must use all"
        )
    if len(devices) == needed:
        return mesh_over(devices, sizes)
    return Mesh(np.asarray(devices[:needed]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_over(devices: Sequence[jax.Device], sizes: tuple[int, int, int]) -> Mesh:
    """The mesh of these sizes over exactly these devices, which may be absent ones that a step is only compiled for.

    Raises:
      ValueError: another number of devices.
    """
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {'x'.join(map(str, sizes))} has {math.prod(sizes)} devices, but there are {len(devices)}; they must be "
            "as many"
        )
    if devices[0].platform == "tpu":
        # Lets the library lay neighbours of the mesh on neighbours of the torus.
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _adopt(mesh: Mesh) -> Mesh:
    if mesh.axis_names != MESH_AXES[: len(mesh.axis_names)] or len(mesh.axis_names) < 2:
        raise ValueError(
            f"a mesh with the axes {mesh.axis_names} was given, but parameters are placed along {MESH_AXES}; "
            'name its axes so (the last may be left out), or pass a text such as "8x1"'
        )
    devices = mesh.devices.reshape((*mesh.devices.shape, 1)[:3])
    parse_mesh_shape("x".join(map(str, devices.shape)))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The second table applied to one array.

    An axis that its mesh axis does not divide stays whole on every device: 4 key/value heads on 8 tensor-parallel
    devices, say, are replicated, as is usual. Of several mesh axes, those that do not divide what is left are passed
    over.

    Raises:
      ValueError: as many names as dimensions are needed; an unknown name.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{tuple(axes)} names {len(axes)} axes of an array with shape {tuple(shape)}")
    places: list[str | tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in LOGICAL_TO_MESH:
            raise ValueError(f"logical axis {axis!r} has no row in LOGICAL_TO_MESH")
        wanted = None if axis is None else LOGICAL_TO_MESH[axis]
        place = _dividing((wanted,) if isinstance(wanted, str) else wanted or (), size, mesh_shape, taken)
        taken.update(place)
        places.append(place if len(place) > 1 else next(iter(place), None))
    while places and places[-1] is None:
        places.pop()
    return PartitionSpec(*places)


def _dividing(names: tuple[str, ...], size: int, mesh_shape: Mapping[str, int], taken: set[str]) -> tuple[str, ...]:
    """As many of the mesh axes, from the first, as together divide an axis of this size."""
    found: tuple[str, ...] = ()
    ways = 1
    for name in names:
        here = mesh_shape.get(name, 1)
        if here > 1 and name not in taken and size % (ways * here) == 0:
            found, ways = (*found, name), ways * here
    return found


def parameter_specs(shapes: ParamTree, mesh: AnyMesh) -> ParamTree:
    """PartitionSpec of every parameter in a nested dict of arrays or shapes.

    Raises:
      ValueError: a path without a row in PARAMETER_AXES, or of another rank than its row.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = ".".join(str(part.key) for part in path)
        folder, _, last = name.rpartition(".")
        # What stands for a quantised kernel keeps its axes: codes all of them, scales one a block of the last.
        row = f"{folder}.kernel" if last in ("codes", "scales") else name
        if row not in PARAMETER_AXES:
            raise ValueError(f"parameter {name!r} has no row in PARAMETER_AXES")
        try:
            return partition_spec(PARAMETER_AXES[row], leaf.shape, dict(mesh.shape))
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error

    return jax.tree_util.tree_map_with_path(spec, shapes)


def parameter_shardings(shapes: ParamTree, mesh: AnyMesh) -> ParamTree:
    """NamedSharding of every parameter; see `parameter_specs`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        parameter_specs(shapes, mesh),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows over fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def platform_of(mesh: AnyMesh) -> str:
    """jax's name for the platform of the mesh's devices, present or not."""
    device = mesh.abstract_mesh.abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its place under the current mesh (`jax.set_mesh`); without a mesh, returns it untouched."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape)))


def constrain_parameters(params: ParamTree) -> ParamTree:
    """Pins parameters that a compiled function makes to their places; as `constrain`."""
    mesh = jax.sharding.get_abstract_mesh()
    return params if mesh.empty else jax.lax.with_sharding_constraint(params, parameter_specs(params, mesh))


def mesh_context(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which the mesh that the arrays of a tree lie on is the current one, unless there is one already.

    Does nothing under a trace: whoever compiles a function around the model sets the mesh.
    """
    mesh = mesh_of(tree) if jax.sharding.get_abstract_mesh().empty else None
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def token_shards(batch: int, length: int) -> tuple[int, int]:
    """Into how many parts the current mesh splits the rows and the tokens of activations [batch, length, ...]."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = () if mesh.empty else partition_spec(("batch", "tokens"), (batch, length), dict(mesh.shape))
    rows, tokens = [*spec, None, None][:2]
    return mesh.shape[rows] if rows else 1, mesh.shape[tokens] if tokens else 1


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree were placed on, or None for plain arrays and under a trace."""
    for leaf in jax.tree.leaves(tree):
        placed = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh):
            return placed.mesh
    return None


def bytes_per_device(tree: Any) -> dict[str, int]:
    """Bytes that the arrays of a tree occupy on each local device, by device name; those in the host's memory do not."""
    total: dict[str, int] = {str(device): 0 for device in jax.local_devices()}
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind == "pinned_host":
            continue
        for shard in leaf.addressable_shards:
            total[str(shard.device)] = total.get(str(shard.device), 0) + shard.data.nbytes
    return total
