"""Writes the checkpoints of a training run in the background, and checks them for damage when it reads them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from dream_jax import distributed, files
from dream_jax.checkpoint.trees import tree_differences
from dream_jax.checkpoint.weights import HANDLERS, naming_damage, without_noise

_log = logging.getLogger(__name__)


# Orbax writes a timestamp into this file after the checksums are computed, so it has no checksum. A restore does not
# read it.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA",)


class RunCheckpoints:
    """Saves and restores the checkpoints of one training run; a context manager that calls `close` at its end.

    The folder of a checkpoint gets its final name only when all its files and their checksums are written. When there
    are more than `keep` checkpoints, the oldest ones are deleted, except the one with the lowest score.

    Attributes:
      directory: the directory of the checkpoints; each one is a folder in it, named by the number of its step.
      damaged: step -> description of the damage, for the checkpoints that the last `restore` skipped.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3, measure: str = ""):
        """Opens the checkpoints of a directory.

        Args:
          directory: the directory of the checkpoints; it is created if it is missing.
          keep: the number of newest checkpoints that are not deleted, at least 1.
          measure: the name of the score; scores that were saved under another name are ignored.

        Raises:
          ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        self.directory = pathlib.Path(directory).resolve()
        self.damaged: dict[int, str] = {}
        self._scores: dict[int, float | None] = {}
        self._state_bytes = 0
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(without_noise())
        # ChecksummedPath refers to `scores` and not to `self`: the threads of `self` end when it is deleted, and a
        # reference cycle would delay that.
        scores = self._scores

        class ChecksummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
            """The temporary folder of a checkpoint; it writes the checksums just before it gets its final name."""

            async def finalize(self) -> None:
                step = self.get_final().name
                if step.isdigit():
                    folder = pathlib.Path(self.get())
                    score = scores.get(int(step))
                    entries = {"score": score, "measure": measure}
                    await asyncio.to_thread(files.write_checksums, folder, leave_out=_WRITTEN_LAST, **entries)
                await super().finalize()

        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_LastAndBest(keep, scores),
                enable_async_checkpointing=True,
                temporary_path_class=ChecksummedPath,
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
        """Starts to write the checkpoint of a step in the background, after an earlier one is completely written.

        All processes must call this; a process that does not makes the others wait.

        Args:
          step: the number of the step, which must not be saved yet.
          state: tree of jax arrays. They may be donated as soon as this method returns.
          meta: everything else that is needed to resume, such as the position in the data; serialisable as JSON.
          score: the score of the state, lower is better; the step with the lowest score is not deleted. None or NaN
            means no score.

        Raises:
          ValueError: the step was saved before, or `meta` holds NaN or an infinity.
          TypeError: `meta` is not serialisable as JSON.
          OSError: the disk became full while the earlier checkpoint was written.
          Exception: another error for which the earlier checkpoint could not be written.
        """
        json.dumps(meta, allow_nan=False)
        if step in self.steps():
            raise ValueError(f"{self.directory} already holds step {step}; delete that checkpoint first")
        self._scores[step] = None if score is None or math.isnan(score) else float(score)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta)))
        self._state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._naming_full_disk():
            # force: by default Orbax silently skips a step that is not newer than the last one.
            self._manager.save(step, args=args, force=True)

    @contextlib.contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        """Raises OSError with the size of a checkpoint for the errors that Orbax raises when the disk is full.

        The temporary folder of the unfinished checkpoint is removed.
        """
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if not files.is_disk_full(error):
                raise
            if jax.process_count() == 1:  # other processes could still be writing into it
                remove_unfinished(self.directory)
            free = shutil.disk_usage(self.directory).free
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: a checkpoint takes about {self._state_bytes:,} bytes, and {free:,} are free now on the "
                f"disk of {self.directory}",
            ) from error

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the newest step that has a complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step with the lowest score, the earliest of equal ones; None if no checkpoint has a score."""
        return _best(self._scores, self.steps())

    def score(self, step: int) -> float | None:
        """Returns the score of the checkpoint of a step; None if it has no score or one of another `measure`."""
        return self._scores.get(step)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads the checkpoint of a step, after comparing its files with their checksums.

        The mesh may differ from the one that wrote it. All processes must call this; a process that does not makes the
        others wait.

        Args:
          abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and shardings of the result.
          step: the step to read. None reads the newest checkpoint that is not damaged; the damaged ones that are newer
            are renamed (`7` to `7.damaged`), logged as errors and listed in `damaged`.

        Returns:
          The state and the meta that were saved.

        Raises:
          FileNotFoundError: there is no such step, or no checkpoint at all.
          ValueError: the given checkpoint is damaged, or all are; or its arrays have other names or shapes than
            `abstract_state`. The message lists the differences.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint of step {step}, only of {steps}")
        chosen = self._undamaged(steps[::-1] if step is None else [step])
        path, remedy = self.directory / str(chosen), "put a copy back, or rename this folder to use an older checkpoint"
        with naming_damage(path, remedy):
            stored = self._manager.item_metadata(chosen)["state"].tree
            differences = tree_differences(abstract_state, stored, dtypes=False)
        if differences:
            raise ValueError(
                f"the checkpoint {self.directory / str(chosen)} does not fit the parameters and the optimizer of this "
                f"run: {'; '.join(differences)}; use the settings of the run that wrote it, or another folder"
            )
        args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        with naming_damage(path, remedy):
            restored = self._manager.restore(
                chosen,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(abstract_state, restore_args=args), meta=ocp.args.JsonRestore()
                ),
            )
        return restored["state"], restored["meta"]

    def _undamaged(self, candidates: Sequence[int]) -> int:
        """Returns the first undamaged step of `candidates`, and renames the damaged checkpoints before it.

        All processes must call this. Raises ValueError if all candidates are damaged; then nothing is renamed.
        """
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
                    f"this checkpoint in {self.directory} is damaged ({listed}); restore another step, "
                    "or put a copy back"
                )
            raise ValueError(
                f"every checkpoint in {self.directory} is damaged ({listed}); put a copy back, or start a new run in "
                "another folder"
            )
        for damaged_step in self.damaged:
            renamed = self._damaged_path(damaged_step)
            _log.error("resuming from step %d instead; step %d is now %s", step, damaged_step, renamed.name)
            if jax.process_index() == 0:
                if renamed.exists():
                    shutil.rmtree(renamed)
                (self.directory / str(damaged_step)).rename(renamed)
            self._scores.pop(damaged_step, None)
        if self.damaged:
            distributed.barrier("checkpoint.aside")
            self._manager.reload()
        return step

    def _damaged_path(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.damaged"

    def _damage(self, step: int) -> str | None:
        """Returns a description of the damage of a checkpoint, or None.

        Each process reads a part of the files. All processes must call this; either all return None or none does.
        """
        problem = files.find_damage(self.directory / str(step), jax.process_index(), jax.process_count())
        found = distributed.which_say(problem is not None)
        return f"process {found[0]} found the damage; its log describes it" if found and problem is None else problem

    def wait(self) -> None:
        """Waits until all checkpoints are written; raises the error of a checkpoint that could not be written."""
        with self._naming_full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits like `wait`, then stops the background threads; no other method may be called afterwards."""
        try:
            with self._naming_full_disk():
                self._manager.close()
        finally:
            self._quiet.close()


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes the temporary folders of checkpoints that a kill or a full disk has left in the folder of checkpoints."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _best(scores: Mapping[int, float | None], steps: Iterable[int]) -> int | None:
    """Returns the step with the lowest score, the earliest of equal ones; None if none of `steps` has a score."""
    scored = [(score, step) for step in steps if (score := scores.get(step)) is not None]
    return min(scored)[1] if scored else None


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Tells Orbax which checkpoints not to delete: the newest `keep`, and the one with the lowest of `scores`.

    `scores` is the dict of `RunCheckpoints`, which adds an entry for each checkpoint that it saves.
    """

    keep: int
    scores: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        preserved_steps = {*steps[-self.keep :], _best(self.scores, steps)}
        return [checkpoint.step in preserved_steps for checkpoint in checkpoints]
