"""The price of a chip per hour, and the cost of a run, computed from the time of its segments."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Sequence

from jax.sharding import Mesh

from dream_jax.chips import Chip, chip_of
from dream_jax.trainer.segments import RunSegment
from dream_jax.trainer.setting_groups import PriceSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a run, in chip hours and money.

    Attributes:
      chips: number of chips that the last segment used.
      chip_hours: sum of chips times hours over all segments. It includes compilation, saving, evaluation, and steps
        that were lost in a kill and taken again.
      usd_per_chip_hour: mean price in US dollars; None if the price of a segment is not known.
      usd, rmb: cost of the whole run; None if the price of a segment is not known.
    """

    chips: int
    chip_hours: float
    usd_per_chip_hour: float | None
    usd: float | None
    rmb: float | None


def usd_per_chip_hour(price: PriceSettings, chip: Chip | None) -> float | None:
    """Returns the price from the settings or else the chip's list price, in US dollars; None if both are missing."""
    if price.price_per_chip_hour is None:
        return None if chip is None else chip.usd_per_chip_hour
    rate = price.rmb_per_usd if price.currency == "rmb" else 1.0
    return price.price_per_chip_hour / rate


def begin_segment(price: PriceSettings, mesh: Mesh, began: float) -> RunSegment:
    """Makes the segment of a run that began on this mesh when `time.monotonic()` was `began`."""
    kind = mesh.devices.flat[0].device_kind
    chip = chip_of(kind)
    chips = max(1, mesh.devices.size // (1 if chip is None else chip.devices_per_chip))
    if mesh.devices.flat[0].platform == "cpu":
        chips = 1  # a CPU is one chip, however many devices jax divides it into
    begun = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=time.monotonic() - began)
    return RunSegment(
        begun=begun.isoformat(timespec="seconds"),
        seconds=0.0,
        devices=f"{mesh.devices.size} x {kind}",
        chips=chips,
        usd_per_chip_hour=usd_per_chip_hour(price, chip),
        rmb_per_usd=price.rmb_per_usd,
    )


def run_cost(segments: Sequence[RunSegment], price: PriceSettings | None = None) -> Cost:
    """Returns the cost of a run with these segments (at least one).

    If `price` gives a price per chip hour, it is used for the segments whose own price is not known.
    """
    given = None if price is None else usd_per_chip_hour(price, None)
    hours = [segment.chips * segment.seconds / 3600 for segment in segments]
    paid = [given if segment.usd_per_chip_hour is None else segment.usd_per_chip_hour for segment in segments]
    known = [each * hour for each, hour in zip(paid, hours, strict=True) if each is not None]
    chip_hours = sum(hours)
    whole = len(known) == len(paid)
    usd = sum(known)
    rmb = sum(segment.rmb_per_usd * cost for segment, cost in zip(segments, known, strict=False))
    return Cost(
        chips=segments[-1].chips,
        chip_hours=chip_hours,
        usd_per_chip_hour=usd / chip_hours if whole and chip_hours > 0 else None,
        usd=usd if whole else None,
        rmb=rmb if whole else None,
    )
