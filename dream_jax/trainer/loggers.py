"""Where else a run's numbers go: TensorBoard, Weights & Biases, trackio, each imported only when it is asked for.

`metrics.csv` is written by `folder` in any case.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

LoggerName = Literal["tensorboard", "wandb", "trackio"]

PROJECT = "dream_jax"
RUN_ID = "logged_as.txt"
"""The file with the name of the run in these services, so that a run that is resumed is the same run there."""

_PACKAGES: Mapping[LoggerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Logger(Protocol):
    """Receives the numbers of each step."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Logs the numbers of one step, by name."""
        ...

    def flush(self) -> None:
        """Writes what is still buffered, if the library can be asked to."""
        ...

    def close(self) -> None:
        """Ends the log."""
        ...


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raises ModuleNotFoundError, with what to install, for a logger that is not installed; imports none."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ModuleNotFoundError(
                f"--log-to {name} needs the package {_PACKAGES[name]}: pip install {_PACKAGES[name]}, or leave {name} out"
            )


def open_loggers(
    names: Sequence[LoggerName], folder: pathlib.Path, config: Mapping[str, Any], done: int
) -> list[Logger]:
    """The loggers of a run.

    Args:
      names: which.
      folder: the run's.
      config: its settings.
      done: the step that the run resumes from; what was logged after it is removed where the library can do that.
    """
    return [_open(name, folder, config, done) for name in dict.fromkeys(names)]


def _open(name: LoggerName, folder: pathlib.Path, config: Mapping[str, Any], done: int) -> Logger:
    if name == "tensorboard":
        return _TensorBoard(folder, done)
    if name == "wandb":
        import wandb

        run_id = _run_id(folder)
        # resume: the run of this id when it is known there, else a new one.
        return _Service(
            wandb.init(
                project=PROJECT, id=run_id, name=folder.name, dir=str(folder), config=dict(config), resume="allow"
            )
        )
    import trackio

    # trackio knows a run by its name alone.
    return _Service(
        trackio.init(project=PROJECT, name=f"{folder.name}-{_run_id(folder)}", config=dict(config), resume="allow")
    )


def _run_id(folder: pathlib.Path) -> str:
    path = folder / RUN_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class _TensorBoard:
    def __init__(self, folder: pathlib.Path, done: int):
        from tensorboardX import SummaryWriter

        # Also from the first step on: a run may have been killed before its first checkpoint.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if math.isfinite(value):  # tensorboardX warns of other values
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service:
    """A run object of W&B or trackio: both have `log(numbers, step=...)` and `finish()`."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def flush(self) -> None:
        pass  # they send in threads of their own

    def close(self) -> None:
        self._run.finish()
