"""Takes the steps of a run, with logs, evaluations and checkpoints, and ends it early after a signal or divergence."""

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
from dream_jax.posttraining import Driver
from dream_jax.shapes import ParamTree
from dream_jax.train_step import TrainState, init_state
from dream_jax.trainer.build import rows_of_each
from dream_jax.trainer.console import RunConsole
from dream_jax.trainer.folder import MetricsLog, save_batches
from dream_jax.trainer.heldout import GridScore
from dream_jax.trainer.prepared import PreparedRun
from dream_jax.trainer.settings import TrainSettings
from dream_jax.trainer.stop_signal import StopSignal
from dream_jax.trainer.weights import Frozen


class Stopped(Exception):
    """The run was stopped by SIGINT or SIGTERM, and a checkpoint of its last step was saved."""


class Diverged(Exception):
    """The loss or its gradient was not finite in too many steps in a row."""


def first_state(
    run: PreparedRun, driver: Driver, params: ParamTree | None, frozen: Frozen, checkpoints: RunCheckpoints
) -> tuple[TrainState, int]:
    """Returns the state to continue from, and the number of steps that it has already taken.

    Args:
      run: the run; if a checkpoint is read, `run.batches` continues after the batches that it has used.
      driver: takes the steps; if a checkpoint is read, it continues from its state there.
      params: the parameters to train in a new run; their memory is reused. None reads the newest checkpoint instead.
      frozen: the weights that are not trained.
      checkpoints: the checkpoints of the run.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: no checkpoint can be read, the frozen weights are not those that the run began with, or the position in
        the data is of other data settings, text or tokenizer.
    """
    if params is not None:
        return init_state(params, run.optimizer, run.mesh, donate=True), 0
    state, meta = checkpoints.restore(run.abstract_state())
    if meta.get("base") != frozen.identity:
        raise ValueError(
            f"the weights in {run.settings.network.model} are not those that this run began with ({frozen.identity} "
            f"now, {meta.get('base')} then), so its adapter does not fit; restore those weights, or start a new run "
            "with another --out"
        )
    run.batches.set_state(meta["data"])
    driver.set_state(meta.get("objective", {}))
    return state, int(state.step)


def best_state(state: TrainState, best: int, checkpoints: RunCheckpoints) -> TrainState:
    """Restores the checkpoint of step `best`, the one with the best evaluation.

    Deletes the arrays of `state` first, so that both states never need memory at the same time.

    Raises:
      FileNotFoundError: there is no checkpoint of this step.
      ValueError: the checkpoint cannot be read.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    try:
        return checkpoints.restore(shapes, step=best)[0]
    except ValueError as error:
        raise ValueError(
            f"the state with the best evaluation cannot be exported: {error}; the same command with --final last "
            "exports the state of the last step"
        ) from error


def take_steps(
    run: PreparedRun,
    driver: Driver,
    state: TrainState,
    frozen: Frozen,
    done: int,
    checkpoints: RunCheckpoints,
    console: RunConsole,
) -> tuple[TrainState, GridScore | None]:
    """Takes the remaining steps; logs each, and evaluates and saves checkpoints as often as the settings say.

    `state` is the state after `done` steps; its arrays are donated to the first step.

    Returns:
      The last state, and its score on the held-out grid; None if there is no grid, or if no step was left to take.

    Raises:
      Stopped: a SIGINT or SIGTERM arrived; the checkpoint of the last step is saved.
      Diverged: `max_skipped` steps in a row were skipped; their batches are saved.
    """
    settings, evaluation = run.settings, run.settings.evaluation
    objective = run.built.objective
    log = MetricsLog(settings, done) if console.leads else None
    each = rows_of_each(settings)
    # FLOP counters by the number of tokens per row, as a batch may be narrower than max_length, and by the size of the
    # blocks, which a schedule changes.
    flop_counter = functools.cache(functools.partial(FlopCounter, run.model))
    stop = StopSignal()
    skipped: dict[int, Batch[np.ndarray]] = {}  # the batches since the last step that was not skipped, by step
    due, score = False, None
    with stop, console.live(), contextlib.closing(log) if log else contextlib.nullcontext():
        clock = time.monotonic()
        for number in range(done + 1, settings.run.steps + 1):
            batch = next(run.batches)
            width = batch.tokens_BT.shape[1]
            state, metrics = driver(state, batch, frozen.params)
            row = {name: float(value) for name, value in metrics.items()}
            now = time.monotonic()
            positions = settings.batches.batch_size * width  # of the global batch, padding included
            row["tokens_per_second"] = positions / (now - clock)
            mfu = None
            if objective.has_mfu:
                counter = flop_counter(width, run.built.materials.config.block_size(number - 1))
                mfu = counter.mfu(each * positions, row["num_masked"], now - clock, run.mesh, _span(batch))
            clock = now
            if log:
                log.write(number, row)
            console.step(number, row, objective.line(row), mfu)
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
                score = None  # the weights have changed; a skipped step changes neither the weights nor their score
            if run.grid is not None and (number % evaluation.eval_every == 0 or last):
                score = run.grid.score(run.model_of(state.params, frozen.params))
                console.say(f"evaluation after step {number}: {score.line()}")
                further = driver.evaluate(state.params, frozen.params)
                if further:
                    shown = "  ".join(f"{name} {value:.4f}" for name, value in further.items())
                    console.say(f"evaluation after step {number}: {shown}")
                if log:
                    log.evaluated(number, score.row() | further, run.grid.digest)
                # During skipped steps no best state is saved (see below); the next normal step changes the weights.
                due |= not skipped and _is_best(score, checkpoints)
                clock = time.monotonic()  # the next step's time must not include the evaluation
            due |= number % settings.run.save_every == 0
            # In a series of skipped steps no due checkpoint is saved: the weights may already contain the cause of the
            # divergence, and such checkpoints would displace older, good ones.
            if last or stopping or (due and not skipped):
                meta = {"data": run.batches.get_state(), "base": frozen.identity}
                meta |= {"objective": kept} if (kept := driver.get_state()) else {}
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


def _span(batch: Batch[np.ndarray]) -> float | None:
    """Returns the mean number of tokens to which a token attends, over the rows of this process; None without packing."""
    if batch.length_BM is None:
        return None
    return float(np.sum(np.square(batch.length_BM.astype(np.float64))) / batch.tokens_BT.size)


def _is_best(score: GridScore, checkpoints: RunCheckpoints) -> bool:
    """Returns whether the score is better than that of every saved checkpoint.

    Process 0 decides it for all processes, because the others may see older files. A NaN is never better.
    """
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
    """Saves the batches of the skipped steps, and returns the exception that ends the run."""
    checkpoints.wait()
    saved = checkpoints.latest_step()
    newest = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
    return Diverged(
        f"step {number} has loss {row['loss']} and gradient norm {row['grad_norm']}; it is the last of {len(skipped)} "
        f"in a row that were skipped, during which no checkpoint was saved ({newest}). Their batches are in "
        f"{save_batches(settings.run.out, skipped)}. Try a smaller --learning-rate, and check these batches"
    )
