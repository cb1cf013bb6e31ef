"""The folder of a run: checking and locking it, and the files that are written into it during the run."""

from __future__ import annotations

import contextlib
import csv
import math
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np

from dream_jax.batch import Batch
from dream_jax.checkpoint import remove_unfinished
from dream_jax.data import RowSource, has_traces
from dream_jax.distributed import barrier, from_first
from dream_jax.files import CHECKSUMS, foreign_entries, is_disk_full, listed, naming_full_disk, replacing, write_json
from dream_jax.paths import check_apart, claimed, copy_companion
from dream_jax.pretrained.adapter import known_adapter_files
from dream_jax.pretrained.directories import known_files, published_config
from dream_jax.remat import Remat
from dream_jax.side_files import read_csv, read_json, read_json_value
from dream_jax.tokenizer import TOKENIZER_FILES, Template, Tokenizer, write_template
from dream_jax.train_step import NLL_BY_TIME
from dream_jax.trainer.loggers import open_loggers
from dream_jax.trainer.settings import FREE, TrainSettings

METRICS = (
    *("loss", "nll", "masked_accuracy", "learning_rate", "grad_norm", "num_masked"),
    *(*NLL_BY_TIME, "eos_accuracy", "skipped"),
)
"""The columns of `metrics.csv`, besides `step` and `tokens_per_second`."""
EVALUATED = ("nll", "nll_se", *NLL_BY_TIME, "masked_accuracy", "eos_accuracy", "num_masked", "rows")
"""The columns of `eval.csv`, besides `step` and `grid`."""
GRID = "grid"
"""The column of `eval.csv` with the first 12 hexadecimal digits of `Grid.digest`, which identifies the rows and masks
that were scored. Only scores with equal values may be compared."""

FORMATS = "answer_formats"
"""The key of `data.json` with the version of the answer formats, 2. Runs of version 0.1 of this project do not have it."""

REMAT = "remat"
"""The key of `data.json` with the rematerialisation policy of the run: with `auto` the policy that was chosen."""

