"""The loop itself: from settings to a finished run.

Knows the order of things, signals and clocks; each thing is somebody else's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dream_jax import lora, sharding
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.data import Batches, Source, make_batches
from dream_jax.flops import FlopCounter
from dream_jax.model import Dream, merge_params, parameter_count, split_params
from dream_jax.shapes import ParamTree, joined
from dream_jax.tokenizer import Template, Tokenizer
from dream_jax.train_step import TrainState, TrainStep, abstract_state, init_state, put_batch
from dream_jax.trainer import weights
from dream_jax.trainer.build import (
    build_step,
    check_length,
    check_tokenizer,
    compute_dtype,
    describe_model,
    longest_row,
    open_tokenizer,
)
from dream_jax.trainer.cost import run_cost
from dream_jax.trainer.folder import (
    MetricsLog,
    check_folder,
    claimed_folder,
    holds_checkpoint,
    last_losses,
    save_tokenizer,
    write_json,
)
from dream_jax.trainer.loggers import check_loggers
from dream_jax.trainer.record import read_record
from dream_jax.trainer.report import Report
from dream_jax.trainer.run_report import write_report
from dream_jax.trainer.samples import When, take_samples
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.weights import Frozen


class Stopped(Exception):
    """The run was asked to stop and has saved itself."""


class Diverged(Exception):
    """The loss or its gradient is no longer a number."""


def train(settings: TrainSettings, origins: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs, or goes on with, the run that the settings describe.

    `origins` says of settings where they come from, for the first lines.

    Returns:
      What is written to `summary.json`.

    Raises:
      ValueError, OSError: settings, data or files that do not fit; nothing is changed then.
      Stopped: after SIGINT or SIGTERM; everything up to that step is saved.
      Diverged: the loss or its gradient is infinite or no number.
    """
    if settings.coordinator is not None:
        sharding.join_processes(settings.coordinator, settings.num_processes, settings.process_id, settings.mesh)
    begun = time.monotonic()
    mesh = sharding.make_mesh(settings.mesh)
    report = Report(settings, origins)
    report.settings(mesh)
    run = _prepare(settings, mesh)
    # Weights that cannot be read must show before --overwrite throws anything away.
    begins = not holds_checkpoint(settings)
    params, frozen = weights.read(settings, mesh, compute_dtype(settings, mesh), begins=begins)
    with (
        claimed_folder(settings),
        report.kept(settings.out, {Stopped: "stopped", Diverged: "diverged"}),
        run.batches,
        RunCheckpoints(settings.out / "checkpoints", keep=settings.keep) as checkpoints,
    ):
        state, done, earlier = _first_state(run, params, frozen, checkpoints)
        del params  # their memory is the state's now
        tokenizer_dir = save_tokenizer(settings, run.tokenizer, run.model.tokenizer_dir, run.template)
        rows, batches = run.batches.report, run.batches.outlook(settings.steps)
        data = {"rows": rows.plain(), "batches": dataclasses.asdict(batches)}
        if report.leads:
            write_json(settings.out / "data.json", data)
        whole = run.model.config.num_parameters
        lines = [*rows.lines(), *batches.lines()]
        report.start(state, frozen.params, whole, done, lines, run.max_length, mesh)
        if done == 0:
            _sample(run, merge_params(run.graphdef, joined(frozen.params, state.params)), "before")
        state = _steps(run, state, frozen, done, checkpoints, report, lambda: earlier + time.monotonic() - begun)
        trained = merge_params(run.graphdef, joined(frozen.params, state.params))
        trained.tokenizer_dir, trained.base_identity = str(tokenizer_dir), frozen.identity
        made = weights.save(trained, settings)
        for kind, path in made.items():
            report.say(f"saved the {kind} to {path}")
        _sample(run, trained, "after")
        evaluation = {}
        if run.held_out is not None:
            evaluation = evaluate(trained, run.tokenizer, run.held_out, settings, run.max_length, mesh)
        for name, value in evaluation.items():
            report.say(
                f"held-out {name.replace('_', ' ')}: {value:g}" if isinstance(value, float) else f"{name}: {value}"
            )
        summary = {
            "settings": settings.plain(),
            "parameters": whole,
            "trained_parameters": parameter_count(state.params),
            "base_identity": frozen.identity,
            "bytes_per_device": sharding.bytes_per_device((state, frozen.params)),
            "data": data["rows"],
            "last_losses": last_losses(settings.out) if report.leads else [],
            "eval": evaluation,
            "seconds": earlier + time.monotonic() - begun,
            "cost": dataclasses.asdict(run_cost(settings, mesh, earlier + time.monotonic() - begun)),
            "devices": f"{mesh.devices.size} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
        }
        reports = []
        if report.leads:
            # With it the run is finished, whatever becomes of a picture.
            write_json(settings.out / "summary.json", summary)
            reports = [path.name for path in write_report(read_record(settings.out))]
        names = ", ".join(["metrics.csv", *reports, "summary.json", "checkpoints/", *(f"{name}/" for name in made)])
        report.say(f"wrote {settings.out}: {names} in {summary['seconds']:.0f} s")
        return summary


