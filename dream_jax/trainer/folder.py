"""The folder of a run: which process may write it, which run it holds, and the files that are written while it runs."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dream_jax.batch import Batch
from dream_jax.distributed import barrier, from_first
from dream_jax.files import replacing, write_json
from dream_jax.tokenizer import Template, Tokenizer, write_template
from dream_jax.train_step import NLL_BY_TIME
from dream_jax.trainer.loggers import open_loggers
from dream_jax.trainer.settings import FREE, TrainSettings

METRICS = (
    *("loss", "nll", "masked_accuracy", "learning_rate", "grad_norm", "num_masked"),
    *(*NLL_BY_TIME, "eos_accuracy", "skipped"),
)
EVALUATED = ("nll", "nll_se", *NLL_BY_TIME, "masked_accuracy", "eos_accuracy", "num_masked", "rows")
GRID = "grid"
"""The column of `eval.csv` that says which rows and masks a score was taken on: the first characters of the digest."""

# What a run makes in its folder, and all that --overwrite removes. The settings are removed last, so that a removal that
# was cut short leaves the folder of a run.
_MADE = (
    "metrics.csv",
    "eval.csv",
    "skipped",
    "summary.json",
    "data.json",
    "samples.json",
    "incidents.jsonl",
    "parts.json",
    "report.md",
    "curves.png",
    "logged_as.txt",
    "tensorboard",
    "wandb",
    "checkpoints",
    "tokenizer",
    "adapter",
    "model",
    "settings.json",
)


def check_folder(settings: TrainSettings) -> bool:
    """Whether the run's folder holds this very run, which can be resumed. Changes nothing.

    Raises:
      FileExistsError: it holds something else: a finished run, a run with other settings, or no run at all.
      ValueError: what the run reads lies in the folder that it would overwrite.
    """
    if not settings.run.out.exists():
        return False
    if not settings.run.out.is_dir():
        raise FileExistsError(f"{settings.run.out} is a file; give another --out")
    if all(path.name == _LOCK for path in settings.run.out.iterdir()):
        return False
    before = _settings_in(settings.run.out)
    if before is None:
        raise FileExistsError(f"{settings.run.out} is not empty and holds no run; give another --out")
    different = _differences(settings, before)
    if different is None:
        return True
    if not settings.run.overwrite:
        raise FileExistsError(f"{settings.run.out} holds {different}")
    out = settings.run.out.resolve()
    values = settings.values()
    given_names = [(name, values[name]) for name in ("model", "data", "tokenizer", "adapter")]
    for name, given in [*given_names, *(("mix", path) for path in settings.rows.mix)]:
        read = pathlib.Path(given or "").expanduser().resolve()
        if given and read.exists() and out in (read, *read.parents):
            raise ValueError(
                f"--{name} {given} lies in {settings.run.out}, which --overwrite would remove; give another --out"
            )
    return False


def _settings_in(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / "settings.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}), so this run cannot be resumed; give another --out"
        ) from error
    return found if isinstance(found, dict) and {"mesh", "model", "data", "steps"} <= found.keys() else None


def _differences(settings: TrainSettings, before: Mapping[str, Any]) -> str | None:
    """Why the run in the folder cannot be resumed with these settings, and what to do; None when it can."""
    if (settings.run.out / "summary.json").is_file():
        return "a finished run; pass --overwrite to throw it away, or another --out"
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in settings.plain().items()
        if name not in FREE and before.get(name) != value
    ]
    if not changed:
        return None
    return (
        f"a run with other settings ({'; '.join(changed)}); "
        "repeat its settings to resume it, pass --overwrite to throw it away, or give another --out"
    )


_LOCK = ".lock"


@contextlib.contextmanager
def claimed_folder(settings: TrainSettings) -> Iterator[None]:
    """Makes the run's folder anew, unless it holds the run to resume; while the block runs no other run can have it.

    Raises:
      As `check_folder`; BlockingIOError when another run has the folder.
    """
    with contextlib.ExitStack() as stack:
        resumes = check_folder(settings)
        barrier("trainer.looked")
        if jax.process_index() == 0:
            settings.run.out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(settings.run.out / _LOCK, "w", encoding="utf-8"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it however this process ends
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"another process is writing the run in {settings.run.out}; wait for it, or give another --out. "
                    "Processes of one run are joined by --coordinator"
                ) from error
            if not resumes:
                for name in _MADE:
                    path = settings.run.out / name
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            # Some settings of a run that is resumed may be new: those of `FREE`.
            write_json(settings.run.out / "settings.json", settings.plain())
        barrier("trainer.claimed")
        yield


def holds_checkpoint(settings: TrainSettings) -> bool:
    """Whether the run's folder holds this very run, with a checkpoint to resume from. Raises as `check_folder`.

    As the first process sees it: a shared disk may show the others something older.
    """
    folder = settings.run.out / "checkpoints"
    found = check_folder(settings) and folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())
    return bool(from_first(found))


class MetricsLog:
    """`metrics.csv`, `eval.csv` and the loggers asked for. Rows after the step that a run resumes from are dropped."""

    def __init__(self, settings: TrainSettings, done: int):
        folder = settings.run.out
        self._steps = _Table(folder / "metrics.csv", ("step", *METRICS, "tokens_per_second"), done)
        self._evaluations = _Table(folder / "eval.csv", ("step", *EVALUATED, GRID), done)
        self._loggers = open_loggers(settings.logs.log_to, folder, settings.plain(), done)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the row of one step."""
        self._steps.write(step, row)
        self._send(step, row)

    def evaluated(self, step: int, row: Mapping[str, float], grid: str) -> None:
        """Adds the row of one evaluation on held-out data; `grid` is the digest of what it was taken on."""
        self._evaluations.write(step, {**row, GRID: grid[:12]})
        self._send(step, {f"held_out/{name}": value for name, value in row.items()})

    def _send(self, step: int, row: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.write(step, row)

    def flush(self) -> None:
        """Hands everything to the system."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Closes all."""
        self._steps.close()
        self._evaluations.close()
        for logger in self._loggers:
            logger.close()


class _Table:
    """A CSV file with a row a step, each on the disk as soon as it is written."""

    def __init__(self, path: pathlib.Path, fields: Sequence[str], done: int):
        rows = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= done]
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, fields, extrasaction="ignore")

    def write(self, step: int, row: Mapping[str, float | str]) -> None:
        # repr of a float32 read as float64 is exact, so that runs can be compared to the last bit.
        self._writer.writerow({"step": step, **row})
        self._file.flush()  # also for a run that is killed

    def close(self) -> None:
        self._file.close()


