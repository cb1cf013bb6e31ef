"""Optional loggers for the metrics of a run: TensorBoard, Weights & Biases and trackio.

A library is imported only if its logger is requested. `metrics.csv` is always written, by `dream_jax.trainer.folder`.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

LoggerName = Literal["tensorboard", "wandb", "trackio"]

PROJECT = "dream_jax"
"""The name of the project in W&B and trackio."""
RUN_ID = "logged_as.txt"
"""The file in the run's folder with the id of the run in W&B and trackio, so that a resumed run continues
the same log."""

_PACKAGES: Mapping[LoggerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Logger(Protocol):
    """A destination for the metrics of each step."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Logs the metrics of one step, by name; values may be NaN or infinite."""
        ...

    def flush(self) -> None:
        """Writes buffered metrics, if the library has a function for it."""
        ...

    def close(self) -> None:
        """Writes buffered metrics and closes the log; no method may be called afterwards."""
        ...


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raises ModuleNotFoundError, with the package to install, if a logger is not installed; imports no package."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ModuleNotFoundError(
                f"--log-to {name} needs the package {_PACKAGES[name]}: pip install {_PACKAGES[name]}, or leave {name} out"
            )


def open_loggers(
    names: Sequence[LoggerName], folder: pathlib.Path, config: Mapping[str, Any], done: int
) -> list[Logger]:
    """Opens the named loggers, and returns them in order without duplicates.

    Args:
      names: the loggers to open.
      folder: the folder of the run; its name is the name of the run in the services.
      config: the settings of the run, which the services show beside the curves.
      done: the last step that is done, 0 for a new run. TensorBoard's entries after it are removed; W&B and trackio
        cannot remove entries.
    """
    return [_open(name, folder, config, done) for name in dict.fromkeys(names)]


def _open(name: LoggerName, folder: pathlib.Path, config: Mapping[str, Any], done: int) -> Logger:
    if name == "tensorboard":
        return _TensorBoard(folder, done)
    if name == "wandb":
        import wandb

        run_id = _run_id(folder)
        # resume="allow" continues the run with this id if W&B knows it, and begins a new one otherwise.
        return _Service(
            wandb.init(
                project=PROJECT, id=run_id, name=folder.name, dir=str(folder), config=dict(config), resume="allow"
            )
        )
    import trackio

    # trackio has no ids: runs with equal names are one run, so the name contains our id.
    return _Service(
        trackio.init(project=PROJECT, name=f"{folder.name}-{_run_id(folder)}", config=dict(config), resume="allow")
    )


def _run_id(folder: pathlib.Path) -> str:
    """Returns the id of the run in the services: 8 hexadecimal digits, drawn and stored at the first call."""
    path = folder / RUN_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    found = path.read_text(encoding="utf-8", errors="replace").strip()
    if re.fullmatch("[0-9a-f]{8}", found) is None:
        raise ValueError(
            f"{path} holds {found!r:.80}, not 8 hexadecimal digits; restore it, or remove it to log as another run"
        )
    return found


class _TensorBoard:
    """Writes metrics as TensorBoard scalars to FOLDER/tensorboard."""

    def __init__(self, folder: pathlib.Path, done: int):
        from tensorboardX import SummaryWriter

        # purge_step removes later entries; also at done = 0: a run killed before its first checkpoint has left some.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if math.isfinite(value):  # tensorboardX prints a warning for NaN and infinity
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service:
    """Logs to W&B or trackio, whose run objects both have `log(metrics, step=...)` and `finish()`."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def flush(self) -> None:
        pass  # W&B and trackio send metrics from background threads

    def close(self) -> None:
        self._run.finish()
