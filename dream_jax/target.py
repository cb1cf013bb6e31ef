"""The platform that a computation is compiled for, whether or not this machine has such devices.

Code that depends on the platform asks this module and not `jax.default_backend()`, which names the devices of this machine:
a step may be compiled for others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal, get_args

import jax

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform that a computation is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu", or another name of a backend of jax, for which there are no kernels here.
      interpret: whether TPU kernels are interpreted as array operations on the devices that are there, and not compiled.
    """

    platform: str
    interpret: bool = False


# Part of the key of jax.jit's caches: the same function traced for another target is another program.
_chosen_target = jax.make_user_context(None)


def target_platform(platform: Platform, *, interpret: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A context in which attention is chosen for `platform`, whatever devices this machine has.

    It is for compiling ahead of time for other hardware. Without it, the platform is that of the current mesh
    (`jax.set_mesh`), whose devices may be absent too, and without a mesh `jax.default_backend()`.

    Args:
      platform: "cpu", "gpu" (an NVIDIA one) or "tpu".
      interpret: runs TPU kernels as array operations on this machine; this is slow and meant for tests.

    Raises:
      ValueError: the platform is unknown, or `interpret` is set for another one than "tpu".
    """
    if platform not in get_args(Platform):
        raise ValueError(f"{platform=} is not one of {get_args(Platform)}")
    if interpret and platform != "tpu":
        raise ValueError(f"{interpret=} is for the kernels of a TPU, not for {platform=}")
    return _chosen_target(Target(platform, interpret))


def current_target() -> Target:
    """The target of a computation that is traced at this point; see `target_platform`."""
    chosen: Target | None = _chosen_target.value
    if chosen is not None:
        return chosen
    # Empty meshes and meshes over several kinds of devices have no abstract device.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return Target(jax.default_backend() if device is None else device.platform)
