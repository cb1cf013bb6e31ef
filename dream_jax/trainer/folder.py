"""The folder of a run: who may write it, and what is in it.

Knows files. Knows nothing of steps or models.
"""

from __future__ import annotations

import csv
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

from dream_jax.tokenizer import Tokenizer
from dream_jax.trainer.settings import FREE, TrainSettings

METRICS = ("loss", "nll", "masked_accuracy", "learning_rate", "grad_norm", "num_masked")

# What a run makes in its folder, and all that --overwrite removes.
_MADE = ("settings.json", "metrics.csv", "summary.json", "tensorboard", "checkpoints", "tokenizer", "model")


def check_folder(settings: TrainSettings) -> bool:
    """Whether the run's folder holds the run to go on with. Changes nothing.

    Raises:
      FileExistsError: it holds something else: a finished run, a run with other settings, or no run at all.
      ValueError: what the run reads lies in the folder that it would overwrite.
    """
    if not settings.out.exists() or not any(settings.out.iterdir()):
        return False
    known = settings.out / "settings.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
    if not isinstance(before, dict) or not {"mesh", "model", "data", "steps"} <= before.keys():
        raise FileExistsError(f"{settings.out} is not empty and holds no run; give another --out")
    if not settings.overwrite:
        _check_same_run(settings, before)
        return True
    out = settings.out.resolve()
    for name in ("model", "data", "tokenizer"):
        given = getattr(settings, name)
        read = pathlib.Path(given or "").expanduser().resolve()
        if given and read.exists() and out in (read, *read.parents):
            raise ValueError(
                f"--{name} {given} lies in {settings.out}, which --overwrite would remove; give another --out"
            )
    return False


def claim_folder(settings: TrainSettings) -> None:
    """Makes the run's folder, unless it holds the run to go on with. Raises as `check_folder`."""
    going_on = check_folder(settings)
    together("looked")
    if jax.process_index() == 0 and not going_on:
        settings.out.mkdir(parents=True, exist_ok=True)
        for name in _MADE:
            path = settings.out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_json(settings.out / "settings.json", settings.plain())
    together("claimed")


def _check_same_run(settings: TrainSettings, before: Mapping[str, Any]) -> None:
    if (settings.out / "summary.json").is_file():
        raise FileExistsError(
            f"{settings.out} holds a finished run; pass --overwrite to throw it away, or another --out"
        )
    now = settings.plain()
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if name not in FREE and before.get(name) != value
    ]
    if changed:
        raise FileExistsError(
            f"{settings.out} holds a run with other settings ({'; '.join(changed)}); "
            "repeat its settings to go on, pass --overwrite to throw it away, or give another --out"
        )


def holds_checkpoint(settings: TrainSettings) -> bool:
    """Whether the run's folder holds this very run, with a checkpoint to go on from. Raises as `check_folder`."""
    folder = settings.out / "checkpoints"
    return check_folder(settings) and folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


class MetricsLog:
    """`metrics.csv` and TensorBoard. Rows after the step that the run goes on from are dropped first."""

    fields = ("step", *METRICS, "tokens_per_second")

    def __init__(self, folder: pathlib.Path, done: int):
        path = folder / "metrics.csv"
        rows = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= done]
        temporary = path.with_name(".metrics.csv.incomplete")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.fields, extrasaction="ignore")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the row of one step."""
        # repr of a float32 read as float64 is exact, so that runs can be compared to the last bit.
        self._writer.writerow({"step": step, **row})
        self._file.flush()  # a row a step, also for a run that is killed
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hands everything to the system."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Closes both."""
        self._file.close()
        self._board.close()


def last_losses(folder: pathlib.Path, number: int = 10) -> list[float]:
    """The losses of the last steps in `metrics.csv`, oldest first."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)][-number:]


def save_tokenizer(settings: TrainSettings, tokenizer: Tokenizer, source: str | None) -> pathlib.Path:
    """Keeps what must travel with the weights beside them: the original may be gone when the run ends."""
    folder = settings.out / "tokenizer"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        beside = pathlib.Path(source) if source else folder
        for path in (beside / "config.json", beside / "generation_config.json", *beside.glob("*.py")):
            if path.is_file() and beside != folder:
                shutil.copyfile(path, folder / path.name)
    together("tokenizer")
    return folder


def together(what: str) -> None:
    """Waits until every process of the run is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dream_jax.trainer.{what}")
