"""Finds hardware by name, such as "v6e:2x4": its chip, its number of devices, and devices to compile a step for."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dream_jax import sharding
from dream_jax.bounds import MOST_DEVICES
from dream_jax.chips import CHIPS, Chip, chip_of
from dream_jax.device_memory import memory_of_device, share_in_force

# On a machine without a TPU, libtpu would ask the metadata server of a cloud and wait for an answer; the first three
# variables prevent that. The last one lets two processes compile at the same time: libtpu's lock exists because two
# processes cannot use one TPU, and no TPU is used here.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}

# The properties of a device that XLA's GPU compiler needs, from NVIDIA's tuning guide and data sheets for the Hopper
# generation. H100 and H200 differ in memory only. Without a version of the CUDA runtime, XLA uses no products in float8.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{kind}"
"""
_L2_CACHE = {"h100": 50 * 2**20, "h200": 60 * 2**20}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware that a run is planned for.

    Attributes:
      name: the name that was asked for, or a description of this machine's devices.
      chip: the kind of accelerator.
      num_devices: number of jax devices; a TPU chip may have two.
      nodes: number of groups of devices, each of which is connected by a switch; 1 for a torus.
      devices: the devices to compile for, which need not be on this machine; None if nothing is compiled.
      missing: why it cannot be compiled for this hardware, and what to install; None if it can be, or is not wanted.
      has: bytes that a program can have on a device of this machine, if it reports them; None for hardware given by name.
    """

    name: str
    chip: Chip
    num_devices: int
    nodes: int = 1
    devices: tuple[jax.Device, ...] | None = None
    missing: str | None = None
    has: int | None = None

    @property
    def limit(self) -> int:
        """The number of bytes that a program can have on a device: on a GPU the share of its memory that is in force."""
        return self.limit_of(self.chip) if self.has is None else self.has

    @property
    def share(self) -> str | None:
        """A text with the share of the memory that a program can have, and the reason; None for a TPU or CPU."""
        if self.chip.platform != "gpu":
            return None
        found = share_in_force()
        return f"{found.share:.0%} of {self.chip.memory / 2**30:.2f} GiB, {found.origin}"

    @staticmethod
    def limit_of(chip: Chip) -> int:
        """Returns the number of bytes that a program can have on a device of this kind."""
        return chip.memory if chip.platform != "gpu" else int(min(1.0, share_in_force().share) * chip.memory)

    @property
    def num_chips(self) -> int:
        """The number of chips, which are the unit of the price."""
        return -(-self.num_devices // self.chip.devices_per_chip)

    def mesh(self, shape: str) -> sharding.AnyMesh:
        """Returns a mesh over all devices, or an abstract mesh if there are no devices to compile for.

        Args:
          shape: sizes of the axes fsdp, tensor and (optional) sequence, such as "8x1".

        Raises:
          ValueError: the product of the sizes is not the number of devices.
        """
        sizes = sharding.parse_mesh_shape(shape)
        if math.prod(sizes) != self.num_devices:
            raise ValueError(
                f"mesh {shape} has {math.prod(sizes)} devices, but {self.name} has {self.num_devices}; pass a --mesh whose "
                f"product is {self.num_devices}, or another --topology"
            )
        if self.devices is not None:
            return sharding.mesh_over(self.devices, sizes)
        device = AbstractDevice(self.chip.kinds[0], 1, self.chip.platform)
        return AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def find_hardware(topology: str | None, *, compiles: bool = True) -> Hardware:
    """Returns the hardware with this name, or the accelerators of this machine.

    Args:
      topology: CHIP:SIZES, such as "v6e:2x4" or "h100:8"; None for the accelerators of this machine.
      compiles: whether to look for devices to compile for; if not, no compiler needs to be installed.

    Raises:
      ValueError: the chip or topology is unknown, or `topology` is None and this machine has no known accelerator.
      ModuleNotFoundError: libtpu is not installed; the message says what to install.
    """
    if topology is None:
        return _here()
    match = re.fullmatch(r"([a-z0-9-]+):([1-9]\d{0,8}(?:x[1-9]\d{0,8}){0,3})", topology, re.ASCII)
    if match is None or match[1] not in CHIPS or not CHIPS[match[1]].topology:
        raise ValueError(f"topology {topology!r:.80} is not known; {known()}")
    chip, sizes = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    if math.prod(sizes) > MOST_DEVICES:
        raise ValueError(f"topology {topology!r} has more than {MOST_DEVICES} devices, the largest possible number")
    _leave_accelerators_alone()
    return (_tpu if chip.platform == "tpu" else _gpu)(topology, chip, sizes, compiles)


def known() -> str:
    """Returns how to write a topology, with examples, for error messages."""
    names = "; ".join(chip.topology for chip in CHIPS.values() if chip.topology)
    return f"write CHIP:SIZES, such as {names}"


def _here() -> Hardware:
    devices = jax.devices()
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(
            f"there is no known accelerator here (jax sees {devices[0].device_kind}): name one with --topology; {known()}"
        )
    nodes = 1 if chip.node is None else -(-len(devices) // chip.node)
    name = f"{len(devices)} x {devices[0].device_kind}, here"
    return Hardware(
        name=name,
        chip=chip,
        num_devices=len(devices),
        nodes=nodes,
        devices=tuple(devices),
        has=memory_of_device(jax.local_devices()),
    )


def _tpu(topology: str, chip: Chip, sizes: tuple[int, ...], compiles: bool) -> Hardware:
    axes = chip.links // 2
    if len(sizes) != axes:
        raise ValueError(f"topology {topology!r}: the torus of a {chip.name} has {axes} axes, as in {chip.topology}")
    num_devices = math.prod(sizes) * chip.devices_per_chip
    if not compiles:
        return Hardware(name=topology, chip=chip, num_devices=num_devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"a plan for {topology} is compiled with libtpu, which is not installed: pip install 'dream-jax[plan]', or "
            "pass --no-compile for an estimate"
        )
    # By default libtpu assumes a host with all of its four or eight chips, so a single chip needs these bounds.
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        described = topologies.get_topology_desc(topology, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: libtpu says {error}; {known()}") from error
    devices = tuple(described.devices)
    if len(devices) != num_devices:
        raise ValueError(
            f"libtpu says that {topology} has {len(devices)} devices, but by dream_jax/chips.py it has {num_devices}; "
            "this release of libtpu has not been tested, so install another, or pass --no-compile"
        )
    return Hardware(name=topology, chip=chip, num_devices=num_devices, devices=devices)


def _gpu(topology: str, chip: Chip, sizes: tuple[int, ...], compiles: bool) -> Hardware:
    if len(sizes) > 2 or (len(sizes) == 1 and chip.node is not None and sizes[0] > chip.node):
        raise ValueError(f"topology {topology!r}: write {chip.topology}")
    nodes, each = sizes if len(sizes) == 2 else (1, *sizes)
    if chip.node is not None and each > chip.node:
        raise ValueError(f"topology {topology!r}: a node has at most {chip.node} GPUs; write {chip.topology}")
    found = Hardware(name=topology, chip=chip, num_devices=nodes * each, nodes=nodes)
    if not compiles:
        return found
    if chip.name not in _L2_CACHE:
        return dataclasses.replace(found, missing=f"dream_jax has no description of the {chip.name} for the compiler")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return dataclasses.replace(found, missing="to compile for it, pip install 'dream-jax[plan-gpu]'")
    described = topologies.get_topology_desc(
        chip.name, "cuda", target_config=target_description(chip), topology=f"1x{nodes}x{each}"
    )
    return dataclasses.replace(found, devices=tuple(described.devices))


def target_description(chip: Chip) -> str:
    """Returns the description of a GPU with which XLA compiles for it, a GpuTargetConfigProto as text."""
    return _HOPPER.format(
        memory_bandwidth=int(chip.memory_bandwidth),
        l2_cache=_L2_CACHE[chip.name],
        memory=chip.memory,
        kind=chip.kinds[0],
    )


def _leave_accelerators_alone() -> None:
    # Only compilers are needed, so jax must not look for accelerators: it would wait for long if there are none, and
    # would reserve them if there are any. It would also load libtpu, which reads these variables when it is loaded.
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # options are defined at run time
        jax.config.update("jax_platforms", "cpu")
