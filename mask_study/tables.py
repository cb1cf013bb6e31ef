"""Writes the numbers of a study as Markdown tables into a report, between comments that mark their positions.

Shares are percentages and differences of shares are percentage points. A number has its 95 % interval in brackets,
`81 [75, 87]`, or its lowest and highest seed in parentheses, `86 (64 to 98)`, where the seeds are too far apart for an
interval (see `summarise`). The tables of a file whose name ends in `.zh.md` have Chinese headings.

The measure "kept keys" in the result files, and the table with this name, are about the key/value cache.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mask_study.floors import floor_of
from mask_study.measures import ORDERS, TAU
from mask_study.variants import MASKS

TableRows = Sequence[Mapping[str, Any]]

_MARK = re.compile(r"(<!-- study.py writes: ([a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

CHINESE = {
    "addition": "加法",
    "copy": "复制",
    "reversal": "反转",
    "sudoku": "数独",
    "scattered sudoku": "打散的数独",
    "countdown": "countdown",
    "gsm8k": "GSM8K",
    "bidirectional": "双向",
    "causal": "因果",
    "prefix": "前缀",
    "block-causal:4": "分块因果:4",
    "block-causal:16": "分块因果:16",
    "window:4": "窗口:4",
    "block-causal:16, unshifted": "分块因果:16，无右移",
    "bidirectional, unshifted": "双向，无右移",
    "block-causal:4, unshifted": "分块因果:4，无右移",
    "uniform weight": "均匀权重",
    "linear weight": "线性权重",
    "inverse-time weight": "1/t 权重",
    "pads hidden": "隐藏填充",
    "random": "随机",
    "confidence": "按置信度",
    "left to right": "从左到右",
    "right to left": "从右到左",
    "task": "任务",
    "mask": "注意力掩码",
    "variant": "模型",
    "all": "全部",
    "floor": "下限",
    "excess": "高出",
    "a token a pass": "一次一个 token",
    "its passes": "其前向次数",
    "in 1 pass": "1 次前向",
    "nats a token": "每 token 的 nat",
    "largest difference of a logit": "logit 最大差",
    "KL, nats": "KL，nat",
    "same token, %": "token 相同，%",
    "computed, %": "重算，%",
    "pairs that attend, %": "可见的对，%",
    "step, s": "训练步，秒",
    "its temporaries, MiB": "临时内存，MiB",
    "sample, s": "采样，秒",
    "with kept keys, s": "保留键值，秒",
}


def fill(
    path: pathlib.Path, summary: TableRows, costs: TableRows, differences: TableRows, floors: TableRows = ()
) -> str:
    """Returns the text of the file, in which every marked table is replaced by one of these rows.

    Args:
      path: a Markdown file. `<!-- study.py writes: NAME -->` is the line before a table, `<!-- end -->` follows it.
      summary, costs, differences, floors: the rows of the tables of a study with these names.

    Raises:
      ValueError: a mark has the name of an unknown table.
    """
    text = path.read_text(encoding="utf-8")
    return fill_text(text, path, summary, costs, differences, floors)


def fill_text(
    text: str,
    path: pathlib.Path,
    summary: TableRows,
    costs: TableRows,
    differences: TableRows,
    floors: TableRows = (),
) -> str:
    """Returns `text` with its tables, as `fill` does for the text of a file; the path decides the language."""
    made: dict[str, Callable[[], list[list[str]]]] = {
        "accuracy": lambda: _accuracy(summary),
        "likelihood": lambda: _likelihood(summary, floors),
        "passes": lambda: _passes(summary),
        "ablations": lambda: _ablations(summary),
        "differences": lambda: _differences(differences),
        "kept keys": lambda: _cached_keys(summary),
        "costs": lambda: _costs(costs),
    }
    chinese = path.name.endswith(".zh.md")

    def table(found: re.Match[str]) -> str:
        if found[2] not in made:
            raise ValueError(f"{path} marks a table {found[2]!r}, which is not one of: {', '.join(made)}")
        head, *rows = made[found[2]]()
        lines = [head, ["---"] * len(head), *rows]
        if chinese:
            lines = [[translated(cell) for cell in line] for line in lines]
        return found[1] + "\n".join(["", *("| " + " | ".join(line) + " |" for line in lines), "", ""]) + found[4]

    return _MARK.sub(table, text)


def translated(text: str) -> str:
    """Returns the Chinese words for a cell or label of a table or figure; what has none stays as it is."""
    if passes := re.fullmatch(r"in (\d+) passes", text):
        return f"{passes[1]} 次前向"
    if above := re.fullmatch(r"all above (.*)", text):
        return f"概率超过 {above[1]} 的全写"
    return CHINESE.get(text, re.sub(r" to (?=[-+0-9.]+\))", " 至 ", text))


def of_seeds(row: Mapping[str, Any], digits: int, factor: float = 1.0, sign: str = "") -> str:
    """Returns a mean with its interval in brackets, or with its lowest and highest seed in parentheses.

    Args:
      row: a row of summary.csv or differences.csv.
      digits: number of digits after the point.
      factor: the numbers are multiplied by it, for example by 100 for percentages.
      sign: "+" for a sign on positive numbers too, "" for none.
    """

    def shown(value: float) -> str:
        text = f"{factor * value:{sign}.{digits}f}"
        return text.replace("-", "+" if sign else "") if float(text) == 0 else text  # not -0

    if math.isnan(row["low"]):
        return shown(row["mean"])
    if row.get("interval") == "seeds":
        return f"{shown(row['mean'])} ({shown(row['least'])} to {shown(row['most'])})"
    return f"{shown(row['mean'])} [{shown(row['low'])}, {shown(row['high'])}]"


def excludes_zero(row: Mapping[str, Any]) -> bool:
    """Returns whether the 95 % interval of a difference does not include 0; False if there is no interval."""
    return row.get("interval") != "seeds" and (row["low"] > 0 or row["high"] < 0)


def find(rows: TableRows, **wanted: str) -> Mapping[str, Any] | None:
    """Returns the first row with these values, or None."""
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def _names(rows: TableRows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _cell(row: Mapping[str, Any] | None, digits: int | None = None) -> str:
    """Returns a share in percent, or with `digits` a number of nats; an empty string if there is no row."""
    if row is None:
        return ""
    return of_seeds(row, 0, 100.0) if digits is None else of_seeds(row, digits)


def _pairs(rows: TableRows, among: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of task and variant that occur, in the order of the tasks and then of `among`."""
    found = {(row["task"], row["variant"]) for row in rows}
    return [(task, variant) for task in _names(rows, "task") for variant in among if (task, variant) in found]


