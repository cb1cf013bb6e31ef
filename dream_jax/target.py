"""What a computation is compiled for: the platform of the devices that will run it, whether or not they are here.

Knows jax's contexts. Knows nothing of what is computed. Whoever chooses by platform asks here, never
`jax.default_backend()`: that names the devices at hand, and a step may be compiled for others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal, get_args

import jax

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
