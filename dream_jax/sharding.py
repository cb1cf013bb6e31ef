"""The sharding of every array: two tables, and the device mesh to which they refer.

The first table gives the logical axes of each parameter. The second maps each logical axis to mesh axes; to change the
sharding strategy, change this dict.
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

from dream_jax.bounds import MOST_DEVICES
from dream_jax.distributed import provide_cpu_devices
from dream_jax.shapes import ParamTree

MESH_AXES = ("fsdp", "tensor", "sequence")

# A mesh of devices; or a mesh without devices, for planning where it is not possible to compile for them.
AnyMesh = Mesh | AbstractMesh

# Table one: path of a parameter -> its logical axes, one per dimension.
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
    # Projections with one input, joined for sampling: a device has whole key/value heads with their query heads.
    "layers.attn.qkv.kernel": ("layers", "embed", "kv_heads", "joined", "head_dim"),
    "layers.attn.qkv.bias": ("layers", "kv_heads", "joined", "head_dim"),
    "layers.mlp.gate_up.kernel": ("layers", "embed", "joined", "mlp"),
    # An adapter has two narrow matrices beside each kernel; the axes that they share with the kernel are sharded alike.
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

# Table two: logical axis -> one or several mesh axes. If the size of an axis is not a multiple of the size of its mesh
# axis, the axis is replicated (see `partition_spec`).
LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...] | None] = {
    # Axes of parameters:
    "vocab": "tensor",
    # Devices that share the tokens of a row can also share the parameters.
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "joined": None,
    "lora_rank": None,
    "layers": None,
    "norm": None,  # vectors [D]: sharding saves too little memory to justify a collective for each of them
    # Axes of activations:
    "batch": "fsdp",
    "tokens": "sequence",
    "token_group": ("fsdp", "sequence"),  # B and T merged into one axis
    "width": None,
}


def parse_mesh_shape(text: str) -> tuple[int, int, int]:
    """Returns the sizes (fsdp, tensor, sequence) in a text such as "8x1" or "2x1x4"; sequence is 1 if it is left out.

    Raises:
      ValueError: the text is not two or three positive numbers with "x" between them, or their product is above 65536.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text, re.ASCII):
        raise ValueError(
            f"mesh {text!r:.80} is not of the form FSDPxTENSOR, such as 8x1 or 4x2, or FSDPxTENSORxSEQUENCE, such as 2x1x4"
        )
    if max(map(len, text.split("x"))) > 9 or math.prod(map(int, text.split("x"))) > MOST_DEVICES:
        raise ValueError(f"mesh {text:.80} has more than {MOST_DEVICES} devices, the largest possible number")
    fsdp, tensor, sequence = [*(int(part) for part in text.split("x")), 1][:3]
    return fsdp, tensor, sequence