def _accuracy(rows: TableRows) -> list[list[str]]:
    lines = []
    for task, variant in _pairs(rows, MASKS):
        cells = (_cell(find(rows, task=task, variant=variant, measure="accuracy", of=order)) for order in ORDERS)
        lines.append([task, variant, *cells])
    return [["task", "mask", *ORDERS], *lines]


def _likelihood(rows: TableRows, floors: TableRows) -> list[list[str]]:
    levels = sorted({row["of"] for row in rows if row["measure"] == "nll" and row["of"] != "all"})
    lines = []
    for task, variant in _pairs(rows, MASKS):
        found = [find(rows, task=task, variant=variant, measure="nll", of=of) for of in ("all", *levels)]
        floor = floor_of(task, variant, "all", floors)
        beside = ["", ""]
        if floor is not None and found[0] is not None:
            beside = [f"{floor:.3f}", f"{found[0]['mean'] - floor:.3f}"]
        lines.append([task, variant, _cell(found[0], 3), *beside, *(_cell(row, 3) for row in found[1:])])
    return [["task", "mask", "all", "floor", "excess", *levels], *lines]


def _passes(rows: TableRows) -> list[list[str]]:
    counts = sorted({row["of"] for row in rows if row["of"].startswith("in ")}, key=lambda of: int(of.split()[1]))
    rule = f"all above {TAU}"
    lines = []
    for task, variant in _pairs(rows, MASKS):
        mine = [row for row in rows if (row["task"], row["variant"], row["measure"]) == (task, variant, "accuracy")]
        cells = [_cell(find(mine, of=of)) for of in (*counts, "confidence", rule)]
        threshold = find(mine, of=rule)
        lines.append([task, variant, *cells, "" if threshold is None else f"{threshold['passes']:.1f}"])
    return [["task", "mask", *counts, "a token a pass", rule, "its passes"], *lines]


