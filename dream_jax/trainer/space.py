"""The space on the disk that a run needs for its checkpoints and for the model that it exports at its end."""

from __future__ import annotations

import errno
import math
import pathlib
import shutil

from dream_jax.trainer.folder import saved_steps
from dream_jax.trainer.settings import TrainSettings


def check_space(settings: TrainSettings, state_bytes: int, export_bytes: int, *, evaluates: bool, resumes: bool) -> str:
    """Compares the space that a run needs with the free space, before the run changes a file.

    Args:
      settings: the settings of the run.
      state_bytes: size of the state, which every checkpoint contains.
      export_bytes: size of the model or adapter that is written at the end.
      evaluates: whether the run has evaluations, after which the best state gets a checkpoint of its own.
      resumes: whether the run continues from a checkpoint in its folder. Otherwise the files in its folder are removed.

    Returns:
      A line for the user, which begins with "warning: " if the disk may become full later.

    Raises:
      OSError: the first checkpoint of this command does not fit on the disk.
    """
    run, out = settings.run, settings.run.out
    steps = saved_steps(out) if resumes else []
    saves = math.ceil(run.steps / run.save_every)
    if evaluates:
        saves += math.ceil(run.steps / settings.evaluation.eval_every)
    # A new checkpoint is complete before an old one is deleted.
    most = min(saves, run.keep + 1 + evaluates)
    disk = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free + (0 if resumes else _size(out))
    # The checkpoints that exist already need no more space: only those that are still to come do.
    needed = max(0, most - len(steps)) * state_bytes + export_bytes
    text = (
        f"a checkpoint takes about {_gigabytes(state_bytes)}, up to {most} at a time, and the result "
        f"{_gigabytes(export_bytes)}; {_gigabytes(free)} are free on the disk of {out}"
    )
    if free < state_bytes and not (steps and steps[-1] >= run.steps):
        raise OSError(
            errno.ENOSPC, f"not even one checkpoint fits on the disk: {text}. Make room, or give another --out"
        )
    if free < needed:
        return (
            f"warning: the disk may become full: {text}. Make room in time, or give a smaller --keep or another --out"
        )
    return text


def _size(folder: pathlib.Path) -> int:
    """Returns the number of bytes of all files in a folder; 0 if it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB"