def _sample(run: _Run, model: Dream, when: When) -> None:
    if run.held_out is not None and run.settings.samples:
        take_samples(model, run.tokenizer, run.held_out, run.settings, run.max_length, run.mesh, when)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the settings stand for, checked against each other; nothing large, and nothing on the disk yet.

    Attributes:
      model: shapes only.
      graphdef: its static part.
      template: how the rows' prompts become tokens; what the model is asked later should be written so too.
      held_out: None when nothing is to be answered.
    """

    settings: TrainSettings
    mesh: Mesh
    model: Dream
    graphdef: nnx.GraphDef[Dream]
    tokenizer: Tokenizer
    template: Template
    max_length: int
    batches: Batches
    held_out: Source | None
    optimizer: optax.GradientTransformation
    step: TrainStep


def _prepare(settings: TrainSettings, mesh: Mesh) -> _Run:
    """Reads the data and makes the step. Whatever can be wrong with the settings shows here, before any weights."""
    if dict(mesh.shape)["fsdp"] % jax.process_count():
        raise ValueError(
            f"mesh {settings.mesh} splits the batch {dict(mesh.shape)['fsdp']} ways, but there are {jax.process_count()} "
            "processes that read rows of their own: fsdp must be a multiple of their number"
        )
    check_loggers(settings.log_to)
    source = settings.source("train")
    held_out = settings.source("test") if settings.eval_rows else None
    check_folder(settings)
    model = describe_model(settings, mesh)
    tokenizer = open_tokenizer(settings, model)
    max_length = settings.max_length or longest_row(source, tokenizer, settings.encode_options())
    check_tokenizer(model.config, tokenizer)
    check_length(model, max_length)
    built = build_step(settings, model, mesh)
    return _Run(
        settings=settings,
        mesh=mesh,
        model=model,
        graphdef=built.graphdef,
        tokenizer=tokenizer,
        template="raw" if isinstance(source[0].prompt, str) else "chat",
        max_length=max_length,
        step=built.step,
        batches=make_batches(
            source,
            tokenizer,
            batch_size=settings.batch_size,
            max_length=max_length,
            seed=settings.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            encoding=settings.encode_options(),
            options=settings.batch_options(),
        ),
        held_out=held_out,
        optimizer=built.optimizer,
    )


def _first_state(
    run: _Run, params: ParamTree | None, frozen: Frozen, checkpoints: RunCheckpoints
) -> tuple[TrainState, int, float]:
    """The state to begin with, the steps that are done, and the seconds that these took.

    Without `params` the newest checkpoint is read, and the weights that the run once began with are not.
    """
    if params is not None:
        return init_state(params, run.optimizer, run.mesh, donate=True), 0, 0.0
    shapes = split_params(run.model)[1]
    trained = lora.split(shapes)[0] if run.settings.adapts else shapes
    state, meta = checkpoints.restore(abstract_state(trained, run.optimizer, run.mesh))
    if meta.get("base") != frozen.identity:
        raise ValueError(
            f"the weights in {run.settings.model} are not those that this run began with ({frozen.identity} now, "
            f"{meta.get('base')} then), so its adapter does not fit them; put them back, or begin another run (--out)"
        )
    run.batches.set_state(meta["data"])
    return state, int(state.step), float(meta["seconds"])


def _steps(
    run: _Run,
    state: TrainState,
    frozen: Frozen,
    done: int,
    checkpoints: RunCheckpoints,
    report: Report,
    seconds: Callable[[], float],
) -> TrainState:
    """Takes the steps that are left, logs each, and saves now and then. Raises Stopped when asked to stop."""
    settings = run.settings
    log = MetricsLog(settings, done) if report.leads else None
    widths = functools.cache(functools.partial(FlopCounter, run.model))  # a batch may be narrower than max_length
    stop = _StopSignal()
    with stop, report.live(), contextlib.closing(log) if log else contextlib.nullcontext():
        clock = time.monotonic()
        for number in range(done + 1, settings.steps + 1):
            batch = next(run.batches)
            width = batch["tokens"].shape[1]
            state, metrics = run.step(state, put_batch(batch, run.mesh), frozen.params)
            row = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                checkpoints.wait()
                saved = checkpoints.latest_step()
                newest = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
                raise Diverged(
                    f"step {number} has loss {row['loss']} and gradient norm {row['grad_norm']}; nothing of it is saved "
                    f"({newest}). Try a smaller --learning-rate"
                )
            now = time.monotonic()
            row["tokens_per_second"] = settings.batch_size * width / (now - clock)
            mfu = widths(width).mfu(settings.batch_size * width, row["num_masked"], now - clock, run.mesh)
            clock = now
            if log:
                log.write(number, row)
            report.step(number, row, mfu)
            stopping = stop.requested()
            if number % settings.save_every == 0 or number == settings.steps or stopping:
                meta = {"data": run.batches.get_state(), "seconds": seconds(), "base": frozen.identity}
                checkpoints.save(number, state, meta)
                if log:
                    log.flush()
            if stopping:
                checkpoints.wait()
                raise Stopped(
                    f"stopped and saved after step {number} of {settings.steps}; the same command goes on from there"
                )
    checkpoints.wait()
    return state


class _StopSignal:
    """While active, the first SIGINT or SIGTERM asks the run to stop after its step; a second SIGINT interrupts it."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _StopSignal:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        # Not through the console: a signal may arrive while it is writing.
        os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n")

    def requested(self) -> bool:
        """Whether any process was asked: all of them stop at the same step."""
        if jax.process_count() == 1:
            return self._asked
        return bool(np.any(multihost_utils.process_allgather(np.array(self._asked))))