def _ablations(rows: TableRows) -> list[list[str]]:
    others = [name for name in _names(rows, "variant") if name not in MASKS]
    lines = []
    for task in _names(rows, "task"):
        mine = [name for name in others if find(rows, task=task, variant=name) is not None]
        if not mine:
            continue
        beside = ["bidirectional", *(["block-causal:4"] if any("block" in name for name in mine) else [])]
        for variant in (*beside, *mine):
            one = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            orders = (
                _cell(find(one, measure="accuracy", of=of)) for of in ("in 1 passes", "confidence", "left to right")
            )
            lines.append([task, variant, *orders, _cell(find(one, measure="nll", of="all"), 3)])
    return [["task", "variant", "in 1 pass", "confidence", "left to right", "nats a token"], *lines]


def _differences(rows: TableRows) -> list[list[str]]:
    """Returns the differences from the bidirectional model; those whose interval does not include zero are bold."""
    rows = [row for row in rows if row["minus"] == MASKS[0]]
    lines = []
    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        cells = []
        for name, of in (*(("accuracy", of) for of in ("in 1 passes", "confidence", "left to right")), ("nll", "all")):
            row = find(rows, task=task, variant=variant, measure=name, of=of)
            if row is None:
                cells.append("")
                continue
            digits = 3 if abs(row["mean"]) >= 5e-4 else 4
            text = of_seeds(row, digits, sign="+") if name == "nll" else of_seeds(row, 0, 100.0, "+")
            cells.append(f"**{text}**" if excludes_zero(row) else text)
        lines.append([task, variant, *cells])
    return [["task", "variant", "in 1 pass", "confidence", "left to right", "nats a token"], *lines]


def _cached_keys(rows: TableRows) -> list[list[str]]:
    lines = []
    for task, variant in _pairs([row for row in rows if row["measure"] == "kept keys"], MASKS):
        found = {row["of"]: row for row in rows if (row["task"], row["variant"]) == (task, variant)}
        # A divergence below the rounding of float32 can be negative, as it is a difference of two sums.
        values = (f"{found['largest']['mean']:.2g}", f"{max(0.0, found['divergence']['mean']):.2g}")
        if found["computed"]["mean"] < 0.6:  # The answer has more than one block.
            shares = (f"{100 * found['agreement']['mean']:.1f}", f"{100 * found['computed']['mean']:.0f}")
            lines.append([task, variant, *values, *shares])
    return [["task", "mask", "largest difference of a logit", "KL, nats", "same token, %", "computed, %"], *lines]


def _costs(rows: TableRows) -> list[list[str]]:
    lines = [
        [
            row["mask"],
            f"{100 * row['pairs']:.0f}",
            f"{row['step_seconds']:.3f}",
            f"{row['step_temp_mib']:.0f}",
            f"{row['sample_seconds']:.2f}",
            f"{row['sample_cached_seconds']:.2f}",
        ]
        for row in rows
    ]
    return [
        ["mask", "pairs that attend, %", "step, s", "its temporaries, MiB", "sample, s", "with kept keys, s"],
        *lines,
    ]
