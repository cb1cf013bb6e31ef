"""The steps of a run: the first state, each step with its log line, evaluation and checkpoint, and why steps end early."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping

import jax
import numpy as np

from dream_jax.batch import Batch
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.distributed import from_first
from dream_jax.flops import FlopCounter
from dream_jax.shapes import ParamTree
from dream_jax.train_step import TrainState, init_state, put_batch
from dream_jax.trainer.console import RunConsole
from dream_jax.trainer.folder import MetricsLog, save_batches
from dream_jax.trainer.heldout import GridScore
from dream_jax.trainer.prepared import PreparedRun
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.stop_signal import StopSignal
from dream_jax.trainer.weights import Frozen


class Stopped(Exception):
    """The run was asked to stop and has saved itself."""


class Diverged(Exception):
    """The loss or its gradient was not finite in too many steps in a row."""


def first_state(
    run: PreparedRun, params: ParamTree | None, frozen: Frozen, checkpoints: RunCheckpoints
) -> tuple[TrainState, int]:
    """The state to begin with, and how many steps it has behind it.

    Args:
      run: its batches are moved to where the checkpoint stood.
      params: what is trained, in a run that begins. None reads the newest checkpoint instead.
      frozen: the weights that are not trained.
      checkpoints: of the run.

    Raises:
      ValueError: no checkpoint can be read, or the frozen weights are not those that the run began with.
    """
    if params is not None:
        return init_state(params, run.optimizer, run.mesh, donate=True), 0
    state, meta = checkpoints.restore(run.abstract_state())
    if meta.get("base") != frozen.identity:
        raise ValueError(
            f"the weights in {run.settings.network.model} are not those that this run began with ({frozen.identity} now, "
            f"{meta.get('base')} then), so its adapter does not fit them; put them back, or begin another run (--out)"
        )
    run.batches.set_state(meta["data"])
    return state, int(state.step)


def best_state(state: TrainState, best: int, checkpoints: RunCheckpoints) -> TrainState:
    """The state of the best evaluation, in the memory of the last state, which is given back first.

    Raises:
      ValueError: its checkpoint cannot be read.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    try:
        return checkpoints.restore(shapes, step=best)[0]
    except ValueError as error:
        raise ValueError(
            f"the best state cannot be handed over: {error}; the same command with --final last hands over the last"
        ) from error


def take_steps(
    run: PreparedRun,
    state: TrainState,
    frozen: Frozen,
    done: int,
    checkpoints: RunCheckpoints,
    console: RunConsole,
) -> tuple[TrainState, GridScore | None]:
    """Takes the steps that are left, logs each, and evaluates and saves now and then.

    Returns:
      The last state, and its score if it was evaluated here.

    Raises:
      Stopped: when asked to stop.
      Diverged: when too many steps in a row had to be skipped.
    """
    settings, evaluation = run.settings, run.settings.evaluation
    log = MetricsLog(settings, done) if console.leads else None
    widths = functools.cache(functools.partial(FlopCounter, run.model))  # a batch may be narrower than max_length
    stop = StopSignal()
    skipped: dict[int, Batch[np.ndarray]] = {}  # the batches of the steps before this one, if they were skipped
    due, score = False, None
    with stop, console.live(), contextlib.closing(log) if log else contextlib.nullcontext():
        clock = time.monotonic()
        for number in range(done + 1, settings.run.steps + 1):
            batch = next(run.batches)
            width = batch.tokens_BT.shape[1]
            state, metrics = run.step(state, put_batch(batch, run.mesh), frozen.params)
            row = {name: float(value) for name, value in metrics.items()}
            now = time.monotonic()
            positions = settings.batches.batch_size * width
            row["tokens_per_second"] = positions / (now - clock)
            mfu = widths(width).mfu(positions, row["num_masked"], now - clock, run.mesh)
            clock = now
            if log:
                log.write(number, row)
            console.step(number, row, mfu)
            skipped = skipped | {number: batch} if row["skipped"] else {}
            if skipped:
                console.say(
                    f"warning: step {number} is skipped, {len(skipped)} in a row: its loss is {row['loss']}, its gradient "
                    f"norm {row['grad_norm']}",
                    "skipped",
                    number,
                )
            if len(skipped) >= settings.run.max_skipped:
                raise _diverged(number, row, skipped, checkpoints, settings)
            last, stopping = number == settings.run.steps, stop.requested()
            if not skipped:
                score = None  # of the weights before this step; a skipped step leaves the weights, and so their score
            if run.grid is not None and (number % evaluation.eval_every == 0 or last):
                score = run.grid.score(run.model_of(state.params, frozen.params))
                console.say(f"evaluation after step {number}: {score.line()}")
                if log:
                    log.evaluated(number, score.row(), run.grid.digest)
                # In the middle of skipped steps no best is saved (see below), and after them the weights are others.
                due |= not skipped and _is_best(score, checkpoints)
                clock = time.monotonic()  # the time of the evaluation is not the next step's
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
                    f"stopped and saved after step {number} of {settings.run.steps}; the same command resumes from there"
                )
    checkpoints.wait()
    return state, score


def _is_best(score: GridScore, checkpoints: RunCheckpoints) -> bool:
    """Whether the score is better than every saved one, as process 0 sees it: a shared disk may show others less."""
    best = checkpoints.best_step()
    before = None if best is None else checkpoints.score(best)
    return bool(from_first(not math.isnan(score.nll) and (before is None or score.nll < before)))


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
