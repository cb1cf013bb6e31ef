"""Reports the results of a run as a summary, a Markdown table and a figure, and compares two runs."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dream_jax.evaluation.ledger import ITEMS, SECONDS, SETTINGS
from dream_jax.evaluation.likelihood import Bound, total
from dream_jax.evaluation.statistics import Estimate, Paired, agreement, mean_of, mean_score, paired
from dream_jax.files import read_json, replacing
from dream_jax.paths import check_replaceable, is_png
from dream_jax.row_file import JsonRow, RowFile

SUMMARY, TABLE, FIGURE = "summary.json", "report.md", "figure.png"

SHOWN_CHANGES = 10
SHOWN_REASONS = 5

_REMEDY = "the file is damaged; give another --out, or --overwrite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The results of a run: each is an Estimate, a number, a list of numbers or texts, or None if it was not measured."""

    task: str
    numbers: dict[str, Any]

    def to_json(self) -> str:
        """Returns the results as one JSON object; an Estimate is an object with value, low and high.

        Raises ValueError for NaN and infinities, which JSON does not have.
        """
        plain = {
            name: dataclasses.asdict(value) if isinstance(value, Estimate) else value
            for name, value in self.numbers.items()
        }
        return json.dumps({"task": self.task} | plain, indent=2, allow_nan=False) + "\n"

    def to_markdown(self, model: str) -> str:
        """Returns a Markdown table with a row for each result; the second column is headed by `model`."""
        lines = [f"| {self.task} | {model} |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in self.numbers.items()]
        return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, Estimate):
        return f"{_shown(value.value)} (95 %: {_shown(value.low)} to {_shown(value.high)})"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "\\|")  # A bar would begin the next cell of the table.
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_COUNT, _NUMBER, _FLAG, _TEXT = (int,), (int, float), (bool,), (str,)
_NAMED: Mapping[str, tuple[type, ...]] = {"seed": _COUNT, "number": _COUNT, "identity": _TEXT}
_SAMPLED: Mapping[str, tuple[type, ...]] = {
    "correct": _FLAG,
    "reason": _TEXT,
    "answer": _TEXT,
    "tokens_to_end": (int, type(None)),
    "room": _COUNT,
    "forwards": _COUNT,
}
_SCORED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "choice": {"correct": _FLAG, "correct_by_byte": _FLAG},
    "likelihood": {"nats": _NUMBER, "variance": _NUMBER, "freedom": _NUMBER, "tokens": _COUNT, "bytes": _COUNT},
}


def check_rows(folder: pathlib.Path, task: str, rows: Sequence[JsonRow], seconds: Sequence[JsonRow]) -> None:
    """Checks that the rows of items.jsonl and seconds.jsonl have the fields of the task, with values of their types.

    Raises: ValueError with the file, the line, the field and its value.
    """
    _check_fields(folder / ITEMS, rows, {**_NAMED, **_SCORED.get(task, _SAMPLED)})
    for number, row in enumerate(rows if task == "likelihood" else (), 1):
        if min(row["tokens"], row["bytes"]) < 1 or min(row["variance"], row["freedom"]) < 0:
            raise ValueError(
                f"{folder / ITEMS}:{number}: tokens and bytes must be at least 1, the others at least 0; {_REMEDY}"
            )
    _check_fields(folder / SECONDS, seconds, {"rows": _COUNT, "seconds": _NUMBER, "compiled": _FLAG})


def _check_fields(path: pathlib.Path, rows: Sequence[JsonRow], fields: Mapping[str, tuple[type, ...]]) -> None:
    for number, row in enumerate(rows, 1):
        for name, kinds in fields.items():
            if name not in row:
                raise ValueError(f"{path}:{number}: the row lacks the field {name!r}; {_REMEDY}")
            value = row[name]
            if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{path}:{number}: {name} is {value!r:.60}, which is not of type {wanted}; {_REMEDY}")


def scores(rows: Sequence[JsonRow], field: str = "correct") -> np.ndarray:
    """Returns the values of one field of all rows as float64 [problems, seeds], problems in the order of the rows.

    Raises: ValueError if a seed has fewer rows than another, or if there are none: the run is not finished.
    """
    by_seed: dict[int, list[JsonRow]] = collections.defaultdict(list)
    for row in rows:
        by_seed[row["seed"]].append(row)
    columns = list(by_seed.values())
    if not columns or any(len(column) != len(columns[0]) for column in columns):
        raise ValueError(
            "not every seed has a row for every problem: the run is not finished; the same command resumes it"
        )
    return np.array([[float(row[field]) for row in column] for column in columns]).T


