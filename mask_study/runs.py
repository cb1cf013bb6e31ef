"""The runs of a study: making those that are missing, and the tables of all of them.

A study writes one file per run, so that one that was stopped resumes, and a larger study begins with the runs of a smaller
one. Several processes may share a folder: each takes the runs that no other process has locked. `Study.pack` puts the
files of finished runs together into one table, `runs.jsonl`, which is read like the files.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scipy import stats

from dream_jax.files import replacing, write_file
from mask_study.caching import cached_against_computed
from mask_study.measures import Measured, measure
from mask_study.tasks import TASKS
from mask_study.training import BATCH, rows_of, tokenizer, train
from mask_study.variants import MASKS, VARIANTS

PACKED, RESULTS, SUMMARY, DIFFERENCES = "runs.jsonl", "results.csv", "summary.csv", "differences.csv"
BASELINES = ("bidirectional", "causal")
_CACHED_ROWS = 64

_Z_95 = float(stats.norm.ppf(0.975))


@dataclasses.dataclass(frozen=True, order=True)
class StudyRun:
    """One model: what it learns, how, and from which seed."""

    task: str
    variant: str
    seed: int

    @property
    def file(self) -> str:
        """The name of the file that has its numbers."""
        words = f"{self.task} {self.variant} seed {self.seed}"
        return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in words) + ".json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Which runs a study consists of.

    Attributes:
      tasks, variants: names.
      seeds: number of seeds; they are 0, 1, ...
      length: training steps, as a share of each task's own number.
      test_rows: examples that each model answers.

    Raises:
      ValueError: an unknown name, or a number out of range.
    """

    tasks: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: int = 3
    length: float = 1.0
    test_rows: int = 256

    def __post_init__(self) -> None:
        for kind, asked, known in (("task", self.tasks, TASKS), ("variant", self.variants, VARIANTS)):
            for name in asked:
                if name not in known:
                    raise ValueError(f"{kind} {name!r} is not one of: {'; '.join(known)}")
        if not self.tasks or not self.variants or self.seeds < 1 or not self.length > 0:
            raise ValueError(f"nothing to do: {self}")
        if not 1 <= self.test_rows <= 1024:
            raise ValueError(f"{self.test_rows=} must be between 1 and 1024")

    def steps(self, task: str) -> int:
        """Training steps of each run on the task."""
        return max(1, round(self.length * TASKS[task].steps))

    def runs(self) -> list[StudyRun]:
        """All runs: variants that differ in the mask alone first, and of these all of one seed before the next.

        A study that is stopped early can then already compare the masks.
        """
        masks_first = sorted(self.variants, key=lambda name: name not in MASKS)
        asked = [
            (variant not in MASKS, seed, task, variant)
            for variant in masks_first
            for seed in range(self.seeds)
            for task in self.tasks
        ]
        asked.sort(key=lambda one: one[:2])
        return [StudyRun(task, variant, seed) for _, seed, task, variant in asked if _is_informative(task, variant)]


def _is_informative(task: str, variant: str) -> bool:
    # Only countdown has answers of several widths, and so padding to hide. The other variants beside the masks run on the
    # tasks on which masks were found to differ most.
    if task == "scattered sudoku":
        return variant in ("bidirectional", "block-causal:4")
    if variant == "pads hidden":
        return task == "countdown"
    if variant.startswith("block-causal:16"):
        return task == "sudoku"
    if "unshifted" in variant:
        return task in ("addition", "sudoku")
    return variant in MASKS or task == "addition"


