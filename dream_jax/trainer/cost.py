"""What chips cost by the hour, and a run by its time.

Knows prices given and listed. Knows nothing of how long anything takes.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from dream_jax.chips import Chip, chip_of
from dream_jax.trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a run, in chip hours and money.

    Attributes:
      chips: that were held.
      chip_hours: chips times hours, compilation, saving and evaluation included.
      usd_per_chip_hour: given, or of the list; None when there is neither.
      usd, rmb: None without a price.
    """

    chips: int
    chip_hours: float
    usd_per_chip_hour: float | None
    usd: float | None
    rmb: float | None


def usd_per_chip_hour(settings: TrainSettings, chip: Chip | None) -> float | None:
    """The price that the settings give, or else the chip's list price; None when there is neither."""
    if settings.price_per_chip_hour is None:
        return None if chip is None else chip.usd_per_chip_hour
    rate = settings.rmb_per_usd if settings.currency == "rmb" else 1.0
    return settings.price_per_chip_hour / rate


def run_cost(settings: TrainSettings, mesh: Mesh, seconds: float) -> Cost:
    """What a run of so many seconds on this mesh has cost."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    chips = max(1, mesh.devices.size // (1 if chip is None else chip.devices_per_chip))
    if mesh.devices.flat[0].platform == "cpu":
        chips = 1  # the devices of a CPU are made up
    each, hours = usd_per_chip_hour(settings, chip), chips * seconds / 3600
    usd = None if each is None else each * hours
    return Cost(
        chips=chips,
        chip_hours=hours,
        usd_per_chip_hour=each,
        usd=usd,
        rmb=None if usd is None else usd * settings.rmb_per_usd,
    )
