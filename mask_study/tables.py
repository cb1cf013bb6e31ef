"""Writes the numbers of a study as Markdown tables into a report, between comments that mark their positions.

The measure "kept keys" in the result files, and the table with this name, are about the key/value cache.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mask_study.measures import ORDERS, TAU
from mask_study.variants import MASKS

TableRows = Sequence[Mapping[str, Any]]

_MARK = re.compile(r"(<!-- study.py writes: ([a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(path: pathlib.Path, summary: TableRows, costs: TableRows, differences: TableRows) -> str:
    """Returns the text of the file, in which every marked table is replaced by one of these rows.

    Args:
      path: a Markdown file. `<!-- study.py writes: NAME -->` is the line before a table, `<!-- end -->` follows it.
      summary, costs, differences: the rows of the tables of a study with these names.

    Raises:
      ValueError: a mark has the name of an unknown table.
    """
    made: dict[str, Callable[[], list[str]]] = {
        "accuracy": lambda: _accuracy(summary),
        "likelihood": lambda: _likelihood(summary),
        "passes": lambda: _passes(summary),
        "ablations": lambda: _ablations(summary),
        "differences": lambda: _differences(differences),
        "kept keys": lambda: _cached_keys(summary),
        "costs": lambda: _costs(costs),
    }

    def table(found: re.Match[str]) -> str:
        if found[2] not in made:
            raise ValueError(f"{path} marks a table {found[2]!r}, which is not one of: {', '.join(made)}")
        return found[1] + "\n".join(["", *made[found[2]](), "", ""]) + found[4]

    return _MARK.sub(table, path.read_text(encoding="utf-8"))


def _find(rows: TableRows, **wanted: str) -> Mapping[str, Any] | None:
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def _names(rows: TableRows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _cell(row: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Returns a mean and its interval as text, or an empty string if there is no row."""
    if row is None:
        return ""
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return f"{row['mean']:.{digits}f}{interval}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def _pairs(rows: TableRows, among: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of task and variant that occur, in the order of the tasks and then of `among`."""
    found = {(row["task"], row["variant"]) for row in rows}
    return [(task, variant) for task in _names(rows, "task") for variant in among if (task, variant) in found]


def _accuracy(rows: TableRows) -> list[str]:
    lines = []
    for task, variant in _pairs(rows, MASKS):
        cells = (_cell(_find(rows, task=task, variant=variant, measure="accuracy", of=order)) for order in ORDERS)
        lines.append([task, variant, *cells])
    return _table(["task", "mask", *ORDERS], lines)


def _likelihood(rows: TableRows) -> list[str]:
    levels = sorted({row["of"] for row in rows if row["measure"] == "nll" and row["of"] != "all"})
    lines = []
    for task, variant in _pairs(rows, MASKS):
        cells = (_cell(_find(rows, task=task, variant=variant, measure="nll", of=of), 3) for of in ("all", *levels))
        lines.append([task, variant, *cells])
    return _table(["task", "mask", "all", *levels], lines)


def _passes(rows: TableRows) -> list[str]:
    counts = sorted({row["of"] for row in rows if row["of"].startswith("in ")}, key=lambda of: int(of.split()[1]))
    rule = f"all above {TAU}"
    lines = []
    for task, variant in _pairs(rows, MASKS):
        mine = [row for row in rows if (row["task"], row["variant"], row["measure"]) == (task, variant, "accuracy")]
        cells = [_cell(_find(mine, of=of)) for of in (*counts, "confidence", rule)]
        threshold = _find(mine, of=rule)
        lines.append([task, variant, *cells, "" if threshold is None else f"{threshold['passes']:.1f}"])
    return _table(["task", "mask", *counts, "a token a pass", rule, "its passes"], lines)


def _ablations(rows: TableRows) -> list[str]:
    others = [name for name in _names(rows, "variant") if name not in MASKS]
    lines = []
    for task in _names(rows, "task"):
        mine = [name for name in others if _find(rows, task=task, variant=name) is not None]
        if not mine:
            continue
        beside = ["bidirectional", *(["block-causal:4"] if any("block" in name for name in mine) else [])]
        for variant in (*beside, *mine):
            one = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            orders = (
                _cell(_find(one, measure="accuracy", of=of)) for of in ("in 1 passes", "confidence", "left to right")
            )
            lines.append([task, variant, *orders, _cell(_find(one, measure="nll", of="all"), 3)])
    return _table(["task", "variant", "in 1 pass", "confidence", "left to right", "nats a token"], lines)


def _differences(rows: TableRows) -> list[str]:
    """Returns the differences from the bidirectional model; those whose interval does not include zero are bold."""
    rows = [row for row in rows if row["minus"] == MASKS[0]]
    asked = (("accuracy", "in 1 passes", 2), ("accuracy", "confidence", 2), ("accuracy", "left to right", 2))
    lines = []
    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        cells = []
        for name, of, digits in (*asked, ("nll", "all", 3)):
            row = _find(rows, task=task, variant=variant, measure=name, of=of)
            if row is None:
                cells.append("")
                continue
            text = f"{row['mean']:+.{digits}f} [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
            cells.append(f"**{text}**" if row["low"] > 0 or row["high"] < 0 else text)
        lines.append([task, variant, *cells])
    return _table(["task", "variant", "in 1 pass", "confidence", "left to right", "nats a token"], lines)


def _cached_keys(rows: TableRows) -> list[str]:
    lines = []
    for task, variant in _pairs([row for row in rows if row["measure"] == "kept keys"], MASKS):
        found = {row["of"]: row for row in rows if (row["task"], row["variant"]) == (task, variant)}
        values = (f"{found['largest']['mean']:.2g}", f"{found['divergence']['mean']:.2g}")
        if found["computed"]["mean"] < 0.6:  # The answer has more than one block.
            lines.append(
                [task, variant, *values, f"{found['agreement']['mean']:.3f}", f"{found['computed']['mean']:.2f}"]
            )
    return _table(["task", "mask", "largest difference of a logit", "KL, nats", "same token", "share computed"], lines)


def _costs(rows: TableRows) -> list[str]:
    lines = [
        [
            row["mask"],
            f"{row['pairs']:.2f}",
            f"{row['step_seconds']:.3f}",
            f"{row['step_temp_mib']:.0f}",
            f"{row['sample_seconds']:.2f}",
            f"{row['sample_cached_seconds']:.2f}",
        ]
        for row in rows
    ]
    head = ["mask", "pairs that attend", "step, s", "its temporaries, MiB", "sample, s", "with kept keys, s"]
    return _table(head, lines)