# The files and folders that a run creates; --overwrite removes these and nothing else, if they hold nothing else (see
# `_check_removable`). settings.json is replaced after that, so that a folder whose removal was interrupted is still
# recognised as the folder of a run.
_MADE = (
    "metrics.csv",
    "eval.csv",
    "skipped",
    "summary.json",
    "data.json",
    "samples.json",
    "rollouts.jsonl",
    "reference.npz",
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


# The folder of a checkpoint, also of one that is damaged or unfinished.
_CHECKPOINT = re.compile(r"\d+(\.damaged|\.orbax-checkpoint-tmp.*)?", re.ASCII)


def check_folder(settings: TrainSettings) -> bool:
    """Returns whether the run's folder contains an unfinished run with these settings, which can be resumed.

    The answer is False if the folder is missing or empty, or may be overwritten. No file is changed.

    Raises:
      FileExistsError: without --overwrite the folder contains a finished run or a run with other settings; or it
        contains files that are not of a run; or --overwrite would remove files that no run has written.
      ValueError: the model, adapter, tokenizer or data of the run is in the folder that --overwrite would remove; or
        `settings.json` in it is not valid JSON.
    """
    if not settings.run.out.exists():
        return False
    if not settings.run.out.is_dir():
        raise FileExistsError(f"{settings.run.out} is a file; give another --out")
    if all(path.name == _LOCK for path in settings.run.out.iterdir()):
        return False
    before = _settings_in(settings.run.out)
    if before is None:
        raise FileExistsError(
            f"{settings.run.out} is not empty and holds no run (no settings.json of one); give another --out"
        )
    different = _differences(settings, before)
    if different is None:
        return True
    if not settings.run.overwrite:
        raise FileExistsError(f"{settings.run.out} holds {different}")
    values = settings.values()
    check_apart(settings.run.out, [values[name] for name in ("model", "tokenizer", "adapter")], "give another --out")
    # The folder of the data may contain the run, because a run removes nothing outside its folder.
    check_apart(settings.run.out, [values["data"], *settings.rows.mix], "give another --out", lies_in=False)
    _check_removable(settings.run.out)
    return False


def _check_removable(out: pathlib.Path) -> None:
    """Raises FileExistsError if the folders that --overwrite would remove hold something that no run has written."""
    steps = [path.name for path in (out / "checkpoints").glob("[0-9]*") if _CHECKPOINT.fullmatch(path.name)]
    # Orbax writes two files after the checksums. A checkpoint whose checksums are damaged is known by its folders.
    inside = ("state/*", "meta/*", CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")
    known = {
        *_MADE,
        *(f"checkpoints/{step}/{name}" for step in steps for name in inside),
        "skipped/step-*.npz",
        "tensorboard/events.out.tfevents.*",
        "wandb/*",
        *(f"tokenizer/{name}" for name in ("config.json", "generation_config.json", "*.py", *TOKENIZER_FILES)),
        *(f"model/{name}" for name in known_files(out / "model")),
        *(f"adapter/{name}" for name in known_adapter_files(out / "adapter")),
    }
    linked = [name for name in _MADE if (out / name).is_symlink()]
    if linked:  # what they lead to was put there by the user, and may be larger than the disk of the run
        raise FileExistsError(
            f"{out} holds {listed(linked)}, a link, which --overwrite would remove; remove it and what it leads to "
            "yourself, or give another --out"
        )
    if foreign := [name for name in foreign_entries(out, known) if name.partition("/")[0] in _MADE]:
        raise FileExistsError(
            f"{out} holds {listed(foreign)}, not written by a run, which --overwrite would remove; move that away, or give "
            "another --out"
        )


def _settings_in(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the contents of `settings.json`; None if the folder has no such file or it is not of a run."""
    path = folder / "settings.json"
    remedy = "this run cannot be resumed: restore the file from a copy, or give another --out"
    found = read_json_value(path, remedy) if path.is_file() else None
    return found if isinstance(found, dict) and {"mesh", "model", "data", "steps"} <= found.keys() else None


def _differences(settings: TrainSettings, before: Mapping[str, Any]) -> str | None:
    """Returns why the run in the folder cannot be resumed with these settings and what to do; None if it can."""
    if (settings.run.out / "summary.json").is_file():
        return "a finished run; pass --overwrite to delete it, or give another --out"
    # A setting that an earlier version did not have counts as its default.
    before = TrainSettings().plain() | dict(before)
    given = settings.plain()
    if _has_first_formats(settings.run.out):
        # What is "s1-0.1" now was called "s1". A run that was resumed, and ended before `data.json` was written, has the
        # new name in its settings.
        for plain in (before, given):
            plain["answer_format"] = str(plain["answer_format"]).removesuffix("-0.1")
        # Version 0.1 left fields out without a word that are refused now. If other rows result from --ignore-field, the
        # digest of the rows differs, and the checkpoint is refused.
        before["ignore_field"] = given["ignore_field"]
    if before["weight"] == given["weight"] != "cart":
        before["cart_p"] = given["cart_p"]  # it has no effect; earlier versions accepted it with every weight
    changed = [
        f"{name} was {before[name]!r}, now {value!r}"
        for name, value in given.items()
        if name not in FREE and before[name] != value
    ]
    if not changed:
        return None
    return (
        f"a run with other settings ({'; '.join(changed)}); "
        "give the same settings to resume it, pass --overwrite to delete it, or give another --out"
    )


def begun_remat(folder: pathlib.Path) -> Remat | None:
    """Returns the rematerialisation policy with which the run in a folder began; None if no file says it.

    Runs of versions that did not write it into `data.json` have it in their settings.
    """
    begun = None
    with contextlib.suppress(OSError, ValueError):  # a damaged data.json will be replaced
        begun = read_json(folder / "data.json").get(REMAT)
    if begun is None:
        begun = (_settings_in(folder) or {}).get("remat")
    return next((remat for remat in get_args(Remat) if remat == begun), None)


def check_answer_format(settings: TrainSettings, source: RowSource) -> None:
    """Checks that a run of version 0.1, which is resumed, goes on with the answer format that it began with.

    Args:
      settings: the settings of the run; its folder contains the run to resume.
      source: the rows that it trains on.

    Raises:
      ValueError: the rows have reasoning traces, and the settings have the answer format of a later version.
    """
    name = settings.rows.answer_format
    if not name.endswith("-0.1") and _has_first_formats(settings.run.out) and has_traces(source):
        raise ValueError(
            f"the run in {settings.run.out} was begun by version 0.1, whose answer format {name} is not the present "
            f"{name}; pass --answer-format {name}-0.1 to resume it as it began, or give another --out"
        )


def _has_first_formats(folder: pathlib.Path) -> bool:
    """Returns whether the run in a folder was begun by version 0.1, whose `data.json` has no version of the formats."""
    path = folder / "data.json"
    try:
        return path.is_file() and FORMATS not in read_json(path)
    except ValueError:
        return False  # The file is damaged and will be replaced; the checkpoints know the digest of the rows too.


_LOCK = ".lock"  # earlier versions left this file in the folder


@contextlib.contextmanager
def claimed_folder(settings: TrainSettings) -> Iterator[None]:
    """Locks the run's folder during the block, so that no other run can write to it.

    Creates the folder; removes the files of an earlier run, unless it is the run to resume; writes `settings.json`. All
    processes of the run must enter the block.

    Raises:
      FileExistsError, ValueError: as for `check_folder`.
      BlockingIOError: another process has locked the folder.
      OSError: the folder or a file in it cannot be written or removed. If the disk became full during the block, the
        message says what the same command will do next.
    """
    with contextlib.ExitStack() as stack, _explaining_full_disk(settings.run.out):
        resumes = check_folder(settings)
        barrier("trainer.looked")
        if jax.process_index() == 0:
            settings.run.out.mkdir(parents=True, exist_ok=True)
            remedy = "wait for it, or give another --out. To join several processes into one run, give --coordinator"
            stack.enter_context(claimed(settings.run.out, remedy))
            for left in settings.run.out.glob(".*.incomplete-*"):
                if left.is_file():  # a killed run was writing it
                    left.unlink()
            remove_unfinished(settings.run.out / "checkpoints")
            if not resumes:
                for name in _MADE:
                    if name == "settings.json":
                        continue  # replaced below, and never missing
                    path = settings.run.out / name
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            # Also written when a run is resumed, because the settings in `FREE` may have new values.
            write_json(settings.run.out / "settings.json", settings.plain())
        barrier("trainer.claimed")
        yield


@contextlib.contextmanager
def _explaining_full_disk(out: pathlib.Path) -> Iterator[None]:
    """Adds to an error about a full disk in the block how the run in the folder `out` can go on."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        steps = saved_steps(out)
        then = (
            f"resumes after step {steps[-1]}" if steps else "starts from the beginning, for there is no checkpoint yet"
        )
        raise OSError(
            error.errno,
            f"{error.strerror or error}. Complete checkpoints and the logs are kept, and nothing incomplete counts as a "
            f"checkpoint: make room on the disk of {out}, then the same command {then}",
        ) from error


def saved_steps(out: pathlib.Path) -> list[int]:
    """Returns the steps of which the folder of a run has a complete checkpoint, in ascending order."""
    folder = out / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
        if folder.is_dir()
        else []
    )


def holds_checkpoint(settings: TrainSettings) -> bool:
    """Returns whether the run's folder contains this run with a checkpoint to resume from. Raises as `check_folder`.

    All processes must call it, and get the answer of process 0: on a shared file system the others may see older files.
    """
    return bool(from_first(check_folder(settings) and bool(saved_steps(settings.run.out))))


class MetricsLog:
    """Writes the metrics of a run to `metrics.csv`, `eval.csv` and the loggers of the settings; for process 0 only.

    Opening it removes rows of steps after `done`, the step that the run resumes from (0 for a new run).
    """

    def __init__(self, settings: TrainSettings, done: int):
        folder = settings.run.out
        objective = settings.objective()
        columns, scores = (*METRICS, *objective.metrics), (*EVALUATED, *objective.evaluated)
        self._steps = _Table(folder / "metrics.csv", ("step", *columns, "tokens_per_second"), done)
        self._evaluations = _Table(folder / "eval.csv", ("step", *scores, GRID), done)
        self._loggers = open_loggers(settings.logs.log_to, folder, settings.plain(), done)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the metrics of one step, by name."""
        self._steps.write(step, row)
        self._send(step, row)

    def evaluated(self, step: int, row: Mapping[str, float], grid: str) -> None:
        """Writes the scores of one evaluation, by name; `grid` is the `Grid.digest` of the rows and masks."""
        self._evaluations.write(step, {**row, GRID: grid[:12]})
        self._send(step, {f"held_out/{name}": value for name, value in row.items()})

    def _send(self, step: int, row: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.write(step, row)

    def flush(self) -> None:
        """Flushes the loggers; the CSV files are flushed after every row."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Closes the CSV files and the loggers."""
        self._steps.close()
        self._evaluations.close()
        for logger in self._loggers:
            logger.close()


def read_table(path: pathlib.Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Returns the rows of `metrics.csv` or `eval.csv` as texts by column, without lines that were cut short.

    Args:
      path: path of the file; an empty list is returned if it does not exist.
      columns: columns that the file must have, besides `step`.

    Raises:
      ValueError: the file is no such table, a step is not a whole number, or another cell (except the digest of the grid)
        is neither empty nor a number.
    """
    if not path.is_file():
        return []
    remedy = "restore it from a copy, or move it away: its rows are then missing in the run"
    rows = read_csv(path, ("step", *columns), remedy)
    for number, row in enumerate(rows, 1):
        for name, text in row.items():
            good = text.isdecimal() and len(text) < 16 if name == "step" else name == GRID or _is_number(text)
            if not good:
                raise ValueError(f"{path}: {name} is {text!r:.80} in row {number}, which is not a number; {remedy}")
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


class _Table:
    """A CSV file with one row per step; opening it removes the rows of steps after `done`."""

    def __init__(self, path: pathlib.Path, fields: Sequence[str], done: int):
        self._path = path
        rows = [row for row in read_table(path) if int(row["step"]) <= done]
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, fields, extrasaction="ignore")

    def write(self, step: int, row: Mapping[str, float | str]) -> None:
        with naming_full_disk(self._path):
            # csv writes floats with repr, which is exact, so that two runs can be compared bit by bit.
            self._writer.writerow({"step": step, **row})
            self._file.flush()  # so that the row is not lost if the run is killed

    def close(self) -> None:
        self._file.close()


def last_losses(folder: pathlib.Path, number: int = 10) -> list[float | None]:
    """Returns the losses of the last `number` steps in `metrics.csv`, oldest first; None for NaN and infinity."""
    found = [float(row["loss"] or "nan") for row in read_table(folder / "metrics.csv", ("loss",))[-number:]]
    return [loss if math.isfinite(loss) else None for loss in found]


def save_batches(folder: pathlib.Path, batches: Mapping[int, Batch[np.ndarray]]) -> pathlib.Path:
    """Writes this process's rows of the given batches (by step) to `skipped/step-N.npz`, and returns that folder.

    A file has the arrays `tokens`, `maskable`, `row`, and `attention_mask` (`valid_BT` of `Batch`), `text_lengths` and
    `texts` (`length_BM` and `text_BM`), each if it is not None.
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
            if batch.length_BM is not None and batch.text_BM is not None:
                arrays |= {"text_lengths": batch.length_BM, "texts": batch.text_BM}
            np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes an array for the flag `allow_pickle`
    return target


def save_tokenizer(
    settings: TrainSettings, tokenizer: Tokenizer, source: str | None, template: Template, instruction: str = ""
) -> pathlib.Path:
    """Writes tokenizer, template and instruction to OUT/tokenizer, and returns that folder; all processes must call this.

    Also copies config files and *.py files from the directory `source`, which may be deleted before the run ends.
    """
    folder = settings.run.out / "tokenizer"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        write_template(folder, template, instruction)
        beside = pathlib.Path(source) if source else folder
        published_config(beside)  # raises its errors now, because the export at the end of the run reads the file
        for path in (beside / "config.json", beside / "generation_config.json", *beside.glob("*.py")):
            if path.is_file() and beside != folder:
                copy_companion(path, folder / path.name)
    barrier("trainer.tokenizer")
    return folder
