"""The settings of a plan, and the plan itself: memory, time and price in numbers."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from dream_jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """A plan instead of a run: what it would take, on hardware that need not be here."""

    plan: bool = False
    """compile the step, print memory, time and price, and train nothing; needs no weights, and with --max-length no data"""
    topology: str | None = None
    """the hardware to plan for, such as v6e:2x4, v5p:2x2x1, h100:8; by default what is here"""
    read_data: bool = False
    """read the data also where --max-length is given: for its real share of masked positions, and the epochs"""
    compile: bool = True
    """--no-compile estimates memory and collectives by arithmetic, in seconds"""
    utilization: tuple[float, float] = (0.35, 0.6)
    """share of the chip's peak that arithmetic is assumed to reach while it runs, recomputation included: low and high"""
    plan_out: pathlib.Path | None = None
    """a file to write the plan to, as JSON"""

    def __post_init__(self) -> None:
        low, high = self.utilization
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"utilization={self.utilization} must be two shares, low and high, in (0, 1]")
        if self.plan:
            return
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} is for a plan; add --plan, or leave it out to train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, batch: what a step is given, from shapes and shardings; frozen parameters count as such.
      host: moments that lie in the host's memory; not part of any sum.
      gradients, kept, layer, loss: what a step needs besides, by arithmetic: gradients; what is kept from the forward for
        the backward pass; the working memory of one layer; that of the loss.
      working: bytes besides the arguments at the worst moment, by the compiler or by arithmetic.
      peak: all bytes at the worst moment.
      limit: the most that a program can have.
      compiled: whether `working` and `peak` are the compiler's.
      estimate: the arithmetic's peak, for comparison.
      refused: the compiler's own message where it found too little memory.
    """

    parameters: int
    optimizer: int
    batch: int
    host: int
    gradients: int
    kept: int
    layer: int
    loss: int
    working: int
    peak: int
    limit: int
    compiled: bool
    estimate: int
    refused: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the step can run."""
        return self.refused is None and self.peak <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on the roofline, and what they rest on.

    Attributes:
      model_flops: of one step over all devices: 6 a weight and token, attention in full, the head at masked positions.
      remat_flops: of what the backward pass recomputes, in addition.
      compute: seconds of all that arithmetic, at the assumed utilization: low (fast) and high (slow).
      memory_traffic: seconds of the least traffic with the device's memory.
      network: seconds of the collectives: with all links busy, and with one direction of one axis of the torus (half of
        the switch's rate).
      fast: the longest of the three alone: everything overlaps.
      slow: compute and network one after the other.
      mfu: model_flops over what the chips could do in the slow and in the fast time.
    """

    model_flops: float
    remat_flops: float
    compute: tuple[float, float]
    memory_traffic: float
    network: tuple[float, float]
    fast: float
    slow: float
    mfu: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPrice:
    """What the run costs.

    Attributes:
      hours: of the run, fast and slow; compilation, reading data, saving and evaluating come on top.
      chips: that are paid.
      usd_per_chip_hour: the price, given or of the list; None when there is neither.
      usd, rmb: for the run, fast and slow; None without a price.
    """

    hours: tuple[float, float]
    chips: int
    usd_per_chip_hour: float | None
    usd: tuple[float, float] | None
    rmb: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRows:
    """What the run reads.

    Attributes:
      max_length: tokens a row, padding included.
      masked_share: positions of a batch that are masked, expected.
      rows, mean_length: of the data, when it was read.
      epochs: that the run's steps make, when the data was read.
    """

    max_length: int
    masked_share: float
    rows: int | None = None
    mean_length: float | None = None
    epochs: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run would take.

    Attributes:
      hardware, chip, devices: such as "v6e:2x4", "v6e", 8.
      settings: of the run that was planned.
      trained, frozen: numbers of parameters.
      rows: what the run reads.
      memory, time, price: see these classes.
      collectives: of one step.
      advice: changes that would make it fit, when it does not.
      versions: of jax and the compiler.
      compile_seconds: how long compiling took; None when nothing was compiled.
    """

    hardware: str
    chip: str
    devices: int
    settings: dict[str, Any]
    trained: int
    frozen: int
    rows: PlannedRows
    memory: MemoryPlan
    collectives: tuple[Collective, ...]
    time: StepTime
    price: RunPrice
    advice: tuple[str, ...]
    versions: dict[str, str]
    compile_seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether the step can run."""
        return self.memory.fits

    def plain(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        return dataclasses.asdict(self) | {"fits": self.fits}
