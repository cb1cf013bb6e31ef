"""Where a call to attention will run: the platform it is compiled for, and which part of it each device computes.

Knows jax's contexts and the mesh. Knows nothing of how attention is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.sharding import PartitionSpec

from dream_jax.sharding import partition_spec

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What a computation is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu" (or another name that jax gives a backend, which no kernel here serves).
      interpret: TPU kernels are carried out by array operations instead of being compiled, on whatever device is there.
    """

    platform: str
    interpret: bool = False


# Part of the key of jax.jit's caches: the same function traced for another target is another program.
_chosen_target = jax.make_user_context(None)


def target_platform(platform: Platform, *, interpret: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A context in which attention is chosen for `platform`, whatever devices are there.

    For compiling ahead of time for hardware that is absent. Without it, the platform is that of the current mesh
    (`jax.set_mesh`), which may be one of absent devices too, and without a mesh `jax.default_backend()`.

    Args:
      platform: "cpu", "gpu" (an NVIDIA one) or "tpu".
      interpret: runs TPU kernels here and now, by array operations: slow, for tests of what is around them.

    Raises:
      ValueError: an unknown platform, or `interpret` for one that has nothing to interpret.
    """
    if platform not in get_args(Platform):
        raise ValueError(f"{platform=} is not one of {get_args(Platform)}")
    if interpret and platform != "tpu":
        raise ValueError(f"{interpret=} is for the kernels of a TPU, not for {platform=}")
    return _chosen_target(Target(platform, interpret))


def current_target() -> Target:
    """What a call traced at this point is compiled for; see `target_platform`."""
    chosen: Target | None = _chosen_target.value
    if chosen is not None:
        return chosen
    # Empty meshes and meshes over devices of several kinds say nothing.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return Target(jax.default_backend() if device is None else device.platform)


def per_device(
    kernel: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *rest: tuple[jax.Array, tuple[str | None, ...]],
) -> jax.Array:
    """A kernel that the compiler cannot split, applied to the part of the rows, heads and queries that each device holds.

    Under a mesh, rows are split as "batch" is, queries as "tokens", heads as "heads", by the tables in `sharding`; keys
    and values are gathered over the axis of the tokens. What a mesh axis does not divide stays whole: rows, queries, or
    the heads of both kinds together, since each query head needs its key/value head beside it.

    Args:
      kernel: q, k, v and the arrays of `rest` to the attended values, shaped like q.
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      *rest: further arrays, each with its axes: "batch", "tokens" (those of the queries) or None.
    """
    arrays = (q_BTNH, k_BSKH, v_BSKH, *(array for array, _ in rest))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:  # one device, or the caller has split the work
        return kernel(*arrays)

    def place(axis: str, size: int) -> str | None:
        spec = partition_spec((axis,), (size,), dict(mesh.shape))
        return spec[0] if spec else None

    batch, num_queries, num_heads, _ = q_BTNH.shape
    heads = place("heads", num_heads)
    if place("kv_heads", k_BSKH.shape[2]) != heads:
        heads = None
    places = {"batch": place("batch", batch), "tokens": place("tokens", num_queries), None: None}
    q_spec = PartitionSpec(places["batch"], places["tokens"], heads)
    kv_spec = PartitionSpec(places["batch"], None, heads)
    specs = (q_spec, kv_spec, kv_spec, *(PartitionSpec(*(places[axis] for axis in axes)) for _, axes in rest))
    # check_vma: the kernels do not declare over which mesh axes their results vary.
    return jax.shard_map(kernel, in_specs=specs, out_specs=q_spec, check_vma=False)(*arrays)
