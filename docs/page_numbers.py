"""The numbers that pages of docs/ say in their sentences: functions for the templates in `docs/templates/`.

`docs/write_tables.py` renders each template with these functions, so no number of the study is copied by hand. Shares are
percentages, differences of shares are percentage points. A number has its 95 % interval in brackets, or its lowest and
highest seed in parentheses (see `mask_study.runs.summarise`).
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import pathlib
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mask_study.floors import floor_of
from mask_study.runs import differences, read_rows
from mask_study.tables import excludes_zero, find, of_seeds
from mask_study.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUDY = ROOT / "docs" / "study"
Row = Mapping[str, Any]


def results() -> list[dict[str, Any]]:
    """The rows of results.csv, with seeds as integers."""
    return [row | {"seed": int(row["seed"])} for row in read_rows(STUDY / "results.csv")]


def _compared() -> list[dict[str, Any]]:
    """The rows of block_diffusion.csv, with numbers as floats; none if there is no such file yet."""
    if not (STUDY / "block_diffusion.csv").is_file():
        return []
    texts = {"task", "arm", "measure", "minus", "interval"}
    with (STUDY / "block_diffusion.csv").open(newline="", encoding="utf-8") as file:
        return [
            {name: value if name in texts else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


class Numbers:
    """The functions of a template, in one language.

    Attributes:
      computed: differences that a page computes and that are not in differences.csv, as text that names each.
    """

    def __init__(self, chinese: bool):
        self.chinese = chinese
        self.summary = read_rows(STUDY / "summary.csv")
        self.differences = read_rows(STUDY / "differences.csv")
        self.floors = read_rows(STUDY / "floors.csv")
        self.costs = read_rows(STUDY / "costs.csv")
        self.compared = _compared()
        self.results = results()
        self.runs = [json.loads(line) for line in (STUDY / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
        self.computed: set[str] = set()

    def names(self) -> dict[str, Any]:
        """The functions and constants by the names that templates use."""
        return {
            name: getattr(self, name)
            for name in (
                "share", "points", "nats", "nats_difference", "seeds", "lead_difference", "floor", "excess", "least_most",
                "comparisons", "written_at", "written_range", "kept", "cost", "below", "split", "bench", "gsm8k", "hours",
                "count_of_rows", "largest_exact", "recipe", "h200", "cpu", "puzzles", "run_minutes", "temporaries",
                "blocks", "blocks_compared", "blocks_steps",
            )
        }  # fmt: skip

    def _said(self, text: str) -> str:
        return text.replace(" to ", " 至 ") if self.chinese else text

    def _row(self, task: str, variant: str, measure: str, of: str) -> Row:
        row = find(self.summary, task=task, variant=variant, measure=measure, of=of)
        if row is None:
            raise KeyError(f"the study has no {measure} {of!r} of {variant!r} on {task!r}")
        return row

    def share(self, task: str, variant: str, of: str = "confidence", *, mean: bool = False, digits: int = 0) -> str:
        """A share of right answers: `86 % [75, 93]`, or `86 %` with `mean`."""
        row = self._row(task, variant, "accuracy", of)
        if mean:
            return f"{100 * row['mean']:.{digits}f} %"
        number, _, interval = of_seeds(row, digits, 100.0).partition(" ")
        return self._said(f"{number} % {interval}")

    def nats(self, task: str, variant: str, of: str = "all", *, mean: bool = False, digits: int = 3) -> str:
        """Nats per masked token."""
        row = self._row(task, variant, "nll", of)
        return f"{row['mean']:.{digits}f}" if mean else self._said(of_seeds(row, digits))

    def _difference(self, task: str, left: tuple[str, str], right: tuple[str, str], measure: str) -> Row:
        """The paired difference of (variant, of) minus (variant, of)."""
        if left[1] == right[1]:
            row = find(self.differences, task=task, variant=left[0], measure=measure, of=left[1], minus=right[0])
            if row is not None:
                return row
        if left[0] == right[0] and right[1] == "confidence":
            minus = f"{left[0]}, by confidence"
            row = find(self.differences, task=task, variant=left[0], measure=measure, of=left[1], minus=minus)
            if row is not None:
                return row
        self.computed.add(f"{task}, {measure}: {left} minus {right}")
        values = self._values(task, *left, measure), self._values(task, *right, measure)
        # Two variants that stand for the sides, so that the difference is computed as all others are.
        rows = [
            {"task": task, "variant": side, "measure": measure, "of": "both", "seed": seed, "value": value,
             "passes": 0.0, "test_rows": 256.0}
            for side, column in zip(("left", "bidirectional"), values, strict=True)
            for seed, value in column.items()
        ]  # fmt: skip
        (found,) = (row for row in differences(rows) if row["minus"] == "bidirectional")
        return found

    def _values(self, task: str, variant: str, of: str, measure: str) -> dict[int, float]:
        found = {
            row["seed"]: row["value"]
            for row in self.results
            if (row["task"], row["variant"], row["measure"], row["of"]) == (task, variant, measure, of)
        }
        if not found:
            raise KeyError(f"the study has no {measure} {of!r} of {variant!r} on {task!r}")
        return found

    def points(
        self, task: str, left: str, right: str = "bidirectional", of: str = "confidence", other: str | None = None,
        digits: int = 0, factor: float = 1.0,
    ) -> str:  # fmt: skip
        """A paired difference of shares in points: of `left` minus `right`, or of two orders with `other`."""
        row = self._difference(task, (left, of), (right, of if other is None else other), "accuracy")
        unit = "个百分点" if self.chinese else "points"
        number, _, interval = of_seeds(_turned(row, factor), digits, 100.0, "+").partition(" ")
        return self._said(f"{number} {unit} {interval}")

    def nats_difference(
        self, task: str, left: str, right: str = "bidirectional", of: str = "all", other: str | None = None,
        digits: int = 3, factor: float = 1.0,
    ) -> str:  # fmt: skip
        """A paired difference of nats per masked token, of two noise levels with `other`; factor -1 turns it round."""
        row = self._difference(task, (left, of), (right, of if other is None else other), "nll")
        return self._said(of_seeds(_turned(row, factor), digits, 1.0, "+"))

    def lead_difference(self, measure: str, of: str) -> str:
        """By how much the lead of block-causal over bidirectional is larger on sudoku than on scattered sudoku."""
        self.computed.add(f"difference of leads, {measure} {of}")
        leads = []
        for task in ("sudoku", "scattered sudoku"):
            block, both = (self._values(task, name, of, measure) for name in ("block-causal:4", "bidirectional"))
            leads.append({seed: block[seed] - both[seed] for seed in block})
        values = [leads[0][seed] - leads[1][seed] for seed in leads[0]]
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        mean = statistics.mean(values)
        row = {"mean": mean, "low": mean - half, "high": mean + half, "interval": "t"}
        if measure == "nll":
            return of_seeds(row, 3, 1.0, "+")
        number, _, interval = of_seeds(row, 0, 100.0, "+").partition(" ")
        return f"{number} {'个百分点' if self.chinese else 'points'} {interval}"

    def seeds(self, task: str, variant: str, of: str = "all", digits: int = 3) -> str:
        """The values of all seeds: nats for "all" or a noise level, otherwise shares in percent."""
        measure = "nll" if of == "all" or "<=" in of else "accuracy"
        factor = 1 if measure == "nll" else 100
        values = self._values(task, variant, of, measure)
        separator = "、" if self.chinese else ", "
        return separator.join(f"{factor * values[seed]:.{digits if factor == 1 else 0}f}" for seed in sorted(values))

    def least_most(self, task: str, variant: str, of: str, digits: int = 0) -> str:
        """The share of the lowest and of the highest seed, in percent."""
        row = self._row(task, variant, "accuracy", of)
        return self._said(f"{100 * row['least']:.{digits}f} to {100 * row['most']:.{digits}f} %")

    def floor(self, variant: str, column: str | None = None, digits: int = 3) -> str:
        """A floor of countdown: on the grid, or another column of floors.csv."""
        row = find(self.floors, model=variant)
        assert row is not None, variant
        return f"{row[column or 'nats_a_token_on_grid']:.{digits}f}"

    def blocks(self, task: str, arm: str, of: str = "nats an answer", *, minus: bool = False, digits: int = 2) -> str:
        """A measure of the comparison at equal FLOPs; with `minus` less that of the bidirectional model, seed by seed.

        Bounds are in nats, shares of right answers in percent, their differences in points.
        """
        row = find(self.compared, task=task, arm=arm, measure=of, minus="bidirectional" if minus else "")
        if row is None:
            raise KeyError(f"the comparison has no {of!r} of {arm!r} on {task!r}")
        sign = "+" if minus else ""
        if of.startswith("nats"):
            return self._said(of_seeds(row, digits, 1.0, sign))
        number, _, interval = of_seeds(row, 0, 100.0, sign).partition(" ")
        unit = "%" if not minus else "个百分点" if self.chinese else "points"
        return self._said(f"{number} {unit} {interval}")

    def blocks_steps(self, task: str, arm: str) -> str:
        """The number of steps of an arm of the comparison at equal FLOPs."""
        return f"{next(row['steps'] for row in self.compared if (row['task'], row['arm']) == (task, arm)):.0f}"

    def blocks_compared(self) -> str:
        """The number of differences from the bidirectional model; nats a token are nats an answer over its length."""
        return str(sum(bool(row["minus"]) and row["measure"] != "nats a token" for row in self.compared))

    def excess(self, task: str, variant: str) -> str:
        """Nats above the floor."""
        floor = floor_of(task, variant, "all", self.floors)
        assert floor is not None
        return f"{self._row(task, variant, 'nll', 'all')['mean'] - floor:.3f}"

    def comparisons(self, key: str) -> str:
        """How many differences there are, and how many of them exclude zero, by different rules."""
        return f"{len(self.computed) if key == 'computed' else self._counts[key]:,}"

    @functools.cached_property
    def _counts(self) -> dict[str, int]:
        """The differences of each kind; bidirectional minus causal is causal minus bidirectional, and counts once."""
        rows = [row for row in self.differences if (row["variant"], row["minus"]) != ("bidirectional", "causal")]
        mean, low, high, seeds = (np.array([row[name] for row in rows]) for name in ("mean", "low", "high", "seeds"))
        half = (high - low) / 2
        # The p-values of Student's test that belong to the intervals; without spread 1 for no difference and 0 for some.
        scaled = np.abs(mean) / np.where(half > 0, half, 1.0) * stats.t.ppf(0.975, seeds - 1)
        chances = np.where(half > 0, 2 * stats.t.sf(scaled, seeds - 1), mean == 0)
        apart = np.array([row["interval"] == "seeds" for row in rows])
        chances[apart] = 1.0  # No significance is claimed for them.
        return {
            "all": len(rows),
            "mirrored": len(self.differences) - len(rows),
            "exclude": sum(excludes_zero(row) for row in rows),
            "with_interval": int((~apart).sum()),
            "chance": round(0.05 * int((~apart).sum())),
            "zero": int(((low == 0) & (high == 0)).sum()),
            "seeds": int(apart.sum()),
            "false_discovery": int((stats.false_discovery_control(chances) < 0.05).sum()),
        }

    def written_at(self, variant: str, position: int, digits: int = 1) -> str:
        """The mean step at which a digit of an addition is written."""
        return f"{self._row('addition', variant, 'written at', str(position))['mean']:.{digits}f}"

    def written_range(self, position: int, digits: int = 2) -> str:
        """The least and the largest of the mean steps of the masks at which a digit of an addition is written."""
        masks = ("bidirectional", "causal", "prefix", "block-causal:4", "window:4")
        means = [self._row("addition", name, "written at", str(position))["mean"] for name in masks]
        return self._said(f"{min(means):.{digits}f} to {max(means):.{digits}f}")

    def kept(self, task: str, variant: str, of: str, digits: int = 3) -> str:
        """A measure of the cache without refreshes; digits below 0 count significant ones of the mean alone."""
        row = self._row(task, variant, "kept keys", of)
        return f"{row['mean']:.{-digits}g}" if digits < 0 else self._said(of_seeds(row, digits))

    def largest_exact(self) -> str:
        """The largest difference of a logit under masks whose cache is exact, over all tasks and seeds."""
        exact = ("causal", "prefix", "block-causal:4")
        rows = [row for row in self.summary if (row["measure"], row["of"]) == ("kept keys", "largest")]
        return f"{max(row['most'] for row in rows if row['variant'] in exact):.2g}"

    def cost(self, mask: str, name: str, digits: int = 2) -> str:
        """A cell of costs.csv."""
        row = find(self.costs, mask=mask)
        assert row is not None, mask
        return f"{row[name]:.{digits}f}"

    def below(self, task: str, variant: str, nats: float) -> str:
        """The shares of the training after which the training nats of each seed are below a threshold, in percent."""
        found = []
        for run in self.runs:
            if (run["task"], run["variant"]["name"]) == (task, variant):
                curve: Sequence[float] = run["training_nll"]
                part = next((number for number, value in enumerate(curve) if value < nats), None)
                found.append("never" if part is None else f"{100 * (part + 1) / len(curve):.0f} %")
        words = ("、" if self.chinese else ", ").join(found)
        return words.replace("never", "未达到") if self.chinese else words

    def split(self, key: str) -> str:
        """What the test rows share with training rows; `make_split` describes the keys."""
        return f"{json.loads((STUDY / 'split.json').read_text(encoding='utf-8'))[key]:,}"

    def hours(self) -> str:
        """The sum of the training times of all runs, in hours of one core."""
        return f"{sum(run['seconds'] for run in self.runs) / 3600:.1f}"

    def count_of_rows(self) -> str:
        """The number of models of the study."""
        return str(len(self.runs))

    def bench(self, name: str, *keys: str, digits: int = 2) -> str:
        """A number of bench/results/NAME.json."""
        value = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for key in keys:
            value = value[int(key)] if isinstance(value, list) else value[key]
        return f"{value:.{digits}f}"

    def recipe(self, name: str, topology: str, key: str) -> str:
        """Hours, RMB or peak GiB of a recipe on some hardware, as `recipes/` has them."""
        text = (ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
        (plan,) = (one for one in tomllib.loads(text)["planned"] if one["topology"] == topology)
        value = plan[key]
        if not isinstance(value, list):
            return f"{value:.1f}"
        digits = 0 if key == "rmb" else 2
        return self._said(f"{value[0]:.{digits}f} to {value[1]:.{digits}f}")

    def h200(self, **wanted: Any) -> str:
        """A measurement on one H200: `of` is its name, `digits` the digits after the point, the rest find its row."""
        of, digits, table = wanted.pop("of"), wanted.pop("digits", 0), wanted.pop("table", "train_step")
        data = json.loads((ROOT / "bench" / "results" / "h200.json").read_text(encoding="utf-8"))
        rows = data[table] if table == "train_step" else data[table]["rows"]
        row = next(row for row in rows if all(row[name] == value for name, value in wanted.items()))
        return f"{row[of]:,.{digits}f}"

    def cpu(self, name: str, masked: bool = False) -> str:
        """The time of the published PyTorch code over ours, on two CPU cores."""
        key = "torch_masked_rows_over_jax" if masked else "torch_over_jax"
        return self.bench(f"pytorch_cpu_{name}", "results", name, key)

    def temporaries(self, whose: str) -> str:
        """MiB of temporaries of the loss: ours, or of logits of all positions."""
        data = json.loads((ROOT / "bench" / "results" / "loss.json").read_text(encoding="utf-8"))
        return f"{data['1x1']['temporaries_mib'][whose]:,.0f}"

    def puzzles(self, mode: str, seed: int = 0, *, first: bool = False) -> str:
        """The share of 1600 sudokus, or of the first 200, that a mode loses against the exact mode, in points."""
        name = "sampler_quality" if seed == 0 else f"sampler_quality_seed{seed}"
        rows = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        exact = next(row for row in rows if row["mode"] == "exact")
        row = next(row for row in rows if row["mode"] == mode)
        solved, puzzles = ("solved_of_first", 200) if first else ("solved", exact["puzzles"])
        return f"{100 * (exact[solved] - row[solved]) / puzzles:.2g}"

    def run_minutes(self) -> str:
        """The minutes that the run on GSM8K took."""
        folder = ROOT / "docs" / "runs" / "gsm8k-nano"
        return f"{json.loads((folder / 'summary.json').read_text(encoding='utf-8'))['seconds'] / 60:.0f}"

    def gsm8k(self, key: str) -> str:
        """A number of the run on GSM8K in docs/runs/gsm8k-nano."""
        folder = ROOT / "docs" / "runs" / "gsm8k-nano"
        with (folder / "eval.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        shown = lambda row: (
            f"{float(row['nll']):.2f} [{float(row['nll']) - 1.96 * float(row['nll_se']):.2f}, "
            f"{float(row['nll']) + 1.96 * float(row['nll_se']):.2f}]"
        )
        if key == "first":
            return shown(rows[0])
        if key == "last":
            return shown(rows[-1])
        if key == "falls":
            nll = [float(row["nll"]) for row in rows]
            return str(sum(after < before for before, after in itertools.pairwise(nll)))
        found = json.loads((folder / "unigram.json").read_text(encoding="utf-8"))
        if key == "share_of_ends":
            return f"{100 * found[key]:.0f} %"
        if key == "context":
            return f"{found['nll_ends_known'] - float(rows[-1]['nll']):.2f}"
        return f"{found[key]:.2f}"


def make_split() -> dict[str, int]:
    """What the test rows of countdown share with the training rows of seed 0, and how many test rows are independent.

    Returns:
      rows: test rows; distinct: different prompts among them; train_rows, train_prompts: training rows and their different
      prompts; same_prompt: test rows whose prompt is a training prompt; same_numbers: test rows whose numbers, in any
      order, and target are those of a training row; solutions: different solutions among the sudoku test rows.
    """
    task = TASKS["countdown"]
    test = task.examples("test", 0, 256)
    train = task.examples("train", 0, task.steps * 64)
    sort = lambda prompt: ("".join(sorted(prompt[:3])), prompt[3:])
    prompts = {row.prompt for row in train}
    orders = {sort(prompt) for prompt in prompts}
    return {
        "rows": len(test),
        "distinct": task.independent(len(test)),
        "train_rows": len(train),
        "train_prompts": len(prompts),
        "same_prompt": sum(row.prompt in prompts for row in test),
        "same_numbers": sum(sort(row.prompt) in orders for row in test),
        "solutions": TASKS["sudoku"].independent(len(test)),
    }


def _turned(row: Row, factor: float) -> Row:
    """A difference, or with factor -1 the opposite difference."""
    if factor > 0:
        return row
    swapped = {"low": -row["high"], "high": -row["low"], "least": -row["most"], "most": -row["least"]}
    return {**row, "mean": -row["mean"], **swapped}
