"""Computes the time of a step by the roofline model of the hardware, and the price of all steps of a run."""

from __future__ import annotations

from collections.abc import Iterable

from dream_jax.plan.hardware import Hardware
from dream_jax.plan.hlo import Collective
from dream_jax.plan.settings import RunPrice, StepTime
from dream_jax.trainer.cost import usd_per_chip_hour
from dream_jax.trainer.settings import TrainSettings

# A collective uses at least two links of a torus (both directions of one axis), or half of the rate of a switch.
_SURE_LINKS = 2
_SURE_SHARE = 0.5
# The lowest and the highest rate of copies between a device and its host, in bytes/s: PCIe 4 and 5 with 16 lanes.
_HOST_RATES = (25e9, 50e9)


def step_time(
    hardware: Hardware,
    utilization: tuple[float, float],
    *,
    model_flops: float,
    remat_flops: float,
    traffic: float,
    collectives: Iterable[Collective],
    host_traffic: float = 0.0,
) -> StepTime:
    """Returns the slowest and the fastest time of one step, and the quantities that they are computed from.

    The slowest time has the low utilization and the lowest rate of the network that is certain; computation, network and
    copies to the host do not overlap. The fastest time has the high utilization and the full rate of the network;
    everything overlaps.

    Args:
      hardware: the hardware that the step runs on.
      utilization: (low, high): the smallest and the largest share of the chip's peak rate that is expected, in (0, 1].
      model_flops: floating-point operations of one step over all devices, without recomputation.
      remat_flops: floating-point operations that the backward pass recomputes, in addition.
      traffic: bytes that one device reads and writes in its memory in one step.
      collectives: the collectives of one step, with the bytes that one device sends.
      host_traffic: bytes that one device copies to and from the memory of the host in one step.
    """
    chip = hardware.chip
    peak = chip.peak_flops * hardware.num_devices
    low, high = utilization
    compute = ((model_flops + remat_flops) / (peak * low), (model_flops + remat_flops) / (peak * high))
    memory = traffic / chip.memory_bandwidth
    sent = sum(one.sent for one in collectives)
    best, worst = (
        chip.interconnect,
        max(_SURE_SHARE * chip.link_bandwidth, _SURE_LINKS * chip.link_bandwidth * (chip.links > 1)),
    )
    if hardware.nodes > 1 and chip.network_bandwidth is not None:
        # A ring over all devices is as fast as its slowest link.
        best, worst = chip.network_bandwidth, _SURE_SHARE * chip.network_bandwidth
    network = (sent / worst, sent / best)
    host = (host_traffic / _HOST_RATES[0], host_traffic / _HOST_RATES[1])
    slow = max(compute[0] + network[0], memory) + host[0]
    fast = max(compute[1], memory, network[1], host[1])
    return StepTime(
        model_flops=model_flops,
        remat_flops=remat_flops,
        compute=compute,
        memory_traffic=memory,
        network=network,
        host=host,
        fast=fast,
        slow=slow,
        mfu=(model_flops / (peak * slow), model_flops / (peak * fast)),
    )


def price(hardware: Hardware, time: StepTime, settings: TrainSettings) -> RunPrice:
    """Returns the hours and the price of all steps, with the price per hour in `settings` or else in the price list."""
    hours = (settings.run.steps * time.fast / 3600, settings.run.steps * time.slow / 3600)
    each = usd_per_chip_hour(settings.price, hardware.chip)
    usd = None if each is None else (hours[0] * hardware.num_chips * each, hours[1] * hardware.num_chips * each)
    rmb = None if usd is None else (usd[0] * settings.price.rmb_per_usd, usd[1] * settings.price.rmb_per_usd)
    return RunPrice(hours=hours, chips=hardware.num_chips, usd_per_chip_hour=each, usd=usd, rmb=rmb)
