"""A table of accelerators: their rates and memory from the makers' documents, and list prices.

All rates are per jax device, which is a chip except on Ironwood (two devices a chip). Sources, read in 2026:
peak rates, memory and its bandwidth, interconnect: the "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" pages of
Google Cloud's TPU documentation; NVIDIA's data sheets of the A100, H100 (SXM), H200 (SXM) and DGX B200. Memory of a TPU:
what libtpu 0.0.42.1 leaves a program, from its out-of-memory messages (a test compares); of a GPU: what the driver
reports as the board's size, less an allowance of 1 GiB for contexts, libraries and fragmentation. Only dense bfloat16
rates: those that data sheets print "with sparsity" are halved.

Prices change, differ by region and are lower with a commitment: pass your own. TPU: on-demand list price of Google Cloud in
its US regions, 2025. GPU: Modal's price list, by the second and without commitment, May 2026. None: no public price known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; rates are per jax device.

    Attributes:
      name: as in `--topology`.
      platform: the name of the platform in jax.
      kinds: prefixes of jax's `device_kind`.
      memory: bytes that a program can use.
      peak_flops: dense bfloat16, FLOP/s.
      memory_bandwidth: of the device's memory, bytes/s.
      links: number of links to neighbours in a torus, or 1 where a switch connects all devices.
      link_bandwidth: of one link in one direction, bytes/s.
      usd_per_chip_hour: list price of a chip (not of a device); None when no price is known.
      devices_per_chip: number of jax devices per chip.
      topology: an example of `--topology`, for messages.
      node: number of devices that a switch connects; None for a torus.
      network_bandwidth: between nodes, per device and direction, bytes/s; None for a torus.
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

    @property
    def interconnect(self) -> float:
        """Bytes/s that a device can send over all its links together."""
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
    # The documentation gives the sum over all links and both directions: one link has 1 / (2 links) of it in one direction.
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
    return Chip(
        name=name,
        platform="gpu",
        kinds=kinds,
        memory=int((gib - 1.0) * _GIB),
        peak_flops=tflops * 1e12,
        memory_bandwidth=memory_gbs * 1e9,
        links=1,
        link_bandwidth=nvlink_gbs * 1e9,
        usd_per_chip_hour=usd,
        topology=f"{name}:8 (one node), {name}:2x8 (two nodes of eight)",
        node=8,
        network_bandwidth=50e9,  # 400 Gbit/s a GPU, as in the makers' own clusters of these boards
    )


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # libtpu describes a v4 as two devices; on hardware jax shows one a chip. Only its rates are used: no topology.
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
            gib=40,
            tflops=312,
            memory_gbs=1555,
            nvlink_gbs=300,
            usd=2.10,
        ),
        _gpu("a100-80", ("NVIDIA A100",), gib=80, tflops=312, memory_gbs=2039, nvlink_gbs=300, usd=2.50),
        _gpu("h100", ("NVIDIA H100",), gib=79.6, tflops=989, memory_gbs=3350, nvlink_gbs=450, usd=3.95),
        _gpu("h200", ("NVIDIA H200",), gib=140.4, tflops=989, memory_gbs=4800, nvlink_gbs=450, usd=4.54),
        _gpu("b200", ("NVIDIA B200",), gib=179.0, tflops=2250, memory_gbs=8000, nvlink_gbs=900, usd=6.25),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this `device_kind` of jax; None when the table does not have it (for example a CPU)."""
    known = [(kind, chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    # The longest prefix counts: "TPU v5 lite" also begins with "TPU v5".
    return max(known, key=lambda pair: len(pair[0]), default=(None, None))[1]
