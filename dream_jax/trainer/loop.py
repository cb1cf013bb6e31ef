"""The loop itself: from settings to a finished run.

Knows the order of things, signals and clocks; each thing is somebody else's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dream_jax import distributed, lora, sharding
from dream_jax.batch import Batch
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.data import Batches, TokenizedRows, longest_row, make_batches
from dream_jax.flops import FlopCounter
from dream_jax.hf import is_hub_id
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
    open_tokenizer,
)
from dream_jax.trainer.console import Report
from dream_jax.trainer.cost import begin_part, run_cost
from dream_jax.trainer.folder import (
    MetricsLog,
    check_folder,
    claimed_folder,
    holds_checkpoint,
    last_losses,
    save_batches,
    save_tokenizer,
    write_json,
)
from dream_jax.trainer.heldout import Grid, GridScore, lay_out_held_out, rows_at_once
from dream_jax.trainer.loggers import check_loggers
from dream_jax.trainer.samples import When, take_samples
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.segments import Parts
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.weights import Frozen


class Stopped(Exception):
    """The run was asked to stop and has saved itself."""


class Diverged(Exception):
    """The loss or its gradient was no number in too many steps in a row."""


def train(settings: TrainSettings, origins: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs, or goes on with, the run that the settings describe.

    `origins` says of settings where they come from, for the first lines.

    Returns:
      What is written to `summary.json`.

    Raises:
      ValueError, OSError: settings, data or files that do not fit; nothing is changed then.
      Stopped: after SIGINT or SIGTERM; everything up to that step is saved.
      Diverged: the loss or its gradient was infinite or no number in too many steps in a row.
    """
    distributed.join(
        num_devices=math.prod(sharding.parse_mesh_shape(settings.devices.mesh)),
        coordinator=settings.devices.coordinator,
        num_processes=settings.devices.num_processes,
        process_id=settings.devices.process_id,
        cluster=settings.devices.cluster,
    )
    begun = time.monotonic()
    mesh = sharding.make_mesh(settings.devices.mesh)
    report = Report(settings, origins)
    report.settings(mesh)
    run = _prepare(settings, mesh)
    begins = not holds_checkpoint(settings)
    read = functools.partial(weights.read, settings, mesh, compute_dtype(settings, mesh), begins=begins)
    # Weights that cannot be read must show before --overwrite throws anything away. A run that goes on throws nothing away,
    # and the time that reading its base takes is time of the run.
    params, frozen = read() if begins else (None, None)
    with (
        claimed_folder(settings),
        report.kept(settings.run.out, {Stopped: "stopped", Diverged: "diverged"}),
        run.batches,
        _parts(settings, mesh, begun, report) as parts,
        RunCheckpoints(
            settings.run.out / "checkpoints",
            keep=settings.run.keep,
            measure="" if run.grid is None else run.grid.digest,
        ) as checkpoints,
    ):
        if frozen is None:
            params, frozen = read()
        state, done = _first_state(run, params, frozen, checkpoints)
        for step, problem in checkpoints.damaged.items():
            report.say(f"warning: the checkpoint of step {step} is damaged ({problem}) and was put aside")
        del params  # their memory is the state's now
        tokenizer_dir = save_tokenizer(settings, run.tokenizer, run.model.tokenizer_dir, run.template)
        rows, batches = run.batches.report, run.batches.outlook(settings.run.steps)
        data = {"rows": rows.plain(), "batches": dataclasses.asdict(batches)}
        if report.leads:
            write_json(settings.run.out / "data.json", data | {"sources": _sources(settings)})
        whole = run.model.config.num_parameters
        lines = [*rows.lines(), *batches.lines()]
        report.start(state, frozen.params, whole, done, lines, run.max_length, mesh)
        if done == 0:
            _sample(run, merge_params(run.graphdef, joined(frozen.params, state.params)), "before")
        state, score = _steps(run, state, frozen, done, checkpoints, report)
        best = checkpoints.best_step()
        if best is not None:
            report.say(f"best evaluation: nll {checkpoints.score(best):.4f} after step {best}")
        if settings.run.final == "best" and best not in (None, settings.run.steps):
            try:
                state, score = checkpoints.restore(_released(state), step=best)[0], None
            except ValueError as error:
                raise ValueError(
                    f"the best state cannot be handed over: {error}; the same command with --final last hands over the last"
                ) from error
        trained = merge_params(run.graphdef, joined(frozen.params, state.params))
        trained.tokenizer_dir, trained.base_identity = str(tokenizer_dir), frozen.identity
        made = weights.save(trained, settings)
        for kind, path in made.items():
            report.say(f"saved the {kind} to {path}")
        _sample(run, trained, "after")
        evaluation = {}
        if run.held_out is not None:
            evaluation = evaluate(trained, run.held_out, settings, run.max_length, mesh, score)
        for name, value in evaluation.items():
            if name in ("grid", "answered"):
                continue  # for comparisons, not for a person
            report.say(
                f"held-out {name.replace('_', ' ')}: {value:g}" if isinstance(value, float) else f"{name}: {value}"
            )
        spent = parts.now()
        summary = {
            "settings": settings.plain(),
            "parameters": whole,
            "trained_parameters": parameter_count(state.params),
            "base_identity": frozen.identity,
            "learning_rate": settings.optimizer_config().learning_rate,
            "mask": trained.trained_mask,
            "bytes_per_device": sharding.bytes_per_device((state, frozen.params)),
            "data": data["rows"],
            "last_losses": last_losses(settings.run.out) if report.leads else [],
            "eval": evaluation,
            "best": None if best is None else {"step": best, "nll": checkpoints.score(best)},
            "step": int(state.step),
            "seconds": sum(part.seconds for part in spent),
            "cost": dataclasses.asdict(run_cost(spent, settings.price)),
            "devices": f"{mesh.devices.size} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
        }
        if report.leads:
            # With it the run is finished, whatever becomes of a picture.
            write_json(settings.run.out / "summary.json", summary)
            parts.write(spent)  # for the report
        files = ["metrics.csv", "eval.csv", "summary.json", "checkpoints/", *(f"{name}/" for name in made)]
        names = ", ".join(files)
        report.say(f"wrote {settings.run.out}: {names} in {summary['seconds']:.0f} s")
        return summary


