"""The settings of a plan, and the plan itself with the predicted memory, time and price."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from dream_jax.bounds import FloatRange, check_numbers
from dream_jax.paths import check_local
from dream_jax.plan.hlo import Collective
from dream_jax.step_memory import MemoryParts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """A plan instead of a run: the memory, time and price of the run, also on hardware that is not here."""

    plan: bool = False
    """compile the train step, print memory, time and price, then stop; needs no weights, with --max-length no data"""
    topology: str | None = None
    """the hardware to plan for, such as v6e:2x4, v5p:2x2x1, h100:8; by default the accelerators of this machine"""
    read_data: bool = False
    """read the data even if --max-length is given, to measure the share of masked positions and the epochs"""
    compile: bool = True
    """compile the train step; --no-compile estimates memory and collectives by arithmetic, which takes only seconds"""
    utilization: tuple[float, float] = (0.35, 0.6)
    """lowest and highest share of the chip's peak that computation with recomputation is assumed to reach, in (0, 1]"""
    plan_out: pathlib.Path | None = None
    """file that the plan is written to, as JSON"""

    def __post_init__(self) -> None:
        check_numbers(self, utilization=FloatRange(0.0, 1.0, open_low=True))
        check_local(self)
        low, high = self.utilization
        if not low <= high:
            raise ValueError(f"utilization={self.utilization} must be two shares in (0, 1], the lower one first")
        if self.plan:
            return
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} only has a meaning in a plan; add --plan, or leave it out to train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan(MemoryParts):
    """The memory that a train step needs on one device, in bytes: the parts by arithmetic, and the whole.

    Attributes:
      working: bytes in use in addition to the arguments when memory use is highest, by the compiler or by arithmetic.
      peak: all bytes in use when memory use is highest.
      limit: memory of the device that a program can use.
      share: a text with the share of a GPU's memory that `limit` is, and the reason; None on a TPU, where it is all memory.
      compiled: whether `working` and `peak` come from the compiler.
      estimate: the peak by arithmetic, for comparison.
      refused: the message of the compiler if it found too little memory; None otherwise.
    """

    working: int
    peak: int
    limit: int
    share: str | None
    compiled: bool
    estimate: int
    refused: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of the device."""
        return self.refused is None and self.peak <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of one train step by the roofline model, in seconds, and the quantities that it is computed from.

    Attributes:
      model_flops: floating-point operations of one step over all devices, without recomputation; see
        `arithmetic.model_flops`.
      remat_flops: floating-point operations that the backward pass recomputes, in addition.
      compute: seconds of all these operations at the low and at the high utilization, so the larger number is first.
      memory_traffic: seconds of the minimum traffic with the memory of the device.
      network: seconds of the collectives at the lowest rate that is certain (both directions of one axis of a torus, or
        half of the rate of a switch) and at the full rate, so the larger number is first.
      host: seconds of the copies to and from the memory of the host at a low and at a high rate, so the larger number is
        first.
      fast: seconds of a step if everything overlaps: the longest of computation, memory, network and host at their best.
      slow: seconds of a step if computation, network and copies to the host do not overlap.
      mfu: model_flops divided by the operations that the chips could do at their peak in `slow` and in `fast`.
    """

    model_flops: float
    remat_flops: float
    compute: tuple[float, float]
    memory_traffic: float
    network: tuple[float, float]
    host: tuple[float, float]
    fast: float
    slow: float
    mfu: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """The memory and the time of sampling the answers of one step, by arithmetic.

    Attributes:
      answers: number of answers.
      passes: number of forward passes over each answer.
      flops: floating-point operations of all passes over all devices.
      fast, slow: seconds, as in `StepTime`.
      share: the share of the time of a step that sampling takes, with the fast and with the slow times; the time of the
        rewards is not counted.
      working: bytes of one device that sampling needs besides weights and optimizer.
      peak: all bytes of one device while answers are sampled. Updates and sampling follow each other, so the memory of a
        run is the larger one of this number and the peak of an update.
    """

    answers: int
    passes: int
    flops: float
    fast: float
    slow: float
    share: tuple[float, float]
    working: int
    peak: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPrice:
    """The hours and the price of all steps of a run.

    Attributes:
      hours: hours of all steps, (fast, slow), without compilation, reading data, saving and evaluating.
      chips: number of chips that are paid for.
      usd_per_chip_hour: the price from the settings or else from the price list; None if neither has one.
      usd, rmb: price of all steps, (fast, slow); None without a price.
    """

    hours: tuple[float, float]
    chips: int
    usd_per_chip_hour: float | None
    usd: tuple[float, float] | None
    rmb: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRows:
    """The rows of data that the run is trained on.

    Attributes:
      max_length: number of tokens of a row, padding included.
      masked_share: expected number of masked positions / all positions of a batch, in [0, 1].
      rows, mean_length: number of rows, and their mean number of tokens; None if the data was not read.
      epochs: number of passes over the data in all steps; None if the data was not read.
    """

    max_length: int
    masked_share: float
    rows: int | None = None
    mean_length: float | None = None
    epochs: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The predicted memory, time and price of a run.

    Attributes:
      hardware, chip, devices: name of the hardware, kind of chip, and number of jax devices: "v6e:2x4", "v6e", 8.
      settings: the settings of the planned run, by name; `remat` "auto" is replaced by the policy that was taken.
      trained, frozen: number of trained parameters, and of frozen ones.
      rows: the rows of data that the run is trained on.
      memory, time, price: the predicted memory, time and price; see these classes.
      collectives: the collectives of one step, one entry for each kind.
      advice: changes with which the step would fit, if it does not, and why nothing was compiled, if it could not be.
      versions: versions of jax and of the compiler, by package.
      compile_seconds: seconds that compiling took; None if nothing was compiled.
      remat: a text with the policy that `remat` "auto" chose, and the reason; None if the settings name a policy.
      rollout: the sampling of answers in each step; None for an objective without it. Then `time` is that of one update.
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
    remat: str | None = None
    rollout: RolloutPlan | None = None

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device, and the sampling of answers too if there is any."""
        return self.memory.fits and (self.rollout is None or self.rollout.peak <= self.memory.limit)

    def plain(self) -> dict[str, Any]:
        """Returns the plan as dictionaries, lists and numbers that can be written as JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits}