def summarize(task: str, rows: Sequence[JsonRow], seconds: Sequence[JsonRow]) -> Summary:
    """Returns the results of a finished run from all rows of items.jsonl and seconds.jsonl; docs/evaluate.md explains them.

    Raises: ValueError if the run is not finished.
    """
    if task == "likelihood":
        found = _likelihood(rows)
    else:
        table = scores(rows)
        found = {
            "accuracy": mean_score(table),
            "problems": len(table),
            "seeds": table.shape[1],
            "accuracy_of_each_seed": [float(value) for value in table.mean(axis=0)],
            "agreement_between_seeds": agreement(table) if table.shape[1] > 1 else None,
        }
        if task == "choice":
            found["accuracy_by_byte"] = mean_score(scores(rows, "correct_by_byte"))
        else:
            found |= _sampled(rows, seconds, table.shape[1])
    return Summary(task=task, numbers=found | {"seconds": round(sum(one["seconds"] for one in seconds), 3)})


def _sampled(rows: Sequence[JsonRow], seconds: Sequence[JsonRow], seeds: int) -> dict[str, Any]:
    ended = [row["tokens_to_end"] for row in rows if row["tokens_to_end"] is not None]
    useful = [row["room"] if row["tokens_to_end"] is None else row["tokens_to_end"] for row in rows]
    texts = collections.defaultdict(set)
    for row in rows:
        texts[row["number"]].add(row["answer"])
    # Batches in which a program was compiled are left out of the speed.
    steady_tokens, steady_seconds, start = 0, 0.0, 0
    for one in seconds:
        if not one["compiled"]:
            steady_tokens += sum(useful[start : start + one["rows"]])
            steady_seconds += one["seconds"]
        start += one["rows"]
    everything = sum(one["seconds"] for one in seconds)
    undecided = collections.Counter(row["reason"] for row in rows if not row.get("decided", True))
    shown: dict[str, Any] = {}
    if undecided:
        shown["undecided_reasons"] = [f"{count} x {reason}" for reason, count in undecided.most_common(SHOWN_REASONS)]
    return {
        "undecided_answers": undecided.total(),
        **shown,
        "same_text_under_all_seeds": sum(len(found) == 1 for found in texts.values()) / len(texts)
        if seeds > 1
        else None,
        "empty_answers": sum(not row["answer"].strip() for row in rows) / len(rows),
        "no_end_token": 1 - len(ended) / len(rows),
        "tokens_to_end": mean_of(np.array(ended)) if ended else None,
        "forwards": mean_of(np.array([row["forwards"] for row in rows])).value,
        "useful_tokens_per_second": steady_tokens / steady_seconds if steady_seconds else None,
        "useful_tokens_per_second_with_compilation": sum(useful) / everything if everything else None,
    }