@contextlib.contextmanager
def _parts(settings: TrainSettings, mesh: Mesh, begun: float, report: Report) -> Iterator[Parts]:
    """The parts of the run, of which this process makes one."""
    parts = Parts(
        settings.run.out if report.leads else None, begin_part(settings.price, mesh, begun), begun, report.say
    )
    with parts.kept():
        yield parts


def _sources(settings: TrainSettings) -> dict[str, str]:
    """Where the model and the data were read: names of the hub, of this machine, or of this project.

    As it was when the run began: what stood at a path then may be gone when the run goes on.
    """
    try:
        before = json.loads((settings.run.out / "data.json").read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None  # of a run that begins now, or a file that is written anew
    if isinstance(before, dict):
        return before
    found = {}
    for name in (settings.network.model, settings.rows.data, *settings.rows.mix):
        local = pathlib.Path(name).expanduser().exists()
        found[name] = "local" if local else "hub" if is_hub_id(name) else "built in"
    return found


def _sample(run: _Run, model: Dream, when: When) -> None:
    if run.held_out is not None and run.settings.evaluation.samples:
        take_samples(model, run.held_out, run.settings, run.max_length, run.mesh, when)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the settings stand for, checked against each other; nothing large, and nothing on the disk yet.

    Attributes:
      model: shapes only.
      graphdef: its static part.
      template: how the rows' prompts become tokens; what the model is asked later should be written so too.
      held_out: None when nothing is to be evaluated.
      grid: its rows at fixed noise levels; None without any that fit.
    """

    settings: TrainSettings
    mesh: Mesh
    model: Dream
    graphdef: nnx.GraphDef[Dream]
    tokenizer: Tokenizer
    template: Template
    max_length: int
    batches: Batches
    held_out: TokenizedRows | None
    grid: Grid | None
    optimizer: optax.GradientTransformation
    step: TrainStep


def _prepare(settings: TrainSettings, mesh: Mesh) -> _Run:
    """Reads the data and makes the step. Whatever can be wrong with the settings shows here, before any weights."""
    fsdp = dict(mesh.shape)["fsdp"]
    if fsdp % jax.process_count():
        raise ValueError(
            f"mesh {settings.devices.mesh} splits the batch {fsdp} ways, but there are {jax.process_count()} "
            "processes that read rows of their own: fsdp must be a multiple of their number"
        )
    check_loggers(settings.logs.log_to)
    source = settings.source("train")
    test_source = settings.source("test") if settings.evaluation.eval_rows else None
    check_folder(settings)
    model = describe_model(settings, mesh)
    tokenizer = open_tokenizer(settings, model)
    rows = TokenizedRows(source, tokenizer, settings.rows.encode_options())
    held_out = None if test_source is None else TokenizedRows(test_source, tokenizer, settings.rows.encode_options())
    max_length = settings.rows.max_length or longest_row(rows)
    check_tokenizer(model.config, tokenizer)
    check_length(model, max_length)
    built = build_step(settings, model, mesh)
    evaluated = (
        [] if held_out is None else [row for _, row in held_out.first(settings.evaluation.eval_rows, max_length)]
    )
    grid = None
    if evaluated:
        laid_out = lay_out_held_out(evaluated, max_length, tokenizer.pad_id, settings.batches.options())
        grid = Grid(laid_out, rows_at_once(settings, mesh, len(evaluated)), mesh)
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
            rows,
            batch_size=settings.batches.batch_size,
            max_length=max_length,
            seed=settings.run.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            options=settings.batches.options(),
        ),
        held_out=held_out,
        grid=grid,
        optimizer=built.optimizer,
    )


def _first_state(
    run: _Run, params: ParamTree | None, frozen: Frozen, checkpoints: RunCheckpoints
) -> tuple[TrainState, int]:
    """The state to begin with, and the steps that are done.

    Without `params` the newest checkpoint is read, and the weights that the run once began with are not.
    """
    if params is not None:
        return init_state(params, run.optimizer, run.mesh, donate=True), 0
    shapes = split_params(run.model)[1]
    trained = lora.split(shapes)[0] if run.settings.lora.adapts else shapes
    state, meta = checkpoints.restore(abstract_state(trained, run.optimizer, run.mesh))
    if meta.get("base") != frozen.identity:
        raise ValueError(
            f"the weights in {run.settings.network.model} are not those that this run began with ({frozen.identity} now, "
            f"{meta.get('base')} then), so its adapter does not fit them; put them back, or begin another run (--out)"
        )
    run.batches.set_state(meta["data"])
    return state, int(state.step)


def _released(state: TrainState) -> TrainState:
    """Shapes and places of a state, whose memory is given back."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    return shapes


def _steps(
    run: _Run,
    state: TrainState,
    frozen: Frozen,
    done: int,
    checkpoints: RunCheckpoints,
    report: Report,
) -> tuple[TrainState, GridScore | None]:
    """Takes the steps that are left, logs each, and evaluates and saves now and then.

    Returns:
      The last state, and its score if it was evaluated here.

    Raises:
      Stopped: when asked to stop.
      Diverged: when too many steps in a row had to be skipped.
    """
    settings = run.settings
    log = MetricsLog(settings, done) if report.leads else None
    widths = functools.cache(functools.partial(FlopCounter, run.model))  # a batch may be narrower than max_length
    stop = _StopSignal()
    skipped: dict[int, Batch[np.ndarray]] = {}  # the batches of the steps before this one, if they were skipped
    due, score = False, None
    with stop, report.live(), contextlib.closing(log) if log else contextlib.nullcontext():
        clock = time.monotonic()
        for number in range(done + 1, settings.run.steps + 1):
            batch = next(run.batches)
            width = batch.tokens_BT.shape[1]
            state, metrics = run.step(state, put_batch(batch, run.mesh), frozen.params)
            row = {name: float(value) for name, value in metrics.items()}
            now = time.monotonic()
            row["tokens_per_second"] = settings.batches.batch_size * width / (now - clock)
            mfu = widths(width).mfu(settings.batches.batch_size * width, row["num_masked"], now - clock, run.mesh)
            clock = now
            if log:
                log.write(number, row)
            report.step(number, row, mfu)
            skipped = skipped | {number: batch} if row["skipped"] else {}
            if skipped:
                report.say(
                    f"warning: step {number} is skipped, {len(skipped)} in a row: its loss is {row['loss']}, its gradient "
                    f"norm {row['grad_norm']}",
                    "skipped",
                    number,
                )
            if len(skipped) >= settings.run.max_skipped:
                raise _diverged(number, row, skipped, checkpoints, settings)
            last, stopping = number == settings.run.steps, stop.requested()
            if not skipped:
                score = None  # of the weights before this step; a skipped one leaves them, and what is known of them
            if run.grid is not None and (number % settings.evaluation.eval_every == 0 or last):
                score = run.grid.score(merge_params(run.graphdef, joined(frozen.params, state.params)))
                report.say(f"evaluation after step {number}: {score.line()}")
                if log:
                    log.evaluated(number, score.row(), run.grid.digest)
                # In the middle of skipped steps no best is saved (see below), and after them the weights are others.
                due |= not skipped and _is_best(score, checkpoints)
                clock = time.monotonic()  # the next step did not take that long
            due |= number % settings.run.save_every == 0
            # In the middle of skipped steps nothing is saved that was not saved before them: what led to them may be in
            # the weights already, and must not crowd out the checkpoints before it.
            if last or stopping or (due and not skipped):
                meta = {"data": run.batches.get_state(), "base": frozen.identity}
                checkpoints.save(number, state, meta, None if score is None else score.nll)
                due = False
                if log:
                    log.flush()
            if stopping:
                checkpoints.wait()
                raise Stopped(
                    f"stopped and saved after step {number} of {settings.run.steps}; the same command goes on from there"
                )
    checkpoints.wait()
    return state, score


def _is_best(score: GridScore, checkpoints: RunCheckpoints) -> bool:
    best = checkpoints.best_step()
    before = None if best is None else checkpoints.score(best)
    found = not math.isnan(score.nll) and (before is None or score.nll < before)
    if jax.process_count() > 1:  # a shared disk may have shown the others something older
        found = bool(multihost_utils.broadcast_one_to_all(np.array(found)))
    return found


def _diverged(
    number: int,
    row: Mapping[str, float],
    skipped: Mapping[int, Batch[np.ndarray]],
    checkpoints: RunCheckpoints,
    settings: TrainSettings,
) -> Diverged:
    checkpoints.wait()
    saved = checkpoints.latest_step()
    newest = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
    return Diverged(
        f"step {number} has loss {row['loss']} and gradient norm {row['grad_norm']}, the last of "
        f"{len(skipped)} in a row that had to be skipped; weights since then are not saved ({newest}). The batches are in "
        f"{save_batches(settings.run.out, skipped)}. Try a smaller --learning-rate, and look at the batches"
    )


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
