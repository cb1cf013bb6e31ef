"""How long a step takes on the roofline of the hardware, and what all steps of a run cost."""

from __future__ import annotations

from collections.abc import Iterable

from dream_jax.plan.hardware import Hardware
from dream_jax.plan.hlo import Collective
from dream_jax.plan.settings import RunPrice, StepTime
from dream_jax.trainer.cost import usd_per_chip_hour
from dream_jax.trainer.settings import TrainSettings

# The links of a torus that a collective uses at least: both directions of one axis. A switch gives half its rate at least.
_SURE_LINKS = 2
_SURE_SHARE = 0.5


def step_time(
    hardware: Hardware,
    utilization: tuple[float, float],
    *,
    model_flops: float,
    remat_flops: float,
    traffic: float,
    collectives: Iterable[Collective],
) -> StepTime:
    """Seconds of one step.

    Args:
      hardware: what it runs on.
      utilization: share of the peak that arithmetic reaches while it runs, low and high.
      model_flops, remat_flops: of one step over all devices.
      traffic: bytes that a device moves in its own memory.
      collectives: of one step, as one device sees them.
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
    slow, fast = max(compute[0] + network[0], memory), max(compute[1], memory, network[1])
    return StepTime(
        model_flops=model_flops,
        remat_flops=remat_flops,
        compute=compute,
        memory_traffic=memory,
        network=network,
        fast=fast,
        slow=slow,
        mfu=(model_flops / (peak * slow), model_flops / (peak * fast)),
    )


def price(hardware: Hardware, time: StepTime, settings: TrainSettings) -> RunPrice:
    """What the run's steps cost, at the price given or else the list's."""
    hours = (settings.run.steps * time.fast / 3600, settings.run.steps * time.slow / 3600)
    each = usd_per_chip_hour(settings.price, hardware.chip)
    usd = None if each is None else (hours[0] * hardware.num_chips * each, hours[1] * hardware.num_chips * each)
    rmb = None if usd is None else (usd[0] * settings.price.rmb_per_usd, usd[1] * settings.price.rmb_per_usd)
    return RunPrice(hours=hours, chips=hardware.num_chips, usd_per_chip_hour=each, usd=usd, rmb=rmb)
