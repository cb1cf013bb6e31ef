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

# A mesh of devices, or one of sizes only, for planning where compiling for the devices is not possible.
AnyMesh = Mesh | AbstractMesh

# Table one: parameter path -> logical axes, one per dimension.
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
    # Adapters: a product of two narrow matrices beside each kernel, sharded like the axes of the kernel.
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

# Table two: logical axis -> mesh axis, or several. An axis that its mesh axes do not divide is replicated (see
# `partition_spec`).
LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...] | None] = {
    # parameters
    "vocab": "tensor",
    # Devices that share the tokens of a row can also share the parameters.
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "lora_rank": None,
    "layers": None,
    "norm": None,  # [D] vectors: sharding them saves no memory worth a collective for each
    # activations
    "batch": "fsdp",
    "tokens": "sequence",
    "token_group": ("fsdp", "sequence"),  # B and T merged into one axis
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

    On a CPU backend that is not initialised yet, as many devices as needed are created, so that the same command runs
    everywhere. A Mesh may be passed too: its axes must be `MESH_AXES` or the first two of them, and the result has
    automatic axis types, which all code here expects.

    Raises:
      ValueError: there are fewer devices than the mesh needs, or the Mesh has other axes.
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
    """The mesh of these sizes over exactly these devices, which may be absent (for compiling ahead of time).

    Raises:
      ValueError: the number of devices is another one.
    """
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {'x'.join(map(str, sizes))} has {math.prod(sizes)} devices, but there are {len(devices)}; they must be "
            "equal"
        )
    if devices[0].platform == "tpu":
        # Lets jax map neighbours in the mesh to neighbours in the torus.
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _adopt(mesh: Mesh) -> Mesh:
    if mesh.axis_names != MESH_AXES[: len(mesh.axis_names)] or len(mesh.axis_names) < 2:
        raise ValueError(
            f"a mesh with the axes {mesh.axis_names} was given, but parameters are sharded over {MESH_AXES}; "
            'name its axes so (the last may be left out), or pass a text such as "8x1"'
        )
    devices = mesh.devices.reshape((*mesh.devices.shape, 1)[:3])
    parse_mesh_shape("x".join(map(str, devices.shape)))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Applies the second table to one array.

    An axis that its mesh axis does not divide is replicated, for example 4 key/value heads on 8 tensor-parallel devices.
    Of several mesh axes, those that do not divide the rest of the axis are skipped.

    Raises:
      ValueError: the number of names is not the number of dimensions, or a name is unknown.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{tuple(axes)} names {len(axes)} axes of an array with shape {tuple(shape)}")
    entries: list[str | tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in LOGICAL_TO_MESH:
            raise ValueError(f"logical axis {axis!r} has no row in LOGICAL_TO_MESH")
        wanted = None if axis is None else LOGICAL_TO_MESH[axis]
        mesh_axes = _dividing((wanted,) if isinstance(wanted, str) else wanted or (), size, mesh_shape, taken)
        taken.update(mesh_axes)
        entries.append(mesh_axes if len(mesh_axes) > 1 else next(iter(mesh_axes), None))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _dividing(names: tuple[str, ...], size: int, mesh_shape: Mapping[str, int], taken: set[str]) -> tuple[str, ...]:
    """Those of the mesh axes, taken in order, whose product divides an axis of this size."""
    found: tuple[str, ...] = ()
    ways = 1
    for name in names:
        here = mesh_shape.get(name, 1)
        if here > 1 and name not in taken and size % (ways * here) == 0:
            found, ways = (*found, name), ways * here
    return found


def parameter_specs(shapes: ParamTree, mesh: AnyMesh) -> ParamTree:
    """The PartitionSpec of every parameter in a nested dict of arrays or shapes.

    Raises:
      ValueError: a path has no row in PARAMETER_AXES, or the parameter has another rank than the row.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = ".".join(str(part.key) for part in path)
        folder, _, last = name.rpartition(".")
        # Codes and scales of a quantised kernel have its axes; the last axis of the scales counts blocks.
        row = f"{folder}.kernel" if last in ("codes", "scales") else name
        if row not in PARAMETER_AXES:
            raise ValueError(f"parameter {name!r} has no row in PARAMETER_AXES")
        try:
            return partition_spec(PARAMETER_AXES[row], leaf.shape, dict(mesh.shape))
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error

    return jax.tree_util.tree_map_with_path(spec, shapes)


def parameter_shardings(shapes: ParamTree, mesh: AnyMesh) -> ParamTree:
    """The NamedSharding of every parameter; see `parameter_specs`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        parameter_specs(shapes, mesh),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The sharding of a batch: rows over fsdp, other axes replicated."""
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def platform_of(mesh: AnyMesh) -> str:
    """The platform of the devices of a mesh, which may be absent, as jax names it."""
    device = mesh.abstract_mesh.abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fixes the sharding of an activation on the current mesh (`jax.set_mesh`); without a mesh, returns it unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape)))


def constrain_parameters(params: ParamTree) -> ParamTree:
    """Fixes the shardings of parameters that a compiled function creates, like `constrain`."""
    mesh = jax.sharding.get_abstract_mesh()
    return params if mesh.empty else jax.lax.with_sharding_constraint(params, parameter_specs(params, mesh))


def mesh_context(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """A context that makes the mesh of a tree's arrays the current one, unless there is a current mesh already.

    It does nothing under a trace: the code that compiles a function around the model sets the mesh.
    """
    mesh = mesh_of(tree) if jax.sharding.get_abstract_mesh().empty else None
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def token_shards(batch: int, length: int) -> tuple[int, int]:
    """The number of shards along the rows and along the tokens of activations [batch, length, ...] on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = () if mesh.empty else partition_spec(("batch", "tokens"), (batch, length), dict(mesh.shape))
    rows, tokens = [*spec, None, None][:2]
    return mesh.shape[rows] if rows else 1, mesh.shape[tokens] if tokens else 1


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of the arrays of a tree; None for arrays without a mesh, and under a trace."""
    for leaf in jax.tree.leaves(tree):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def bytes_per_device(tree: Any) -> dict[str, int]:
    """The bytes of a tree's arrays on each local device, by device name; arrays in the memory of the host do not count."""
    total: dict[str, int] = {str(device): 0 for device in jax.local_devices()}
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind == "pinned_host":
            continue
        for shard in leaf.addressable_shards:
            total[str(shard.device)] = total.get(str(shard.device), 0) + shard.data.nbytes
    return total