def make_mesh(shape: str | tuple[int, ...] | Mesh) -> Mesh:
    """Returns the device mesh of a shape such as "8x1" (fsdp x tensor), over the devices of all processes.

    A CPU backend that is not initialised yet gets as many devices as the mesh needs, so that the same command runs
    everywhere. A Mesh is accepted too if its axes are `MESH_AXES` or the first two of them. The result always has
    automatic axis types, which this package expects.

    Raises:
      ValueError: the shape is not valid, a CPU cannot be divided into so many devices, there are fewer devices than the
        mesh needs, several processes have more devices than it needs, or the Mesh has other axes.
    """
    if isinstance(shape, Mesh):
        return _adopt(shape)
    sizes = parse_mesh_shape(shape if isinstance(shape, str) else "x".join(map(str, shape)))
    needed = math.prod(sizes)
    if not jax.distributed.is_initialized():  # otherwise `distributed.join` has provided the devices
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
            f"mesh {shape} uses {needed} of {len(devices)} devices; a mesh of several processes must use all devices"
        )
    if len(devices) == needed:
        return mesh_over(devices, sizes)
    return Mesh(np.asarray(devices[:needed]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_over(devices: Sequence[jax.Device], sizes: tuple[int, int, int]) -> Mesh:
    """Returns the mesh of these sizes (fsdp, tensor, sequence) over exactly these devices.

    The devices may be descriptions of hardware that is not present, for compiling ahead of time.

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {'x'.join(map(str, sizes))} needs {math.prod(sizes)} devices, but there are {len(devices)}; the numbers "
            "must be equal"
        )
    if devices[0].platform == "tpu":
        # On TPUs, jax maps neighbours in the mesh to neighbours in the torus of chips.
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _adopt(mesh: Mesh) -> Mesh:
    """Returns a mesh over the same devices with all `MESH_AXES` and automatic axis types."""
    if mesh.axis_names != MESH_AXES[: len(mesh.axis_names)] or len(mesh.axis_names) < 2:
        raise ValueError(
            f"a mesh with the axes {mesh.axis_names} was given, but parameters are sharded over {MESH_AXES}; "
            'give its axes these names (the last axis may be left out), or pass a text such as "8x1"'
        )
    devices = mesh.devices.reshape((*mesh.devices.shape, 1)[:3])
    parse_mesh_shape("x".join(map(str, devices.shape)))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Returns the PartitionSpec of one array, by the second table.

    If the size of an axis is not a multiple of the size of its mesh axis, the axis is replicated: 4 key/value heads,
    for example, on 8 tensor-parallel devices. Of several mesh axes, those that do not divide the rest are skipped.

    Args:
      axes: logical axis of each dimension of the array; None replicates the dimension.
      shape: shape of the array.
      mesh_shape: size of each mesh axis, by name.

    Raises:
      ValueError: the number of logical axes is not the number of dimensions, or a logical axis is unknown.
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
    """Returns the mesh axes over which an axis of this size is sharded: in order, those whose product divides `size`.

    Mesh axes of size 1, and those that another dimension of the array uses (`taken`), are left out.
    """
    found: tuple[str, ...] = ()
    ways = 1
    for name in names:
        here = mesh_shape.get(name, 1)
        if here > 1 and name not in taken and size % (ways * here) == 0:
            found, ways = (*found, name), ways * here
    return found


def parameter_specs(shapes: ParamTree, mesh: AnyMesh) -> ParamTree:
    """Returns the PartitionSpec of every parameter in a nested dict of arrays or shapes.

    Layers that are apart have their number as a key, and no axis of layers: "layers.3.attn.q.kernel".

    Raises:
      ValueError: a path has no row in PARAMETER_AXES, or the row has another number of axes than the parameter.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = ".".join(str(part.key) for part in path)
        axes = parameter_axes(tuple(str(part.key) for part in path))
        if axes is None:
            raise ValueError(f"parameter {name!r} has no row in PARAMETER_AXES")
        try:
            return partition_spec(axes, leaf.shape, dict(mesh.shape))
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error

    return jax.tree_util.tree_map_with_path(spec, shapes)


def parameter_axes(path: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the logical axes of the parameter with this path of keys; None if it has no row in PARAMETER_AXES."""
    if not path:
        return None
    is_apart = len(path) > 1 and path[0] == "layers" and path[1].isdecimal()
    *folder, last = (path[0], *path[2:]) if is_apart else path
    # The codes and the scales of a quantised kernel have the axes of the kernel; the last axis of the scales is the axis
    # of blocks.
    axes = PARAMETER_AXES.get(".".join((*folder, "kernel" if last in ("codes", "scales") else last)))
    return axes[1:] if axes is not None and is_apart else axes


def parameter_shardings(shapes: ParamTree, mesh: AnyMesh) -> ParamTree:
    """Returns the NamedSharding of every parameter in a nested dict; see `parameter_specs`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        parameter_specs(shapes, mesh),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of a batch: the rows are sharded over fsdp, and all other axes are replicated."""
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a complete copy."""
    return NamedSharding(mesh, PartitionSpec())


def platform_of(mesh: AnyMesh) -> str:
    """Returns the name that jax gives to the platform of a mesh, such as "tpu"; its devices need not be present."""
    device = mesh.abstract_mesh.abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns `x` with the sharding of its logical axes on the current mesh (`jax.set_mesh`), if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape)))


def constrain_parameters(params: ParamTree) -> ParamTree:
    """Does the same as `constrain` for all parameters that a compiled function creates, by `parameter_specs`."""
    mesh = jax.sharding.get_abstract_mesh()
    return params if mesh.empty else jax.lax.with_sharding_constraint(params, parameter_specs(params, mesh))


def mesh_context(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which the mesh of the arrays of `tree` is the current mesh, unless there already is one.

    The context has no effect while jax traces a function: the code that compiles this function sets the mesh.
    """
    mesh = mesh_of(tree) if jax.sharding.get_abstract_mesh().empty else None
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def token_shards(batch: int, length: int) -> tuple[int, int]:
    """Returns the numbers of shards (of rows, of tokens) of activations [batch, length, ...] on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = () if mesh.empty else partition_spec(("batch", "tokens"), (batch, length), dict(mesh.shape))
    rows, tokens = [*spec, None, None][:2]
    return mesh.shape[rows] if rows else 1, mesh.shape[tokens] if tokens else 1


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of the arrays of a tree; None if they have no mesh, and while jax traces a function."""
    for leaf in jax.tree.leaves(tree):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def bytes_per_device(tree: Any) -> dict[str, int]:
    """Returns the bytes that the arrays of `tree` take on each local device, by device name, without host memory."""
    total: dict[str, int] = {str(device): 0 for device in jax.local_devices()}
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind == "pinned_host":
            continue
        for shard in leaf.addressable_shards:
            total[str(shard.device)] = total.get(str(shard.device), 0) + shard.data.nbytes
    return total
