"""Divides the call of an attention kernel over the devices of the mesh."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from dream_jax.sharding import partition_spec


def per_device(
    kernel: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *rest: tuple[jax.Array, tuple[str | None, ...]],
) -> jax.Array:
    """Applies a kernel, which the compiler cannot partition, on each device to the shards of that device.

    Under a mesh, rows are sharded like the axis "batch", queries like "tokens" and heads like "heads" in the tables of
    `sharding`. Every device gets the keys and values of all tokens. An axis whose size is not a multiple of the mesh
    axis is not sharded. Query heads and key/value heads are sharded together or not at all, because a query head needs
    its key/value head on the same device.

    Args:
      kernel: a function of q, k, v and the arrays of `rest` that returns the attended values in the shape of q.
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      *rest: pairs of a further array and the names of its axes: "batch", "tokens" (of the queries) or None.

    Returns:
      The attended values [B, T, N, H], sharded like the queries.
    """
    arrays = (q_BTNH, k_BSKH, v_BSKH, *(array for array, _ in rest))
    if _is_whole():
        return kernel(*arrays)
    batch, num_queries, num_heads, _ = q_BTNH.shape
    heads = _mesh_axis("heads", num_heads)
    if _mesh_axis("kv_heads", k_BSKH.shape[2]) != heads:
        heads = None
    mesh_axes = {"batch": _mesh_axis("batch", batch), "tokens": _mesh_axis("tokens", num_queries), None: None}
    q_spec = PartitionSpec(mesh_axes["batch"], mesh_axes["tokens"], heads)
    kv_spec = PartitionSpec(mesh_axes["batch"], None, heads)
    specs = (q_spec, kv_spec, kv_spec, *(PartitionSpec(*(mesh_axes[axis] for axis in axes)) for _, axes in rest))
    # check_vma is off because the kernels do not declare over which mesh axes their results vary.
    return jax.shard_map(kernel, in_specs=specs, out_specs=q_spec, check_vma=False)(*arrays)


def splits_queries(num_queries: int) -> bool:
    """Returns whether a device holds only some of the queries, so that their indices there are not their positions."""
    return not _is_whole() and _mesh_axis("tokens", num_queries) is not None


def _is_whole() -> bool:
    """Returns whether there is one device only, or the caller is already inside a shard_map over all mesh axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual)


def _mesh_axis(axis: str, size: int) -> str | None:
    """Returns the mesh axis that shards an array axis of this name and size, or None."""
    spec = partition_spec((axis,), (size,), dict(jax.sharding.get_abstract_mesh().shape))
    return spec[0] if spec else None
