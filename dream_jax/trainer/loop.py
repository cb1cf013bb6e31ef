"""The function `train`, which makes a whole run: it calls the other modules of the trainer in order."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from dream_jax import sharding
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.files import write_json
from dream_jax.trainer import weights
from dream_jax.trainer.console import RunConsole
from dream_jax.trainer.cost import begin_segment
from dream_jax.trainer.folder import claimed_folder, holds_checkpoint, save_tokenizer
from dream_jax.trainer.prepared import join_devices, prepare
from dream_jax.trainer.segments import RunSegments
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.steps import Diverged, Stopped, best_state, first_state, take_steps
from dream_jax.trainer.summary import data_facts, summarize


def train(settings: TrainSettings, origins: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Begins the run that the settings describe, or resumes it, and continues until all steps are taken.

    Args:
      settings: the settings of the run.
      origins: for each setting, by name, where its value comes from, such as "given"; printed beside the value.

    Returns:
      The contents of `summary.json`, as described at `summarize`.

    Raises:
      ValueError, OSError: settings, data or files are wrong, or the disk is full; most such errors are raised before any
        file is changed.
      ModuleNotFoundError: the package of a logger is not installed.
      Stopped: a SIGINT or SIGTERM arrived; a checkpoint of the last step is saved.
      Diverged: the loss or its gradient was not finite in `max_skipped` steps in a row.
    """
    out = settings.run.out
    join_devices(settings.devices)
    begun = time.monotonic()  # before the mesh, because its first use starts the accelerators
    mesh = sharding.make_mesh(settings.devices.mesh)
    console = RunConsole(settings, origins)
    console.settings(mesh)
    run = prepare(settings, mesh, console.say)
    if run.remat is not None:
        console.say(run.remat.reason if run.remat.fits else f"warning: {run.remat.reason}")
    note = weights.adapter_note(settings)
    if note is not None:
        console.say(note)
    console.say(run.check_space())
    begins = not holds_checkpoint(settings)
    read = functools.partial(weights.read, settings, mesh, run.model.compute_dtype.name, begins=begins)
    # A new run reads its weights here, so that an error in them is raised before --overwrite deletes anything. A
    # resumed run deletes nothing; it reads its base inside the block below, where the time is counted as time of
    # the run.
    params, frozen = read() if begins else (None, None)
    with (
        claimed_folder(settings),
        console.kept(out, {Stopped: "stopped", Diverged: "diverged"}),
        run.batches,
        RunSegments(
            out if console.leads else None, begin_segment(settings.price, mesh, begun), begun, console.say
        ).kept() as segments,
        RunCheckpoints(
            out / "checkpoints", keep=settings.run.keep, measure="" if run.grid is None else run.grid.digest
        ) as checkpoints,
    ):
        if frozen is None:
            params, frozen = read()
        driver = run.driver(console.say)
        state, done = first_state(run, driver, params, frozen, checkpoints)
        for step, problem in checkpoints.damaged.items():
            console.say(f"warning: the checkpoint of step {step} is damaged ({problem}) and was put aside")
        del params  # their memory now belongs to the state
        tokenizer_dir = save_tokenizer(settings, run.tokenizer, run.model.tokenizer_dir, run.template, run.instruction)
        if console.leads:
            write_json(out / "data.json", data_facts(run))
        data_lines = [*run.batches.report.lines(), *run.batches.outlook(settings.run.steps).lines()]
        console.start(state, frozen.params, run.model.config.num_parameters, done, data_lines, run.max_length)
        if done == 0:
            run.take_samples(run.model_of(state.params, frozen.params), "before")
        if done < settings.run.steps:
            driver.begin(state, frozen.params)
        state, score = take_steps(run, driver, state, frozen, done, checkpoints, console)
        best = checkpoints.best_step()
        if best is not None:
            console.say(f"best evaluation: nll {checkpoints.score(best):.4f} after step {best}")
            if settings.run.final == "best" and best != settings.run.steps:
                state, score = best_state(state, best, checkpoints), None
        trained = run.model_of(state.params, frozen.params)
        trained.tokenizer_dir, trained.base_identity = str(tokenizer_dir), frozen.identity
        made = weights.save(trained, settings)
        for kind, path in made.items():
            console.say(f"saved the {kind} to {path}")
        run.take_samples(trained, "after")
        evaluation = run.evaluate(trained, score)
        console.evaluation(evaluation)
        summary = summarize(run, state, frozen, trained, evaluation, checkpoints, segments.now())
        if console.leads:
            write_json(out / "summary.json", summary)  # the run counts as finished once this file exists
        names = ", ".join(["metrics.csv", "eval.csv", "summary.json", "checkpoints/", *(f"{kind}/" for kind in made)])
        console.say(f"wrote {out}: {names} in {summary['seconds']:.0f} s")
        return summary
