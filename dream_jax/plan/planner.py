"""Makes a plan from the settings of a run: it predicts the memory and the time of a train step, and the run's price.

`trainer.build` makes the train step, with shapes instead of arrays. The compiler gives the memory and the collectives of
the step; if nothing is compiled, they are estimated by arithmetic. The time is always computed by arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
from typing import Any

import jax
import numpy as np

from dream_jax import sharding
from dream_jax.chips import CHIPS, chip_of
from dream_jax.data import TokenizedRows, TokenRow, length_report, longest_row, make_batches
from dream_jax.model import parameter_count
from dream_jax.plan import arithmetic, cost
from dream_jax.plan.compile import Compiled, Refusal, compile_step
from dream_jax.plan.hardware import Hardware, find_hardware
from dream_jax.plan.rollouts import plan_rollout
from dream_jax.plan.settings import MemoryPlan, PlannedRows, PlanSettings, RunPlan
from dream_jax.remat import Remat
from dream_jax.step_memory import DeviceBytes, StepShape, bytes_on_device, remat_flops
from dream_jax.trainer import remat_choice
from dream_jax.trainer.build import abstract_step, describe_model, open_tokenizer, step_shape
from dream_jax.trainer.folder import begun_remat
from dream_jax.trainer.remat_choice import ARITHMETIC_SHARE
from dream_jax.trainer.settings import TrainSettings

# Changes that are tried by arithmetic if a step does not fit, after remat and accumulation. The cheapest one is
# first; each is tried alone and together with those before it.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"moments": "bfloat16"},
    {"moments": "int8"},
    {"remat": "offload"},
    {"moments": "float32", "moments_on_host": True},
    {"lora_rank": 32},
    {"lora_rank": 32, "base": "nf4"},
)
_SUGGESTIONS = 4
_MEASURED_ROWS = 1000


def make_plan(settings: TrainSettings, wanted: PlanSettings, found: Compiled | Refusal | None = None) -> RunPlan:
    """Returns the predicted memory, time and price of a run.

    Args:
      settings: the settings of the run.
      wanted: the settings of the plan, such as the hardware.
      found: the result of an earlier compilation of the same step; the step is then not compiled again. None if there is
        no such result.

    Raises:
      ValueError: hardware, mesh, model and batch do not match, or data or a tokenizer that is needed cannot be read.
      ModuleNotFoundError: the step is compiled for a named TPU topology, and libtpu is not installed; the message says
        what to install. If the compiler for a GPU is not installed, the plan is an estimate, and its `advice` says so.
    """
    if settings.devices.coordinator is not None:
        raise ValueError("--coordinator connects processes of a run, but a plan is made by one process: leave it out")
    hardware = find_hardware(wanted.topology, compiles=wanted.compile)
    mesh = hardware.mesh(settings.devices.mesh)
    rows = _rows(settings, wanted, mesh)
    platform = hardware.chip.platform
    compiles = wanted.compile and hardware.devices is not None and found is None

    @functools.cache
    def compiled(remat: Remat) -> Compiled | Refusal:
        one = settings.replaced(remat=remat)
        shape = _shape(one, mesh, rows)
        step = abstract_step(one, mesh, rows.max_length)
        chunks = arithmetic.loss_chunks(shape, step.model.config.vocab_size, platform)
        return compile_step(step, unknown_trips=chunks)

    def compiled_peak(remat: Remat) -> int | None:
        found = compiled(remat)
        return found.peak if isinstance(found, Compiled) else None

    choice = None
    if settings.network.remat == "auto":
        choice = remat_choice.choose(
            abstract_step(settings, mesh, rows.max_length),
            _shape(settings, mesh, rows),
            platform=platform,
            chip=hardware.chip,
            limit=hardware.limit,
            compiled=compiled_peak if compiles else None,
        )
        settings = settings.replaced(remat=choice.taken)
    step = abstract_step(settings, mesh, rows.max_length)
    shape = _shape(settings, mesh, rows)
    bytes_ = bytes_on_device(step, shape, platform)
    chunks = arithmetic.loss_chunks(shape, step.model.config.vocab_size, platform)
    found = compiled(shape.remat) if compiles else found
    memory = _memory(bytes_, found, hardware)
    moved = found.collectives if isinstance(found, Compiled) else arithmetic.collectives(step, shape)
    time = cost.step_time(
        hardware,
        wanted.utilization,
        model_flops=arithmetic.model_flops(step, shape),
        remat_flops=remat_flops(step, shape, platform),
        traffic=arithmetic.memory_traffic(step, shape, bytes_, chunks),
        collectives=moved,
        host_traffic=arithmetic.host_traffic(step, shape, bytes_),
    )
    rollout, whole = None, time
    if settings.run.objective == "grpo":
        prompts = settings.batches.batch_size
        rollout = plan_rollout(settings.rewards, step, shape, bytes_, time, hardware, wanted.utilization, prompts)
        updates = settings.rewards.updates
        whole = dataclasses.replace(
            time, fast=updates * time.fast + rollout.fast, slow=updates * time.slow + rollout.slow
        )
    advice = [] if hardware.missing is None else [f"an estimate, not compiled: {hardware.missing}"]
    if not memory.fits:
        advice += suggestions(settings, hardware, rows)
    return RunPlan(
        hardware=hardware.name,
        chip=hardware.chip.name,
        devices=hardware.num_devices,
        settings=settings.plain(),
        trained=parameter_count(step.state.params),
        frozen=step.model.config.num_parameters
        if step.frozen
        else 0,  # two 4-bit codes share a byte, so arrays are not counted
        rows=rows,
        memory=memory,
        collectives=moved,
        time=time,
        price=cost.price(hardware, whole, settings),
        advice=tuple(advice),
        versions=_versions(platform),
        compile_seconds=None if found is None else found.seconds,
        remat=None if choice is None else choice.reason,
        rollout=rollout,
    )


def suggestions(settings: TrainSettings, hardware: Hardware, rows: PlannedRows) -> list[str]:
    """Returns changes with which the step would fit into the memory of a device, as lines of text.

    A change is returned if the step then needs at most 90 % of the memory by arithmetic. First come at most four changes
    of the settings, then other hardware (see `_more_chips`). If nothing fits, one line says so.
    """
    found: list[str] = []
    changed: dict[str, Any] = {}
    changes: list[dict[str, Any]] = [{"remat": "full"}]
    changes += [{"remat": "full", "accumulation": number} for number in _accumulations(settings)]
    for change in (*changes, *_CHANGES):
        if settings.optimization.optimizer == "adafactor" and any(name.startswith("moments") for name in change):
            continue  # Adafactor does not have these moments.
        if settings.lora.adapts:  # The run trains an adapter already, so its rank is not changed.
            change = {name: value for name, value in change.items() if name != "lora_rank"}
        if "accumulation" not in change:
            changed = changed | change
        for tried in (change, changed):
            text = _tried(settings, hardware, rows, tried)
            if text and text not in found:
                found.append(text)
    found = found[:_SUGGESTIONS] + _more_chips(settings, hardware, rows)
    return found or ["no change that was tried by arithmetic fits: use chips with more memory"]


def remedies(settings: TrainSettings) -> list[str]:
    """Returns at most two changes of the settings, as text, for a run that had too little memory on this machine.

    On a known accelerator they are the first `suggestions`. Otherwise they are flags that reduce the memory and that the
    settings do not have yet.
    """
    # A run that began has written the policy that `auto` chose. A run that did not begin needed too much even with "full".
    taken = begun_remat(settings.run.out) or "full"
    settings = settings.replaced(remat=taken) if settings.network.remat == "auto" else settings
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None:
        size = math.prod(sharding.parse_mesh_shape(settings.devices.mesh))
        hardware = dataclasses.replace(find_hardware(None), num_devices=size)
        rows = _rows(settings, PlanSettings(plan=True), sharding.make_mesh(settings.devices.mesh))
        found = suggestions(settings, hardware, rows)
        return ([line for line in found if line.startswith("--")] or found)[:2]
    flags = [] if settings.network.remat in ("full", "offload") else ["--remat full"]
    flags += [f"--accumulation {number}" for number in _accumulations(settings)[:1]]
    if not settings.lora.adapts:
        flags += [] if settings.optimization.moments == "int8" else ["--moments int8"]
        flags += ["--lora-rank 32"]
    return [*flags, "a smaller --max-length", "a larger --mesh"][:2]


def _accumulations(settings: TrainSettings) -> list[int]:
    """Returns all larger values of --accumulation that the batch size and the mesh allow, in ascending order."""
    fsdp = sharding.parse_mesh_shape(settings.devices.mesh)[0]
    return [
        microbatches
        for microbatches in range(settings.batches.accumulation + 1, settings.batches.batch_size // fsdp + 1)
        if settings.batches.batch_size % microbatches == 0 and settings.batches.batch_size // microbatches % fsdp == 0
    ]


def _tried(settings: TrainSettings, hardware: Hardware, rows: PlannedRows, change: dict[str, Any]) -> str | None:
    """Returns the change as flags, with the memory that the step then needs on a device.

    The result is None if the step does not fit, or if the change changes nothing or is not possible with these settings.
    """
    values = settings.values()
    if all(values[name] == value for name, value in change.items()):
        return None
    try:
        changed = settings.replaced(**change)
        needed = _estimate(changed, dataclasses.replace(hardware, devices=None), rows)
    except ValueError:  # the change and the other settings exclude each other, so it is not suggested
        return None
    if needed > ARITHMETIC_SHARE * hardware.limit:
        return None
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in change.items()
        if values[name] != value
    ]
    return f"{' '.join(flags)}: about {needed / 2**30:.1f} GiB a device"


def _more_chips(settings: TrainSettings, hardware: Hardware, rows: PlannedRows) -> list[str]:
    """Returns hardware on which the step would fit, as at most two lines of text.

    The first line is for more devices of the same kind: fsdp is 2, 4, 8 or 16 times as large, and the smallest number
    that fits is returned. The second line is for as many devices of another kind: it lists all chips of the same platform
    that have enough memory. A line is left out if nothing fits.
    """
    found = []
    fsdp, tensor, sequence = sharding.parse_mesh_shape(settings.devices.mesh)
    for times in (2, 4, 8, 16):
        microbatch = settings.batches.batch_size // settings.batches.accumulation
        mesh = "x".join(map(str, (fsdp * times, tensor, sequence)[: 3 if sequence > 1 else 2]))
        larger = dataclasses.replace(hardware, num_devices=hardware.num_devices * times, devices=None)
        if microbatch % (fsdp * times):
            break
        needed = _estimate(settings.replaced(mesh=mesh), larger, rows)
        if needed <= ARITHMETIC_SHARE * hardware.limit:
            found.append(
                f"{larger.num_devices} devices of {hardware.chip.name}, --mesh {mesh}: about {needed / 2**30:.1f} GiB each"
            )
            break
    needed = _estimate(settings, dataclasses.replace(hardware, devices=None), rows)
    same = [
        chip.name
        for chip in CHIPS.values()
        if chip.topology
        and chip.platform == hardware.chip.platform
        and needed <= ARITHMETIC_SHARE * Hardware.limit_of(chip)
    ]
    if same:
        found.append(f"as many devices of {' or '.join(same)}: about {needed / 2**30:.1f} GiB each")
    return found


def _estimate(settings: TrainSettings, hardware: Hardware, rows: PlannedRows) -> int:
    mesh = hardware.mesh(settings.devices.mesh)
    step = abstract_step(settings, mesh, rows.max_length)
    found = bytes_on_device(step, _shape(settings, mesh, rows), hardware.chip.platform)
    return found.given + found.working


def _shape(settings: TrainSettings, mesh: sharding.AnyMesh, rows: PlannedRows) -> StepShape:
    return step_shape(settings, mesh, rows.max_length, rows.masked_share)


def _memory(parts: DeviceBytes, found: Compiled | Refusal | None, hardware: Hardware) -> MemoryPlan:
    estimate = parts.given + parts.working
    if isinstance(found, Compiled):
        peak, working, refused = found.peak, found.peak - found.given, None
    elif isinstance(found, Refusal):
        peak, refused = max(estimate, found.needed or 0), found.words
        working = peak - parts.given
    else:
        peak, working, refused = estimate, parts.working, None
    return MemoryPlan(
        **dataclasses.asdict(parts),
        working=working,
        peak=peak,
        limit=hardware.limit,
        share=hardware.share,
        compiled=isinstance(found, Compiled),
        estimate=estimate,
        refused=refused,
    )


def _rows(settings: TrainSettings, wanted: PlanSettings, mesh: sharding.AnyMesh) -> PlannedRows:
    """Returns the length of the rows of the run, and which share of their positions will be masked.

    The data is read if --max-length is not given (the longest row then decides the length), or if `wanted.read_data` is
    true. Otherwise the share is an upper bound.
    """
    if settings.rows.max_length is not None and not wanted.read_data:
        # On average half of the maskable positions are masked. Prompts are never masked, so this is an upper bound.
        return PlannedRows(max_length=settings.rows.max_length, masked_share=0.5)
    model = describe_model(settings, mesh)
    objective, tokenizer = settings.objective(), open_tokenizer(settings, model)
    source = settings.tokens("train", settings.token_cache(tokenizer)).source
    objective.check_rows(source)
    rows = objective.tokenize(source, tokenizer, settings.rows.encode_options())
    max_length = settings.rows.max_length or longest_row(rows)
    if settings.batches.pack:
        return _packed_rows(settings, rows, max_length)
    report = length_report(rows, max_length)
    numbers = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MEASURED_ROWS)).astype(int))
    fitted = (rows.fit(rows.keep(number), max_length) for number in numbers.tolist())
    given = [row.length - int(row.maskable.sum()) for row in fitted if isinstance(row, TokenRow)]
    maskable = 1.0 - float(np.mean(given)) / max_length if given else 1.0
    return PlannedRows(
        max_length=max_length,
        masked_share=maskable / 2,
        rows=report.kept,
        mean_length=report.mean,
        epochs=settings.run.steps * settings.batches.batch_size / report.kept,
    )


def _packed_rows(settings: TrainSettings, rows: TokenizedRows, max_length: int) -> PlannedRows:
    """Returns the `PlannedRows` of a run with `--pack`, whose rows hold several texts each."""
    chosen = settings.batches
    with make_batches(
        rows,
        batch_size=chosen.batch_size,
        max_length=max_length,
        seed=settings.run.seed,
        options=chosen.options(),
        num_threads=0,
    ) as batches:
        outlook, report = batches.outlook(settings.run.steps), batches.report
    positions = chosen.batch_size * sum(int(width) * count for width, count in outlook.widths.items())
    return PlannedRows(
        max_length=max_length,
        masked_share=outlook.supervised / positions / 2,
        rows=report.kept,
        mean_length=report.mean,
        epochs=outlook.epochs,
    )


def _versions(platform: str) -> dict[str, str]:
    """Returns the versions of jax and, if it is installed, of the compiler for the platform, by package."""
    compilers = ("libtpu",) if platform == "tpu" else ("jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {}
    for name in ("jax", *compilers):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
