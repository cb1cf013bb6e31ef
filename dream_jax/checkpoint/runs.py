"""The checkpoints of a training run: written in the background, checked for damage when they are read."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from dream_jax import distributed, files
from dream_jax.checkpoint.trees import tree_differences
from dream_jax.checkpoint.weights import HANDLERS

_log = logging.getLogger(__name__)


# Orbax writes the time into this file after the checksums are taken; a restore does not read the file.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA",)


class RunCheckpoints:
    """The checkpoints of one training run, written in the background; a context manager.

    The checkpoint of a step gets its final name only when it is complete, with the checksums of its files in it. When there
    are more than `keep`, the oldest are deleted, except the one with the lowest score.

    Attributes:
      directory: it has one folder per checkpoint, named for the step.
      damaged: the damaged checkpoints that the last `restore` skipped: a description of the damage by step.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, measure: str = ""):
        """`measure` is the name of the score; scores that were saved under another name are not used."""
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        self.directory = pathlib.Path(directory).resolve()
        self.damaged: dict[int, str] = {}
        self._scores: dict[int, float | None] = {}
        scores = self._scores  # the class below must not refer to `self`, whose threads end when it is deleted

        class SummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
            """The temporary folder of a step; the checksums are written just before it is renamed."""

            async def finalize(self) -> None:
                step = self.get_final().name
                if step.isdigit():
                    folder = pathlib.Path(self.get())
                    score = scores.get(int(step))
                    more = {"score": score, "measure": measure}
                    await asyncio.to_thread(files.write_checksums, folder, leave_out=_WRITTEN_LAST, **more)
                await super().finalize()

        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_LastAndBest(keep, scores),
                enable_async_checkpointing=True,
                temporary_path_class=SummedPath,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=HANDLERS),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        for step in self.steps():
            written = files.read_checksums(self.directory / str(step))
            score = None if written is None or written.get("measure") != measure else written.get("score")
            self._scores[step] = score if isinstance(score, float) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None = None) -> None:
        """Starts to write the checkpoint of a step; the arrays may be donated as soon as this returns.

        Waits for an earlier checkpoint that is still being written, and raises the error of one that failed.

        Args:
          step: number of the step, not yet saved.
          state: tree of jax arrays.
          meta: what else is needed to resume, for example the position in the data; it must be representable in JSON.
          score: of the state, lower is better; the step with the lowest score is kept. None or NaN means no score.

        Raises:
          ValueError: the step was saved before.
          TypeError: `meta` is not JSON.
        """
        json.dumps(meta)
        if step in self.steps():
            raise ValueError(f"{self.directory} already holds step {step}")
        self._scores[step] = None if score is None or math.isnan(score) else float(score)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta)))
        # force: by default Orbax silently skips a step that is not newer than the last one.
        self._manager.save(step, args=args, force=True)

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step that can be restored, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest score, of several the first; None when no step has one."""
        return _best(self._scores, self.steps())

    def score(self, step: int) -> float | None:
        """The score that a step was saved with."""
        return self._scores.get(step)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step onto any mesh, after its files have been compared with their checksums.

        Args:
          abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s with the shardings and dtypes of the result.
          step: which step; by default the newest one that is not damaged. Newer ones are renamed, `7` to `7.damaged`, and
            reported as errors to the log and in `damaged`.

        Returns:
          The state and the meta that were saved.

        Raises:
          FileNotFoundError: there is no such step.
          ValueError: the checkpoint is damaged, or has other arrays or shapes; the message names them.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint of step {step}, only of {steps}")
        chosen = self._undamaged(steps[::-1] if step is None else [step])
        stored = self._manager.item_metadata(chosen)["state"].tree
        if differences := tree_differences(abstract_state, stored, dtypes=False):
            raise ValueError(
                f"the checkpoint {self.directory / str(chosen)} is of another state: {'; '.join(differences)}"
            )
        args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        restored = self._manager.restore(
            chosen,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(abstract_state, restore_args=args), meta=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["meta"]

    def _undamaged(self, candidates: Sequence[int]) -> int:
        """The first of the candidates that is not damaged; the damaged ones before it are renamed."""
        self.damaged = {}
        for step in candidates:
            problem = self._damage(step)
            if problem is None:
                break
            self.damaged[step] = problem
            _log.error("the checkpoint of step %d in %s is damaged: %s", step, self.directory, problem)
        else:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in self.damaged.items())
            if len(candidates) < len(self.steps()):
                raise ValueError(
                    f"{self.directory} holds other checkpoints, but not this one as it was written ({listed})"
                )
            raise ValueError(
                f"no checkpoint in {self.directory} is as it was written ({listed}); put a copy back, or begin another run"
            )
        for bad in self.damaged:
            _log.error("resuming from step %d instead; step %d is now %s", step, bad, self._aside(bad).name)
            if jax.process_index() == 0:
                if self._aside(bad).exists():
                    shutil.rmtree(self._aside(bad))
                (self.directory / str(bad)).rename(self._aside(bad))
            self._scores.pop(bad, None)
        if self.damaged:
            distributed.barrier("checkpoint.aside")
            self._manager.reload()
        return step

    def _aside(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.damaged"

    def _damage(self, step: int) -> str | None:
        """Describes the damage of a step, or None; each process reads a share of the files, and all agree on the result."""
        problem = files.find_damage(self.directory / str(step), jax.process_index(), jax.process_count())
        found = distributed.which_say(problem is not None)
        return f"process {found[0]} reports what is wrong" if found and problem is None else problem

    def wait(self) -> None:
        """Waits until everything is on disk; raises the error of a write that failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, then stops the threads."""
        self._manager.close()


def _best(scores: Mapping[int, float | None], steps: Iterable[int]) -> int | None:
    scored = [(score, step) for step in steps if (score := scores.get(step)) is not None]
    return min(scored)[1] if scored else None


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Tells Orbax which checkpoints to keep; the caller adds to `scores` as checkpoints are saved."""

    keep: int
    scores: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = sorted(one.step for one in checkpoints)
        staying = {*steps[-self.keep :], _best(self.scores, steps)}
        return [one.step in staying for one in checkpoints]
