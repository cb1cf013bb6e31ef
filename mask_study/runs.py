"""Trains and measures the missing runs of a study, and writes the tables over all runs.

A study writes one file for each run. A study that was stopped can therefore be resumed, and a larger study in the same
folder uses the runs of a smaller one. Several processes may share a folder: each takes runs that no other process has
locked. `Study.pack` joins the files of finished runs into one file, `runs.jsonl`, which is read like the files.
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
from typing import Annotated, Any

import msgspec
from scipy import stats

from dream_jax.bounds import FloatRange, IntegerRange, check_numbers
from dream_jax.files import read_json, replacing, typed, write_file
from dream_jax.paths import check_replaceable
from dream_jax.side_files import parse_json, read_csv
from mask_study.caching import cached_against_computed
from mask_study.measures import Measured, measure
from mask_study.tasks import TASKS
from mask_study.training import BATCH, rows_of, tokenizer, train
from mask_study.variants import MASKS, VARIANTS

PACKED, RESULTS, SUMMARY, DIFFERENCES = "runs.jsonl", "results.csv", "summary.csv", "differences.csv"
BASELINES = ("bidirectional", "causal")
_FIRST = {"costs.csv": ("mask",), "floors.csv": ("model",)}  # columns of tables that are not about runs
_REMEDY = "remove the file, then the same command makes its run again"
_CACHED_ROWS = 64  # number of test rows for which cached logits are compared with those of full passes

_Z_95 = float(stats.norm.ppf(0.975))


@dataclasses.dataclass(frozen=True, order=True)
class StudyRun:
    """One run: a model trained on `task` (a key of TASKS) as `variant` (a key of VARIANTS) with the seed `seed`."""

    task: str
    variant: str
    seed: int

    @property
    def file(self) -> str:
        """The name of the JSON file with the results of this run, without its folder."""
        words = f"{self.task} {self.variant} seed {self.seed}"
        return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in words) + ".json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """The tasks, variants and seeds whose combinations are the runs of a study.

    Attributes:
      tasks, variants: keys of TASKS and of VARIANTS, at least one each.
      seeds: number of seeds, 1 to 1000; the seeds are 0, 1, ...
      length: factor on the number of training steps of each task (`StudyTask.steps`), above 0, at most 1000.
      test_rows: number of test examples that each model answers, 1 to 1024.

    Raises:
      ValueError: a name is unknown, or a number is out of range.
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
        check_numbers(
            self,
            seeds=IntegerRange(1, 1000),
            length=FloatRange(0.0, 1000.0, open_low=True),
            test_rows=IntegerRange(1, 1024),
        )
        if not self.tasks or not self.variants:
            raise ValueError(f"a study needs at least one task and one variant, but has: {self}")

    def steps(self, task: str) -> int:
        """Returns the number of training steps of each run on the task."""
        return max(1, round(self.length * TASKS[task].steps))

    def runs(self) -> list[StudyRun]:
        """Returns the runs in the order in which they are made, without those that `_is_informative` excludes.

        The variants that differ only in the mask come first, so that a study that is stopped early can already compare
        the masks. Within each group all runs of seed 0 come first, then those of seed 1, and so on.
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
    # Only countdown has answers of different widths, so only it has padding that can be hidden. Variants that change
    # more than the mask run only on the tasks on which the results of the masks differ most.
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
    lines = path.read_bytes().splitlines()
    found = [_checked(parse_json(line, f"{path}:{n}", _REMEDY), f"{path}:{n}") for n, line in enumerate(lines, 1)]
    first: dict[StudyRun, int] = {}
    for number, record in enumerate(found, 1):
        if (before := first.setdefault(_run_of(record), number)) != number:
            raise ValueError(f"{path}:{number}: the same run as in line {before}; remove one of these lines")
    return found


class _RecordVariant(msgspec.Struct):
    name: str


class _RecordSettings(msgspec.Struct):
    steps: int
    batch: int
    test_rows: int


class _RunRecord(msgspec.Struct):
    """The entries of the results of a run, with their types."""

    task: str
    variant: _RecordVariant
    seed: int
    settings: _RecordSettings
    training_nll: Annotated[list[float], msgspec.Meta(min_length=1)]
    measured: list[tuple[str, str, float, float]]


def _checked(record: Any, where: object) -> dict[str, Any]:
    """Returns the results of a run. Raises ValueError, which begins with `where`, if they have another form."""
    typed(record, _RunRecord, where, _REMEDY)
    found: dict[str, Any] = record
    return found


def _run_of(record: dict[str, Any]) -> StudyRun:
    return StudyRun(record["task"], record["variant"]["name"], record["seed"])


class Study:
    """The runs of a plan and their results, which are stored in a folder.

    Attributes:
      folder: contains `runs/` with one file for each run, or `runs.jsonl` with one line for each run, or both.
      plan: the plan whose runs belong to the study.
    """

    def __init__(self, folder: pathlib.Path, plan: StudyPlan):
        """Reads the results in the folder. Raises FileExistsError if one has other steps or test rows than the plan."""
        self.folder, self.plan = folder, plan
        self._packed = {_run_of(record): record for record in _read_packed(folder / PACKED)}
        for run in plan.runs():
            found = self._read(run)
            if found is not None and self._settings(run) != found["settings"]:
                raise FileExistsError(
                    f"{folder} has {run.file} with {found['settings']}, not {self._settings(run)}; give another --out"
                )

    def missing(self) -> list[StudyRun]:
        """Returns the runs of the plan that have no results in the folder yet, in their order."""
        return [run for run in self.plan.runs() if run not in self._packed and not self._path(run).is_file()]

    def work(self, told: Callable[[StudyRun, float], None]) -> None:
        """Trains and measures each missing run, unless another process has locked it.

        Args:
          told: function that is called after each run with the run and the time of its training in seconds.
        """
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for run in self.missing():
            path = self._path(run)
            with open(path.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # Another process trains this run.
                if not path.is_file():
                    told(run, self._make(run))
                path.with_suffix(".lock").unlink(missing_ok=True)

    def _make(self, run: StudyRun) -> float:
        """Trains and measures one run and writes its file; returns the time of the training in seconds."""
        task, variant = TASKS[run.task], VARIANTS[run.variant]
        trained = train(task, variant, run.seed, self.plan.steps(run.task))
        examples = task.examples("test", 0, self.plan.test_rows)
        found = list(measure(trained.model, task, variant, examples, run.seed))
        if variant.shift and not variant.hide_pads:
            rows_RT = rows_of(examples[:_CACHED_ROWS], tokenizer())
            # "kept keys" is the name of the key/value cache in the result files, so that old results stay readable.
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
                "measured": [[*measured[:3], round(measured.value, 9)] for measured in found],
            },
            allow_nan=False,
        )
        write_file(self._path(run), text + "\n")
        return trained.seconds

    def _settings(self, run: StudyRun) -> dict[str, int]:
        """Returns the settings that results must have been made with to belong to the plan."""
        return {"steps": self.plan.steps(run.task), "batch": BATCH, "test_rows": self.plan.test_rows}

    def _path(self, run: StudyRun) -> pathlib.Path:
        return self.folder / "runs" / run.file

    def _read(self, run: StudyRun) -> dict[str, Any] | None:
        """Returns the results of a run from its file or from `runs.jsonl`, or None if there are none."""
        path = self._path(run)
        if not path.is_file():
            return self._packed.get(run)
        return _checked(read_json(path, _REMEDY), path)

    def pack(self) -> pathlib.Path:
        """Moves all files of `runs/` into `runs.jsonl`, one line for each run, also runs of other plans.

        `runs.jsonl` is written before the files are removed. If a run is in both, the results of its file are used.

        Returns:
          The path of `runs.jsonl`.

        Raises:
          ValueError: the folder has no runs.
        """
        self._packed |= {_run_of(record): record for record in _read_packed(self.folder / PACKED)}
        files = sorted((self.folder / "runs").glob("*.json"))
        records = [_checked(read_json(file, _REMEDY), file) for file in files]
        self._packed |= {_run_of(record): record for record in records}
        if not self._packed:
            raise ValueError(f"{self.folder} has no run to put into {PACKED}")
        lines = (json.dumps(self._packed[run], allow_nan=False) + "\n" for run in sorted(self._packed))
        path = self.folder / PACKED
        write_file(path, "".join(lines))
        for file in files:
            file.unlink(missing_ok=True)
        return path

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields one dict for each measured number of each finished run of the plan, as in `results.csv`.

        Its keys are task, variant, seed, measure, of, passes, value and test_rows.
        """
        for run in self.plan.runs():
            found = self._read(run)
            if found is None:
                continue
            learned = ("training nll", "last twentieth", 0.0, found["training_nll"][-1])
            for name, of, passes, value in (*found["measured"], learned):
                rows = found["settings"]["test_rows"]
                numbers = {"measure": name, "of": of, "passes": passes, "value": value, "test_rows": rows}
                yield dataclasses.asdict(run) | numbers

    def curves(self) -> Iterator[tuple[StudyRun, list[float]]]:
        """Yields each finished run of the plan with its training nll: the mean of each twentieth of the steps."""
        for run in self.plan.runs():
            found = self._read(run)
            if found is not None:
                yield run, [float(value) for value in found["training_nll"]]

    def write_tables(self) -> list[pathlib.Path]:
        """Writes the tables of the study and returns their paths.

        `results.csv` has a row for each number of each run, `summary.csv` the means over seeds (see `summarise`), and
        `differences.csv` the paired differences between variants (see `differences`), if there are any.

        Raises:
          ValueError: no run of the plan is finished.
        """
        rows = list(self.rows())
        if not rows:
            raise ValueError(f"{self.folder} has no finished run of this plan; make the runs first")
        written = [write_table(self.folder / RESULTS, rows), write_table(self.folder / SUMMARY, summarise(rows))]
        different = differences(rows)
        if different:
            return [*written, write_table(self.folder / DIFFERENCES, different)]
        earlier = self.folder / DIFFERENCES  # It would have differences of other runs.
        check_replaceable(earlier, "a table of a study", lambda content: content.startswith(b"task,"))
        earlier.unlink(missing_ok=True)
        return written


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the mean over seeds of each number, with a 95 % confidence interval.

    Each row has the keys task, variant, measure, of, passes, seeds, mean, low, high, interval, least and most. `low` and
    `high` are Student's interval over the seeds, without values that the number cannot have: nats are at least 0 and
    shares are between 0 and 1. For a share of correct answers the interval is at least as wide as Wilson's over the
    independent test rows (`StudyTask.independent`), which all seeds share: if all seeds answer every row correctly, they
    could still fail on other rows. `least` and `most` are the values of the lowest and of the highest seed. For a single
    seed, low and high are NaN.

    `interval` says what describes the number best: "t" for this interval; "seeds" if Student's interval has values that the
    number cannot have, because the seeds are too far apart for an interval, so that tables show the lowest and the highest
    seed; "wilson" if it has such values although the seeds are not farther apart than the ends of Wilson's interval. `low`
    and `high` are then those of Wilson's interval, or of the seeds where they are outside of it.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["variant"], row["measure"], row["of"]].append(row)
    found = []
    for (task, variant, name, of), members in groups.items():
        values = [float(member["value"]) for member in members]
        mean = sum(values) / len(values)
        low = high = math.nan
        interval = ""
        if len(values) > 1:
            half = _half_width(values)
            most_possible = 1.0 if name in ("accuracy", "masked accuracy") else math.inf
            possible = name == "kept keys" or (mean - half >= 0.0 and mean + half <= most_possible)
            interval = "t" if possible else "seeds"
            low, high = mean - half, mean + half
            if name != "kept keys":
                low, high = max(0.0, low), min(most_possible, high)
            if name == "accuracy":
                rows_low, rows_high = _wilson(mean, _independent(task, members[0]["test_rows"]))
                if not possible and max(values) - min(values) <= rows_high - rows_low:
                    interval = "wilson"
                    low, high = min(values), max(values)
                low, high = max(0.0, min(low, rows_low)), min(1.0, max(high, rows_high))
        passes = sum(float(member["passes"]) for member in members) / len(members)
        numbers: dict[str, Any] = {"passes": passes, "seeds": len(values), "mean": mean, "low": low, "high": high}
        numbers |= {"interval": interval, "least": min(values), "most": max(values)}
        found.append({"task": task, "variant": variant, "measure": name, "of": of} | numbers)
    return found