def _likelihood(rows: Sequence[JsonRow]) -> dict[str, Any]:
    seeds = scores(rows, "nats").shape[1]
    # Each further seed is one more row for every text, so numbers of texts, tokens and bytes are divided by the seeds.
    bound = total([Bound(nats=row["nats"], variance=row["variance"], freedom=row["freedom"]) for row in rows])
    tokens, size = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    low, high = bound.interval

    def over(unit: float) -> Estimate:
        return Estimate(value=bound.nats / unit, low=low / unit, high=high / unit)

    return {
        "texts": len(rows) // seeds,
        "seeds": seeds,
        "tokens": tokens // seeds,
        "bytes": size // seeds,
        "nats_per_token": over(tokens),
        "bits_per_byte": over(size * math.log(2)),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compares two runs on the problems that both of them have.

    Attributes:
      task: the task of both runs.
      problems: number of problems that both runs have.
      only_first, only_second: number of problems that only the first, or only the second run has.
      means: mean score of each run on the common problems, in 0..1; nats per text for the task likelihood.
      difference: mean of the second run minus mean of the first, with its 95 % interval.
      test: the paired test of the scores; None for the task likelihood.
      changes: one entry for each problem that scored differently: its number in the first run, and its row in each run
        for the first seed. Empty for the task likelihood.
    """

    task: str
    problems: int
    only_first: int
    only_second: int
    means: tuple[float, float]
    difference: Estimate
    test: Paired | None
    changes: list[tuple[int, JsonRow, JsonRow]]

    def to_markdown(self, first: str, second: str) -> str:
        """Returns a Markdown table of the means and a list of problems that changed; the arguments name the runs."""
        what = "nats a text" if self.test is None else "accuracy"
        lines = [
            f"| {self.task} | {first} | {second} | difference (95 %) |",
            "|---|---|---|---|",
            f"| {what} | {self.means[0]:.4g} | {self.means[1]:.4g} | {self.difference.value:+.4g} "
            f"({self.difference.low:+.4g} to {self.difference.high:+.4g}) |",
            "",
            f"{self.problems} problems in both, {self.only_first} in the first alone, {self.only_second} in the second.",
        ]
        if self.test is not None:
            lines.append(
                f"{self.test.gained} scored higher in the second, {self.test.lost} lower; paired sign-flip test: "
                f"p = {self.test.p_value:.3g}."
            )
        for number, one, other in self.changes[:SHOWN_CHANGES]:
            lines.append(f"- {number}: {_judged(one)} -> {_judged(other)}")
        if len(self.changes) > SHOWN_CHANGES:
            lines.append(f"- and {len(self.changes) - SHOWN_CHANGES} more")
        return "\n".join(lines) + "\n"


def _judged(row: JsonRow) -> str:
    answer = row.get("found", row.get("chosen"))
    verdict = "right" if row["correct"] else "wrong" if row.get("decided", True) else "undecided"
    return f"{verdict} {answer!r:.60}"


def compare(first: pathlib.Path, second: pathlib.Path) -> Comparison:
    """Compares the results in two folders. Problems are the same if question and answer are, in any file and line.

    Raises:
      FileNotFoundError: a folder has no results.
      ValueError: results are damaged or not finished, the tasks differ, or the runs have no problem in common.
    """
    tasks, tables = [], []
    for folder in (first, second):
        if not (folder / ITEMS).is_file() or not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} has no {ITEMS} with {SETTINGS}: it is not the folder of an evaluation")
        tasks.append(read_json(folder / SETTINGS).get("task"))
        tables.append(_by_problem(folder, "nats" if tasks[-1] == "likelihood" else "correct"))
    if tasks[0] != tasks[1]:
        raise ValueError(f"{first} is of task {tasks[0]}, {second} of task {tasks[1]}; compare runs of one task")
    one, other = tables
    common = [name for name in one if name in other]
    if not common:
        raise ValueError(f"{first} and {second} have no problem in common")
    scores_one = np.array([one[name][0] for name in common])
    scores_other = np.array([other[name][0] for name in common])
    means = (float(scores_one.mean()), float(scores_other.mean()))
    test = None
    changes: list[tuple[int, JsonRow, JsonRow]] = []
    if tasks[0] == "likelihood":
        difference = mean_of(scores_other.mean(axis=1) - scores_one.mean(axis=1))
    else:
        test = paired(scores_one, scores_other)
        difference = Estimate(value=test.difference, low=test.interval[0], high=test.interval[1])
        for index, name in enumerate(common):
            if scores_one[index].mean() != scores_other[index].mean():
                changes.append((one[name][1]["number"], one[name][1], other[name][1]))
    return Comparison(
        task=str(tasks[0]),
        problems=len(common),
        only_first=len(one) - len(common),
        only_second=len(other) - len(common),
        means=means,
        difference=difference,
        test=test,
        changes=changes,
    )


def _by_problem(folder: pathlib.Path, field: str) -> dict[tuple[str, int], tuple[np.ndarray, JsonRow]]:
    """Returns the scores, float64 [seeds], and the row of the first seed for each problem.

    A key is (identity, number of earlier problems with the same identity).
    """
    rows = RowFile(folder / ITEMS, name=lambda row: (row.get("seed"), row.get("number"))).rows
    _check_fields(folder / ITEMS, rows, {**_NAMED, field: _NUMBER if field == "nats" else _FLAG})
    try:
        table = scores(rows, field)
    except ValueError as error:
        raise ValueError(f"{folder / ITEMS}: {error}") from error
    counted: collections.Counter[str] = collections.Counter()
    found = {}
    for row, values in zip(rows[: len(table)], table, strict=True):
        found[row["identity"], counted[row["identity"]]] = (values, row)
        counted[row["identity"]] += 1
    return found


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Draws the accuracy of each seed with its interval, or a histogram of nats per token, into `figure.png`.

    Returns the path of the figure.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    rows = RowFile(folder / ITEMS).rows
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    if rows and "correct" in rows[0]:
        table = scores(rows)
        estimates = [mean_score(table[:, seed : seed + 1]) for seed in range(table.shape[1])] + [mean_score(table)]
        labels = [*(f"seed {seed}" for seed in range(table.shape[1])), "all"]
        for index, one in enumerate(estimates):
            below, above = one.value - one.low, one.high - one.value
            axes.errorbar(index, one.value, yerr=[[below], [above]], fmt="o", capsize=4, color="black")
        axes.set_xticks(range(len(estimates)), labels)
        axes.set(ylabel="accuracy, 95 % interval", ylim=(0, 1))
    else:
        axes.hist([row["nats"] / row["tokens"] for row in rows], bins=20)
        axes.set(xlabel="nats per token", ylabel="texts")
    path = folder / FIGURE
    check_replaceable(path, "a PNG picture", is_png)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path
