"""A table of accelerators with their peak rates, memory and list prices.

All rates are per jax device. A device is a chip, except on TPU7x (Ironwood), which has two devices per chip. Peak rates,
memory bandwidth and interconnect are from the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of the TPU
documentation of Google Cloud, and from the NVIDIA data sheets of A100, H100 (SXM), H200 (SXM) and DGX B200, all read in
2026. Peak rates are for dense bfloat16: a rate that a data sheet gives "with sparsity" is halved here. The memory of a
TPU is what libtpu 0.0.42.1 leaves to a program, according to its out-of-memory messages (a test compares them). The
memory of a GPU is the total that CUDA reports to programs: measured on an H200, and for the other GPUs the smallest total
that was found in PyTorch's messages about too little memory. A program can have a share of it (`device_memory`).

Prices change, depend on the region, and are lower with a commitment, so pass your own price. TPU prices are the
on-demand list prices of Google Cloud in its US regions, 2025. GPU prices are from the price list of Modal (per second,
without commitment), May 2026. None means that no public price is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator, with rates per jax device.

    Attributes:
      name: the name in `--topology`, such as "v5e" or "h100".
      platform: the name of the platform in jax.
      kinds: prefixes of the `device_kind` that jax reports for these devices.
      memory: number of bytes of a device; on a GPU a program can only have a share of them.
      peak_flops: peak rate of dense bfloat16 matrix products, in FLOP/s.
      memory_bandwidth: bandwidth of the memory of a device, in bytes/s.
      links: number of links of a device to its neighbours in a torus; 1 if a switch connects all devices.
      link_bandwidth: bandwidth of one link in one direction, in bytes/s.
      usd_per_chip_hour: list price of a chip (not of a device), in US dollars per hour; None if no price is known.
      devices_per_chip: number of jax devices per chip.
      topology: example values of `--topology`, for messages.
      node: number of devices that a switch connects; None for a torus.
      network_bandwidth: bandwidth between nodes in one direction, in bytes/s per device; None for a torus.
      has_fp8: whether `float8` can multiply in fp8 on these devices, which are then NVIDIA GPUs from Hopper on.
    """

    name: str
    platform: Literal["gpu", "tpu"]
    kinds: tuple[str, ...]
    memory: int
    peak_flops: float
    memory_bandwidth: float
    links: int
    link_bandwidth: float
    usd_per_chip_hour: float | None
    devices_per_chip: int = 1
    topology: str
    node: int | None = None
    network_bandwidth: float | None = None
    has_fp8: bool = False

    @property
    def interconnect(self) -> float:
        """The number of bytes/s that a device can send over all its links together."""
        return self.links * self.link_bandwidth


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    *,
    memory_gib: float,
    tflops: float,
    memory_gbs: float,
    links: int,
    link_gbs: float,
    usd: float | None,
    example: str,
    devices_per_chip: int = 1,
) -> Chip:
    """Returns a TPU: rates are per chip, memory is per device, link_gbs is for one link in one direction."""
    # The documentation gives the sum over all links and both directions: the table has this sum / (2 * links).
    return Chip(
        name=name,
        platform="tpu",
        kinds=kinds,
        memory=int(memory_gib * _GIB),
        peak_flops=tflops * 1e12 / devices_per_chip,
        memory_bandwidth=memory_gbs * 1e9 / devices_per_chip,
        links=links,
        link_bandwidth=link_gbs * 1e9 / devices_per_chip,
        usd_per_chip_hour=usd,
        devices_per_chip=devices_per_chip,
        topology=example,
    )


def _gpu(
    name: str, kinds: tuple[str, ...], *, gib: float, tflops: float, memory_gbs: float, nvlink_gbs: float, usd: float
) -> Chip:
    """Returns a GPU of a node of eight; memory in GiB as CUDA reports it, nvlink_gbs is for one direction."""
    return Chip(
        name=name,
        platform="gpu",
        kinds=kinds,
        memory=int(gib * _GIB),
        peak_flops=tflops * 1e12,
        memory_bandwidth=memory_gbs * 1e9,
        links=1,
        link_bandwidth=nvlink_gbs * 1e9,
        usd_per_chip_hour=usd,
        topology=f"{name}:8 (one node), {name}:2x8 (two nodes of eight)",
        node=8,
        has_fp8=not name.startswith("a100"),
        network_bandwidth=50e9,  # 400 Gbit/s per GPU, as in NVIDIA's own clusters of these GPUs
    )


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # A v4 chip is one jax device, but libtpu describes it as two, so plans cannot compile for it: it has no topology.
        _tpu(
            "v4", ("TPU v4",), memory_gib=30.5, tflops=275, memory_gbs=1200, links=6, link_gbs=50, usd=3.22, example=""
        ),
        _tpu(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            memory_gib=15.75,
            tflops=197,
            memory_gbs=819,
            links=4,
            link_gbs=50,
            usd=1.20,
            example="v5e:2x4",
        ),
        _tpu(
            "v5p",
            ("TPU v5p", "TPU v5"),
            memory_gib=95.74,
            tflops=459,
            memory_gbs=2765,
            links=6,
            link_gbs=100,
            usd=4.20,
            example="v5p:2x2x1",
        ),
        _tpu(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            memory_gib=31.25,
            tflops=918,
            memory_gbs=1600,
            links=4,
            link_gbs=100,
            usd=2.70,
            example="v6e:2x4",
        ),
        _tpu(
            "tpu7x",
            ("TPU7x",),
            memory_gib=94.75,
            tflops=2307,
            memory_gbs=7380,
            links=6,
            link_gbs=100,
            usd=None,
            example="tpu7x:2x2x1",
            devices_per_chip=2,
        ),
        _gpu(
            "a100-40",
            ("NVIDIA A100-SXM4-40GB",),
            gib=39.39,
            tflops=312,
            memory_gbs=1555,
            nvlink_gbs=300,
            usd=2.10,
        ),
        _gpu("a100-80", ("NVIDIA A100",), gib=79.15, tflops=312, memory_gbs=2039, nvlink_gbs=300, usd=2.50),
        _gpu("h100", ("NVIDIA H100",), gib=79.1, tflops=989, memory_gbs=3350, nvlink_gbs=450, usd=3.95),
        _gpu("h200", ("NVIDIA H200",), gib=139.8, tflops=989, memory_gbs=4800, nvlink_gbs=450, usd=4.54),
        _gpu("b200", ("NVIDIA B200",), gib=178.3, tflops=2250, memory_gbs=8000, nvlink_gbs=900, usd=6.25),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with this `device_kind` of jax, or None if the table does not have it (for example a CPU)."""
    known = [(kind, chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    # The longest matching prefix is used, because "TPU v5 lite" also begins with "TPU v5".
    return max(known, key=lambda pair: len(pair[0]), default=(None, None))[1]