def last_losses(folder: pathlib.Path, number: int = 10) -> list[float | None]:
    """The losses of the last steps in `metrics.csv`, oldest first; None where a loss was no number."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        found = [float(row["loss"]) for row in csv.DictReader(file)][-number:]
    return [loss if math.isfinite(loss) else None for loss in found]


def save_batches(folder: pathlib.Path, batches: Mapping[int, Batch[np.ndarray]]) -> pathlib.Path:
    """Keeps this process's rows of the batches of some steps as `skipped/step-N.npz`, to be looked at.

    A file holds `tokens`, `maskable`, `row`, and `attention_mask` where not every position is valid; see `Batch`.
    """
    target = folder / "skipped"
    target.mkdir(exist_ok=True)
    suffix = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
    for step, batch in batches.items():
        path = target / f"step-{step}{suffix}.npz"
        with replacing(path) as temporary, temporary.open("wb") as file:
            arrays = {"tokens": batch.tokens_BT, "maskable": batch.maskable_BT, "row": batch.row_B}
            if batch.valid_BT is not None:
                arrays["attention_mask"] = batch.valid_BT
            np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes an array for the flag `allow_pickle`
    return target


def save_tokenizer(
    settings: TrainSettings, tokenizer: Tokenizer, source: str | None, template: Template
) -> pathlib.Path:
    """Copies what belongs with the weights into the run's folder, since the original may be gone when the run ends."""
    folder = settings.run.out / "tokenizer"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        write_template(folder, template)
        beside = pathlib.Path(source) if source else folder
        for path in (beside / "config.json", beside / "generation_config.json", *beside.glob("*.py")):
            if path.is_file() and beside != folder:
                shutil.copyfile(path, folder / path.name)
    barrier("trainer.tokenizer")
    return folder