def _independent(task: str, test_rows: float) -> float:
    """Returns the number of independent test rows of a task; all rows of a task that is not in TASKS."""
    return float(TASKS[task].independent(int(test_rows)) if task in TASKS else test_rows)


def differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns paired differences of accuracy and nll, computed for each seed and then averaged.

    The differences are each variant minus the bidirectional and minus the causal one, and each order of writing minus
    the order by confidence. Each row has task, variant, measure, of, minus (the name of what is subtracted), seeds,
    mean, low and high (a 95 % interval by Student's t), interval, least and most. Variants with the same seed have the
    same initial weights, rows, order and noise, and all models answer the same test rows. The variation that they share
    cancels in the differences, so these intervals are narrower than those of two separate means. Only seeds of both
    sides are used, at least two.

    `interval` is "seeds" if it is "seeds" for one of the two means (see `summarise`), and "t" otherwise. `least` and
    `most` are the differences of the lowest and of the highest seed.
    """
    at: dict[tuple[Any, ...], float] = {
        (row["task"], row["variant"], row["measure"], row["of"], row["seed"]): float(row["value"])
        for row in rows
        if row["measure"] in ("accuracy", "nll")
    }
    apart = {
        (row["task"], row["variant"], row["measure"], row["of"])
        for row in summarise([row for row in rows if row["measure"] in ("accuracy", "nll")])
        if row["interval"] == "seeds"
    }
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    subtracted: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for (task, variant, name, of, seed), value in at.items():
        beside = [(baseline, (task, baseline, name, of, seed)) for baseline in BASELINES]
        beside.append((f"{variant}, by confidence", (task, variant, name, "confidence", seed)))
        for label, other in beside:
            if other != (task, variant, name, of, seed) and other in at:
                groups[task, variant, name, of, label].append(value - at[other])
                subtracted[task, variant, name, of, label] = other[:-1]
    found = []
    for (task, variant, name, of, label), values in groups.items():
        if len(values) > 1:
            mean, half = sum(values) / len(values), _half_width(values)
            numbers: dict[str, Any] = {"seeds": len(values), "mean": mean, "low": mean - half, "high": mean + half}
            wide = {(task, variant, name, of), subtracted[task, variant, name, of, label]} & apart
            numbers |= {"interval": "seeds" if wide else "t", "least": min(values), "most": max(values)}
            found.append({"task": task, "variant": variant, "measure": name, "of": of, "minus": label} | numbers)
    return found


def _half_width(values: Sequence[float]) -> float:
    """Returns half the width of the 95 % interval of the mean of a few numbers, by Student's t."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def _wilson(share: float, rows: float) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share of `rows` rows; its width is above 0 also for the shares 0 and 1."""
    centre = (share + _Z_95**2 / (2 * rows)) / (1 + _Z_95**2 / rows)
    half = _Z_95 / (1 + _Z_95**2 / rows) * math.sqrt(share * (1 - share) / rows + _Z_95**2 / (4 * rows**2))
    return centre - half, centre + half


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a table that `write_table` wrote, with all numbers as floats."""
    remedy = "remove it, then study.py writes it again"
    rows = read_csv(path, _FIRST.get(path.name, ("task", "variant")), remedy)
    texts = {"task", "variant", "measure", "of", "minus", "mask", "model", "interval"}
    try:
        return [{name: value if name in texts else float(value) for name, value in row.items()} for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from error


def write_table(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Writes one or more rows as CSV, floats with six significant digits, and returns `path`.

    Raises:
      FileExistsError: the file exists and is not such a table: its first column has another name.
    """
    column = next(iter(rows[0])).encode()
    check_replaceable(path, "a table of a study", lambda content: content.partition(b",")[0] == column)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
    return path