def _read_packed(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run_of(record: dict[str, Any]) -> StudyRun:
    return StudyRun(record["task"], record["variant"]["name"], record["seed"])


class Study:
    """The runs of a plan, kept in a folder.

    Attributes:
      folder: holds `runs/`, one file per run, or `runs.jsonl`, one line per run, or both.
      plan: the runs that belong to the study.
    """

    def __init__(self, folder: pathlib.Path, plan: StudyPlan):
        """Raises FileExistsError where the folder holds runs of another length or number of test rows."""
        self.folder, self.plan = folder, plan
        self._packed = {_run_of(record): record for record in _read_packed(folder / PACKED)}
        for run in plan.runs():
            found = self._read(run)
            if found is not None and self._settings(run) != found["settings"]:
                raise FileExistsError(
                    f"{folder} holds {run.file} with {found['settings']}, not {self._settings(run)}; give another --out"
                )

    def missing(self) -> list[StudyRun]:
        """Runs that are not there yet."""
        return [run for run in self.plan.runs() if run not in self._packed and not self._path(run).is_file()]

    def work(self, told: Callable[[StudyRun, float], None]) -> None:
        """Makes the missing runs that no other process is making.

        Args:
          told: called after each run, with the run and the seconds of its training.
        """
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for run in self.missing():
            path = self._path(run)
            with open(path.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another process is making it
                if not path.is_file():
                    told(run, self._make(run))
                path.with_suffix(".lock").unlink(missing_ok=True)

    def _make(self, run: StudyRun) -> float:
        task, variant = TASKS[run.task], VARIANTS[run.variant]
        trained = train(task, variant, run.seed, self.plan.steps(run.task))
        examples = task.examples("test", 0, self.plan.test_rows)
        found = list(measure(trained.model, task, variant, examples, run.seed))
        if variant.shift and not variant.hide_pads:
            rows_RT = rows_of(examples[:_CACHED_ROWS], tokenizer())
            errors = cached_against_computed(trained.model, rows_RT, task.prompt_width)
            found += [Measured("kept keys", name, 0.0, value) for name, value in errors._asdict().items()]
        text = json.dumps(
            {
                "task": run.task,
                "variant": dataclasses.asdict(variant),
                "seed": run.seed,
                "settings": self._settings(run),
                "seconds": round(trained.seconds, 1),
                "training_nll": [round(value, 5) for value in trained.nll],
                "measured": [[*one[:3], round(one.value, 9)] for one in found],
            },
            allow_nan=False,
        )
        write_file(self._path(run), text + "\n")
        return trained.seconds

    def _settings(self, run: StudyRun) -> dict[str, int]:
        return {"steps": self.plan.steps(run.task), "batch": BATCH, "test_rows": self.plan.test_rows}

    def _path(self, run: StudyRun) -> pathlib.Path:
        return self.folder / "runs" / run.file

    def _read(self, run: StudyRun) -> dict[str, Any] | None:
        path = self._path(run)
        if not path.is_file():
            return self._packed.get(run)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def pack(self) -> pathlib.Path:
        """Moves the files of `runs/` into `runs.jsonl`, one line per run, those of other plans included.

        The table is written before the files are removed. A run that is in both keeps the numbers of its file.

        Raises:
          ValueError: there are no runs.
        """
        files = sorted((self.folder / "runs").glob("*.json"))
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        self._packed |= {_run_of(record): record for record in records}
        if not self._packed:
            raise ValueError(f"{self.folder} has no run to put into {PACKED}")
        lines = (json.dumps(self._packed[run], allow_nan=False) + "\n" for run in sorted(self._packed))
        path = self.folder / PACKED
        write_file(path, "".join(lines))
        for file in files:
            file.unlink()
        return path

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per number of every run of the plan that is there."""
        for run in self.plan.runs():
            found = self._read(run)
            if found is None:
                continue
            learned = ("training nll", "last twentieth", 0.0, found["training_nll"][-1])
            for name, of, passes, value in (*found["measured"], learned):
                rows = found["settings"]["test_rows"]
                numbers = {"measure": name, "of": of, "passes": passes, "value": value, "test_rows": rows}
                yield dataclasses.asdict(run) | numbers

    def write_tables(self) -> list[pathlib.Path]:
        """Writes `results.csv`, a row per number and seed, `summary.csv`, over the seeds, and `differences.csv`, by seed.

        Raises:
          ValueError: there are no runs.
        """
        rows = list(self.rows())
        if not rows:
            raise ValueError(f"{self.folder} has no run of this plan yet")
        written = [write_table(self.folder / RESULTS, rows), write_table(self.folder / SUMMARY, summarise(rows))]
        different = differences(rows)
        if different:
            return [*written, write_table(self.folder / DIFFERENCES, different)]
        (self.folder / DIFFERENCES).unlink(missing_ok=True)  # of other runs
        return written


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over seeds of each number, with a 95 % interval.

    The interval is Student's t over the seeds. For a share of right answers it is at least as wide as Wilson's interval
    over the test rows, which all seeds share: three models that answer every row have not shown that they are always
    right. For a single seed the interval is NaN.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["variant"], row["measure"], row["of"]].append(row)
    found = []
    for (task, variant, name, of), members in groups.items():
        values = [float(member["value"]) for member in members]
        mean = sum(values) / len(values)
        low = high = math.nan
        if len(values) > 1:
            half = _half_width(values)
            low, high = mean - half, mean + half
            if name == "accuracy":
                rows_low, rows_high = _wilson(mean, float(members[0]["test_rows"]))
                low, high = max(0.0, min(low, rows_low)), min(1.0, max(high, rows_high))
        passes = sum(float(member["passes"]) for member in members) / len(members)
        numbers = {"passes": passes, "seeds": len(values), "mean": mean, "low": low, "high": high}
        found.append({"task": task, "variant": variant, "measure": name, "of": of} | numbers)
    return found


def differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences seed by seed: variants minus the bidirectional and the causal one, orders minus that by confidence.

    Each has its mean and a 95 % interval by Student's t. Variants of one seed share initial weights, rows, order and noise,
    and all answer the same test rows, so what they share does not widen these intervals, as it would widen those of two
    means. Only seeds that both sides have are used, at least two. The column `minus` names what is subtracted.
    """
    at: dict[tuple[Any, ...], float] = {
        (row["task"], row["variant"], row["measure"], row["of"], row["seed"]): float(row["value"])
        for row in rows
        if row["measure"] in ("accuracy", "nll")
    }
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (task, variant, name, of, seed), value in at.items():
        beside = [(baseline, (task, baseline, name, of, seed)) for baseline in BASELINES]
        beside.append((f"{variant}, by confidence", (task, variant, name, "confidence", seed)))
        for label, other in beside:
            if other != (task, variant, name, of, seed) and other in at:
                groups[task, variant, name, of, label].append(value - at[other])
    found = []
    for (task, variant, name, of, label), values in groups.items():
        if len(values) > 1:
            mean, half = sum(values) / len(values), _half_width(values)
            numbers = {"seeds": len(values), "mean": mean, "low": mean - half, "high": mean + half}
            found.append({"task": task, "variant": variant, "measure": name, "of": of, "minus": label} | numbers)
    return found


def _half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean of a few numbers, by Student's t."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def _wilson(share: float, rows: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which has a width at 0 and 1 as well."""
    centre = (share + _Z_95**2 / (2 * rows)) / (1 + _Z_95**2 / rows)
    half = _Z_95 / (1 + _Z_95**2 / rows) * math.sqrt(share * (1 - share) / rows + _Z_95**2 / (4 * rows**2))
    return centre - half, centre + half


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a table that `write_table` wrote, with numbers as floats."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = {"task", "variant", "measure", "of", "minus", "mask"}
    return [{name: value if name in texts else float(value) for name, value in row.items()} for row in rows]


def write_table(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Writes rows as CSV, floats to six significant digits."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
    return path
