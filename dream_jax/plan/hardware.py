"""Hardware by name: "v6e:2x4" to its chip, its number of devices, and devices that a step can be compiled for."""

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
from dream_jax.chips import CHIPS, Chip, chip_of

# What libtpu would otherwise ask of a cloud's metadata server, and wait for, on a machine that has no TPU. And leave to
# compile while another process does: its lock is there because two cannot use one TPU, and none is used here.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}

# What XLA's GPU compiler asks of a device, from NVIDIA's tuning guide and data sheets of the Hopper generation: the two
# boards differ in memory only.
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
device_description_str: "{kind}"
"""
_L2_CACHE = {"h100": 50 * 2**20, "h200": 60 * 2**20}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run is planned for.

    Attributes:
      name: as asked for.
      chip: its kind.
      num_devices: jax devices.
      nodes: groups of devices, each connected by a switch; 1 for a torus.
      devices: to compile for, absent or present; None where nothing here can compile for them.
      missing: why there are none, and what to install.
    """

    name: str
    chip: Chip
    num_devices: int
    nodes: int = 1
    devices: tuple[jax.Device, ...] | None = None
    missing: str | None = None

    @property
    def num_chips(self) -> int:
        """The number of chips, which is what is paid for."""
        return -(-self.num_devices // self.chip.devices_per_chip)

    def mesh(self, shape: str) -> sharding.AnyMesh:
        """The mesh of a shape such as "8x1" over all devices; without devices to compile for, a mesh of sizes only.

        Raises:
          ValueError: the mesh has another number of devices.
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
    """The hardware of a name such as "v6e:2x4" or "h100:8"; None means what is here.

    Args:
      topology: CHIP:SIZES.
      compiles: whether devices to compile for are wanted; without them nothing need be installed.

    Raises:
      ValueError: an unknown chip or topology, with those that are known; no accelerator here.
      ModuleNotFoundError: libtpu is missing, with what to install.
    """
    if topology is None:
        return _here()
    match = re.fullmatch(r"([a-z0-9-]+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
    if match is None or match[1] not in CHIPS or not CHIPS[match[1]].topology:
        raise ValueError(f"topology {topology!r} is not known; {known()}")
    _leave_accelerators_alone()
    chip, sizes = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    return (_tpu if chip.platform == "tpu" else _gpu)(topology, chip, sizes, compiles)


def known() -> str:
    """How to write a topology, with examples, for error messages."""
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
    return Hardware(name=name, chip=chip, num_devices=len(devices), nodes=nodes, devices=tuple(devices))


def _tpu(topology: str, chip: Chip, sizes: tuple[int, ...], compiles: bool) -> Hardware:
    axes = chip.links // 2
    if len(sizes) != axes:
        raise ValueError(f"topology {topology!r}: the torus of a {chip.name} has {axes} axes, as in {chip.topology}")
    num_devices = math.prod(sizes) * chip.devices_per_chip
    if not compiles:
        return Hardware(name=topology, chip=chip, num_devices=num_devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"planning for {topology} compiles for it, through libtpu, which is not installed: pip install "
            "'dream-jax[plan]', or pass --no-compile for an estimate"
        )
    # Of hosts with eight or four chips libtpu only knows the whole: a single chip must say that it is one.
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        described = topologies.get_topology_desc(topology, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: libtpu says {error}; {known()}") from error
    devices = tuple(described.devices)
    if len(devices) != num_devices:
        raise ValueError(
            f"libtpu describes {topology} as {len(devices)} devices, and the table in dream_jax/chips.py as {num_devices}; "
            "this release of libtpu is not one that was tried"
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
        return dataclasses.replace(found, missing=f"there is no description of the {chip.name} to compile for")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return dataclasses.replace(found, missing="to compile for it, pip install 'dream-jax[plan-gpu]'")
    described = topologies.get_topology_desc(
        chip.name, "cuda", target_config=target_description(chip), topology=f"1x{nodes}x{each}"
    )
    return dataclasses.replace(found, devices=tuple(described.devices))


def target_description(chip: Chip) -> str:
    """What XLA's GPU compiler is told of a GPU that is not here, a GpuTargetConfigProto as text."""
    return _HOPPER.format(
        memory_bandwidth=int(chip.memory_bandwidth),
        l2_cache=_L2_CACHE[chip.name],
        memory=chip.memory,
        kind=chip.kinds[0],
    )


def _leave_accelerators_alone() -> None:
    # Only compilers are wanted: looking for devices takes long on a machine without, and takes them on one with. libtpu
    # reads its environment when it is loaded, which looking for devices does.
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # options are defined at run time
        jax.config.update("jax_platforms", "cpu")
