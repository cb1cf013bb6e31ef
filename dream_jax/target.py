"""The platform that a computation is compiled for, even if this machine has no such devices.

Code that depends on the platform calls `current_target` and not `jax.default_backend()`. The latter is the platform of
the devices of this machine, but a step may be compiled for other devices.
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
      platform: "cpu", "gpu", "tpu", or the name of another backend of jax, for which this package has no kernels.
      interpret: whether TPU kernels run as array operations on the devices of this machine, instead of being compiled.
    """

    platform: str
    interpret: bool = False


# A user context is a part of the key of the caches of jax.jit: for another target, jax traces a function again.
_chosen_target = jax.make_user_context(None)


def target_platform(platform: Platform, *, interpret: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Returns a context manager, inside which computations are traced for `platform`, even without such devices.

    It serves to compile ahead of time for other hardware. Outside of it, the platform is that of the current mesh
    (`jax.set_mesh`), which may also describe devices of another machine, or `jax.default_backend()` without a mesh.

    Args:
      platform: "cpu", "gpu" (NVIDIA) or "tpu".
      interpret: runs TPU kernels as array operations on this machine. This is slow and serves tests.

    Raises:
      ValueError: the platform is unknown, or `interpret` is true for a platform other than "tpu".
    """
    if platform not in get_args(Platform):
        raise ValueError(f"{platform=} is not one of {get_args(Platform)}")
    if interpret and platform != "tpu":
        raise ValueError(f"{interpret=} is for TPU kernels, but {platform=}; leave it out, or pass platform 'tpu'")
    return _chosen_target(Target(platform, interpret))


def current_target() -> Target:
    """Returns the target for which jax compiles a computation that it traces now; see `target_platform`."""
    chosen: Target | None = _chosen_target.value
    if chosen is not None:
        return chosen
    # An empty mesh has no abstract device, and a mesh over several kinds of devices has none either.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return Target(jax.default_backend() if device is None else device.platform)
