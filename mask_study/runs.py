"""Many runs, each kept in a file of its own; tables of all of them.

A run that is there is not made again, so a study that was stopped goes on, and a larger one begins with what a smaller one
has found. Processes share a folder without talking: each takes the runs that nobody has taken.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
import math
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mask_study.caching import kept_against_computed
from mask_study.measures import Measured, measure
from mask_study.tasks import TASKS
from mask_study.training import BATCH, rows_of, tokenizer, train
from mask_study.variants import MASKS, VARIANTS

RESULTS, SUMMARY, DIFFERENCES = "results.csv", "summary.csv", "differences.csv"
BASELINES = ("bidirectional", "causal")
_CACHED_ROWS = 64

# Two-sided 97.5 % points of Student's t for 1, 2, ... degrees of freedom: with few seeds the normal one is far too small.
Z_95 = 1.959963984540054
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One model: what it learns, how, and from which seed."""

    task: str
    variant: str
    seed: int

    @property
    def file(self) -> str:
        """Where its numbers are."""
        words = f"{self.task} {self.variant} seed {self.seed}"
        return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in words) + ".json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs a study consists of.

    Attributes:
      tasks, variants: names.
      seeds: 0, 1, ... so many.
      length: training steps as a share of the task's own.
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
        if self.seeds > len(_STUDENT) + 1:
            raise ValueError(f"{self.seeds=} is more than the {len(_STUDENT) + 1} that intervals are known for")
        if not 1 <= self.test_rows <= 1024:
            raise ValueError(f"{self.test_rows=} must be between 1 and 1024")

    def steps(self, task: str) -> int:
        """Of each run on the task."""
        return max(1, round(self.length * TASKS[task].steps))

    def runs(self) -> list[Run]:
        """All of them, masks first, and of these one seed after the other: a study that is stopped early compares much."""
        masks_first = sorted(self.variants, key=lambda name: name not in MASKS)
        asked = [
            (variant not in MASKS, seed, task, variant)
            for variant in masks_first
            for seed in range(self.seeds)
            for task in self.tasks
        ]
        asked.sort(key=lambda one: one[:2])
        return [Run(task, variant, seed) for _, seed, task, variant in asked if _says_something(task, variant)]


def _says_something(task: str, variant: str) -> bool:
    # Answers of one width have no pads to hide. The rest is asked where masks were found to differ most.
    if task == "scattered sudoku":
        return variant in ("bidirectional", "block-causal:4")
    if variant == "pads hidden":
        return task == "countdown"
    if variant.startswith("block-causal:16"):
        return task == "sudoku"
    if "unshifted" in variant:
        return task in ("addition", "sudoku")
    return variant in MASKS or task == "addition"


class Study:
    """The runs of a plan in a folder.

    Attributes:
      folder: OUT; its `runs` has a file a run.
      plan: what belongs to it.
    """

    def __init__(self, folder: pathlib.Path, plan: Plan):
        """Raises FileExistsError where the folder holds runs of another length or number of test rows."""
        self.folder, self.plan = folder, plan
        for run in plan.runs():
            found = self._read(run)
            if found is not None and self._settings(run) != found["settings"]:
                raise FileExistsError(
                    f"{folder} holds {run.file} with {found['settings']}, not {self._settings(run)}; give another --out"
                )

    def missing(self) -> list[Run]:
        """Runs that are not there yet."""
        return [run for run in self.plan.runs() if not self._path(run).is_file()]

    def work(self, told: Callable[[Run, float], None]) -> None:
        """Makes what is missing and nobody else is making; `told` each run that is done, and its seconds of training."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for run in self.missing():
            path = self._path(run)
            with open(path.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another process is at it
                if not path.is_file():
                    told(run, self._make(run))
                path.with_suffix(".lock").unlink(missing_ok=True)

    def _make(self, run: Run) -> float:
        task, variant = TASKS[run.task], VARIANTS[run.variant]
        trained = train(task, variant, run.seed, self.plan.steps(run.task))
        examples = task.examples("test", 0, self.plan.test_rows)
        found = list(measure(trained.model, task, variant, examples, run.seed))
        if variant.shift and not variant.hide_pads:
            kept = kept_against_computed(
                trained.model, rows_of(examples[:_CACHED_ROWS], tokenizer()), task.prompt_width
            )
            found += [Measured("kept keys", name, 0.0, value) for name, value in kept._asdict().items()]
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
        path = self._path(run)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        return trained.seconds

    def _settings(self, run: Run) -> dict[str, int]:
        return {"steps": self.plan.steps(run.task), "batch": BATCH, "test_rows": self.plan.test_rows}

    def _path(self, run: Run) -> pathlib.Path:
        return self.folder / "runs" / run.file

    def _read(self, run: Run) -> dict[str, Any] | None:
        path = self._path(run)
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """A line a number of every run that is there."""
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
        """`results.csv`, a line a number and seed; `summary.csv`, over the seeds; `differences.csv`, by seed.

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
    """Mean over seeds of each number, with a 95 % interval.

    Student's t over the seeds; of a share of right answers at least Wilson's over the test rows, which are the same for all
    seeds: three models that are right everywhere have not shown that they always are. Not a number for a single seed.
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
    """By seed: of each variant from the bidirectional and from the causal one, of each order from that by confidence.

    Mean, and a 95 % interval by Student's t. A seed stands for weights, rows, order and noise that all variants share, and
    all answer the same test rows: what they share does not widen these intervals, as it does those of two means. Only seeds
    that both have; at least two. `minus` names what is taken away.
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
    """Of a 95 % interval of the mean of a few numbers."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return _STUDENT[len(values) - 2] * spread / math.sqrt(len(values))


def _wilson(share: float, rows: float) -> tuple[float, float]:
    """Wilson's interval, which has a width at 0 and 1 as well."""
    centre = (share + Z_95**2 / (2 * rows)) / (1 + Z_95**2 / rows)
    half = Z_95 / (1 + Z_95**2 / rows) * math.sqrt(share * (1 - share) / rows + Z_95**2 / (4 * rows**2))
    return centre - half, centre + half


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a table that was written here, numbers as numbers."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = {"task", "variant", "measure", "of", "minus", "mask"}
    return [{name: value if name in texts else float(value) for name, value in row.items()} for row in rows]


def write_table(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> pathlib.Path:
    """As CSV, numbers to six digits."""
    temporary = path.with_name(f".{path.name}.incomplete")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
    temporary.replace(path)
    return path
