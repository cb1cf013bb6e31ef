"""A run's folder read back, whether the run is finished or not: the input of reports, comparisons and model cards."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dream_jax.trainer.folder import GRID
from dream_jax.trainer.incidents import read_incidents
from dream_jax.trainer.samples import read_samples
from dream_jax.trainer.segments import RunSegment, read_segments
from dream_jax.trainer.settings import TrainSettings

LAST = 10
"""How many of the last steps a final number is the mean of."""

MetricRows = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a run.

    Attributes:
      folder: of the run.
      settings: all of them, as JSON holds them.
      summary: the contents of `summary.json`; empty for a run that is not finished.
      data: the contents of `data.json`: `rows` and `batches`; empty before the first step.
      steps: one row for each step, numbers by name; NaN where the file holds no number.
      evaluations: the same for each evaluation during the run.
      grids: for each evaluation what it was taken on; only scores with equal entries may be compared.
      segments: how long each start of the command held the hardware.
      samples, incidents: see their modules.
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
    incidents: Sequence[Mapping[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether all steps were taken and the result was written."""
        return bool(self.summary)

    @property
    def alike(self) -> MetricRows:
        """The evaluations that were taken on the same rows and masks as the last one."""
        return [row for row, grid in zip(self.evaluations, self.grids, strict=True) if grid == self.grids[-1]]

    def best(self) -> Mapping[str, float] | None:
        """The evaluation with the lowest nll among those of `alike`; None where none has a finite nll."""
        rows = [row for row in self.alike if math.isfinite(row["nll"])]
        return min(rows, key=lambda row: row["nll"], default=None)

    def last(self, name: str) -> float:
        """The mean of a metric over the last steps; NaN where it was never a number."""
        found = [row[name] for row in self.steps[-LAST:] if name in row and math.isfinite(row[name])]
        return statistics.fmean(found) if found else math.nan

    def tokens_per_second(self) -> float:
        """Positions a second in the median step, without the first, which compiles; NaN for fewer than two steps."""
        found = [row["tokens_per_second"] for row in self.steps[1:] if "tokens_per_second" in row]
        return statistics.median(found) if found else math.nan

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        defaults = TrainSettings().plain()
        return {name: value for name, value in self.settings.items() if name not in defaults or value != defaults[name]}


def read_record(folder: pathlib.Path) -> Record:
    """Reads a folder.

    Raises:
      FileNotFoundError: there is no run in the folder.
      ValueError: a file of it is damaged.
    """
    if not (folder / "settings.json").is_file():
        raise FileNotFoundError(f"{folder} holds no settings.json: it is not the folder of a run")
    evaluations = _table(folder / "eval.csv")
    return Record(
        folder=folder,
        settings=_json(folder / "settings.json"),
        summary=_json(folder / "summary.json"),
        data=_json(folder / "data.json"),
        steps=[{name: _number(value) for name, value in row.items()} for row in _table(folder / "metrics.csv")],
        evaluations=[{name: _number(value) for name, value in row.items() if name != GRID} for row in evaluations],
        grids=[row.get(GRID, "") for row in evaluations],
        segments=read_segments(folder),
        samples=read_samples(folder),
        incidents=read_incidents(folder),
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _table(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; what would end a cell is escaped."""
    lines = [list(head), ["---"] * len(head), *([shown(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
