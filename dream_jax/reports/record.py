"""Reads the folder of a run, finished or not, as a `Record`: the input of reports, comparisons and model cards."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dream_jax.files import read_json, typed
from dream_jax.posttraining.rollout_file import RolloutRecord, read_rollouts
from dream_jax.trainer.folder import GRID, read_table
from dream_jax.trainer.incidents import read_incidents
from dream_jax.trainer.samples import read_samples
from dream_jax.trainer.segments import RunSegment, read_segments
from dream_jax.trainer.setting_groups import Currency
from dream_jax.trainer.settings import TrainSettings

LAST = 10
"""Number of last steps over which `Record.last` takes the mean."""

_REMEDY = "restore it, or move it away"

MetricRows = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of the folder of a run.

    Attributes:
      folder: the folder.
      settings: the contents of `settings.json`: all settings by the names of their flags.
      summary: the contents of `summary.json`; empty for a run that is not finished.
      data: the contents of `data.json`: `rows`, `batches` and `sources`; empty before the first step.
      steps: the rows of `metrics.csv`: one per step, numbers by name; NaN for an entry that is not a number.
      evaluations: the rows of `eval.csv` in the same form: one per evaluation during the run.
      grids: for each evaluation the digest of rows and masks; only scores with equal digests may be compared.
      segments: the contents of `parts.json`: the time of each start of the command.
      samples: the contents of `samples.json`; empty without samples.
      rollouts: the lines of `rollouts.jsonl`; empty for a run without rewards.
      incidents: the contents of `incidents.jsonl`.
    """

    folder: pathlib.Path
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: MetricRows
    evaluations: MetricRows
    grids: Sequence[str]
    segments: Sequence[RunSegment]
    samples: Mapping[str, Any]
    rollouts: Sequence[RolloutRecord]
    incidents: Sequence[Mapping[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether all steps were taken and `summary.json` was written."""
        return bool(self.summary)

    @property
    def alike(self) -> MetricRows:
        """The evaluations on the same rows and masks as the last evaluation."""
        return [row for row, grid in zip(self.evaluations, self.grids, strict=True) if grid == self.grids[-1]]

    def best(self) -> Mapping[str, float] | None:
        """Returns the evaluation with the lowest nll in `alike`; None if no nll is finite."""
        rows = [row for row in self.alike if math.isfinite(row["nll"])]
        return min(rows, key=lambda row: row["nll"], default=None)

    def last(self, name: str) -> float:
        """Returns the mean of the finite values of a metric in the last `LAST` steps; NaN if there are none."""
        found = [row[name] for row in self.steps[-LAST:] if name in row and math.isfinite(row[name])]
        return statistics.fmean(found) if found else math.nan

    def tokens_per_second(self) -> float:
        """Returns the median number of positions per second of all steps but the first, which compiles; NaN if none."""
        found = [row["tokens_per_second"] for row in self.steps[1:] if "tokens_per_second" in row]
        return statistics.median(found) if found else math.nan

    def changed(self) -> dict[str, Any]:
        """Returns the settings that differ from their defaults."""
        defaults = TrainSettings().plain()
        return {name: value for name, value in self.settings.items() if name not in defaults or value != defaults[name]}


def read_record(folder: pathlib.Path) -> Record:
    """Reads the folder of a run.

    Raises:
      FileNotFoundError: the folder has no `settings.json`.
      ValueError: a file in it is damaged.
    """
    if not (folder / "settings.json").is_file():
        raise FileNotFoundError(f"{folder} holds no settings.json: it is not the folder of a run")
    evaluations = read_table(folder / "eval.csv", ("nll",))
    summary = _json(folder / "summary.json", _Summary)
    typed(summary.get("eval", {}), _Evaluated, f"{folder / 'summary.json'}: eval", _REMEDY)
    return Record(
        folder=folder,
        settings=_json(folder / "settings.json", _Settings),
        summary=summary,
        data=_json(folder / "data.json", _Data),
        steps=[{name: _number(value) for name, value in row.items()} for row in read_table(folder / "metrics.csv")],
        evaluations=[{name: _number(value) for name, value in row.items() if name != GRID} for row in evaluations],
        grids=[row.get(GRID, "") for row in evaluations],
        segments=read_segments(folder),
        samples=read_samples(folder),
        rollouts=read_rollouts(folder),
        incidents=read_incidents(folder),
    )


# The entries that reports use, with their types. The files may have further entries.


class _Settings(msgspec.Struct):
    """The entries of `settings.json`."""

    model: str
    data: str
    steps: int
    batch_size: int
    recipe: str | None = None
    mix: list[str] = []
    eval_rows: int | None = None
    price_per_chip_hour: float | None = None
    currency: Currency | None = None
    rmb_per_usd: float | None = None


class _Cost(msgspec.Struct):
    """The entry `cost` of `summary.json`; see `Cost`."""

    chips: int
    chip_hours: float
    usd_per_chip_hour: float | None
    usd: float | None
    rmb: float | None


class _Evaluated(msgspec.Struct):
    """The entry of `eval` in `summary.json` that reports compute with; the others are only shown."""

    rows: int | None = None


class _Summary(msgspec.Struct):
    """The entries of `summary.json`."""

    seconds: float
    devices: str
    eval: dict[str, str | float | None] = {}
    cost: _Cost | None = None
    step: int | None = None
    learning_rate: float | None = None


class _Rows(msgspec.Struct):
    """The entry `rows` of `data.json`; see `LengthReport`."""

    kept: int
    dropped: int
    reasons: dict[str, int]
    filtered: dict[str, int]
    bad: list[str]
    whole: int
    cut: int
    shortest: int
    mean: float
    longest: int
    max_length: int
    histogram: dict[str, int]
    digest: str
    unread: dict[str, int] = {}
    ignored: dict[str, int] = {}


class _Outlook(msgspec.Struct):
    """The entry `batches` of `data.json`; see `Outlook`."""

    epochs: float
    eos_share: float
    padding_share: float
    whole_share: float
    texts_per_row: float = 1.0


class _Data(msgspec.Struct):
    """The entries of `data.json`."""

    rows: _Rows
    batches: _Outlook
    sources: dict[str, str] = {}


def _json(path: pathlib.Path, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Returns the object in a JSON file, whose entries must have the types of `kind`; an empty dict without the file."""
    if not path.is_file():
        return {}
    found = read_json(path, _REMEDY)
    typed(found, kind, path, _REMEDY)
    return found


def _number(text: str) -> float:
    return float(text or "nan")


def shown(value: Any) -> str:
    """Returns the text of a value in a table: 5 significant digits for a float, "-" for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a Markdown table; characters that would end a cell are escaped."""
    lines = [list(head), ["---"] * len(head), *([shown(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    """Escapes the characters that would end a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
