"""What chips cost by the hour, and what a run has cost by the time of its segments."""

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
    """What a run has cost, in chip hours and money.

    Attributes:
      chips: the number of chips that the last segment held.
      chip_hours: chips times hours over all segments, with compilation, saving, evaluation, and steps that a kill undid.
      usd_per_chip_hour: the mean price; None when no price is known for one of the segments.
      usd, rmb: of the whole run; None without a price.
    """

    chips: int
    chip_hours: float
    usd_per_chip_hour: float | None
    usd: float | None
    rmb: float | None


def usd_per_chip_hour(price: PriceSettings, chip: Chip | None) -> float | None:
    """The price that the settings give, or else the chip's list price; None when there is neither."""
    if price.price_per_chip_hour is None:
        return None if chip is None else chip.usd_per_chip_hour
    rate = price.rmb_per_usd if price.currency == "rmb" else 1.0
    return price.price_per_chip_hour / rate


def begin_segment(price: PriceSettings, mesh: Mesh, began: float) -> RunSegment:
    """The segment of a run that began on this mesh at a time of `time.monotonic()`."""
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
    """What the segments of a run, at least one, have cost together.

    A segment without a known price takes the price that the settings give, if they give one.
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
