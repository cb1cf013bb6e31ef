"""Comparison of two runs: the settings that differ and the results. It draws no conclusion: each run is one sample."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from dream_jax.reports.record import LAST, Record, read_record, table

# Settings that do not change the result, because they only say where a run takes place.
_WHERE = ("out", "overwrite", "coordinator", "num_processes", "process_id")


def compare(first: pathlib.Path, second: pathlib.Path) -> str:
    """Returns a comparison of the runs in two folders as Markdown; runs that are not finished are marked.

    Raises:
      FileNotFoundError: one of the folders is not the folder of a run.
      ValueError: a file in one of the folders is damaged.
    """
    one, other = read_record(first), read_record(second)
    head = (str(first), str(second))
    lines = [f"# {head[0]} and {head[1]}", "", "## Settings that differ", ""]
    differing = _differing(one, other)
    lines += table(("setting", *head), differing) if differing else ["None."]
    if one.data and other.data and one.data["rows"]["digest"] != other.data["rows"]["digest"]:
        lines += ["", "The two runs were trained on different tokens, so their losses cannot be compared directly."]
    lines += ["", "## Results", "", *table(("", *head, "difference"), _results(one, other)), ""]
    return "\n".join(lines)


def _differing(one: Record, other: Record) -> list[tuple[str, Any, Any]]:
    """Returns name and both values of each setting that differs."""
    names = list(dict.fromkeys([*one.settings, *other.settings]))
    return [
        (f"`{name}`", one.settings.get(name), other.settings.get(name))
        for name in names
        if name not in _WHERE and one.settings.get(name) != other.settings.get(name)
    ]


def _results(one: Record, other: Record) -> list[tuple[Any, ...]]:
    """Returns the rows of the table of results: label, both values, difference."""
    rows: list[tuple[Any, ...]] = [
        ("finished", *("yes" if record.finished else "NO" for record in (one, other)), ""),
        ("steps taken", *(len(record.steps) for record in (one, other)), ""),
    ]
    for name in ("loss", "nll", "masked_accuracy", "grad_norm"):
        label = f"{name.replace('_', ' ')}, mean of the last {LAST} steps"
        rows.append(_measured(label, one.last(name), other.last(name)))
    if one.evaluations or other.evaluations:
        best = [None if (found := record.best()) is None else found["nll"] for record in (one, other)]
        grids = [record.grids[-1] if record.grids else None for record in (one, other)]
        rows.append(_held_out("best held-out nll during the run", best, grids))
    evaluated = [record.summary.get("eval") or {} for record in (one, other)]
    for name in dict.fromkeys([*evaluated[0], *evaluated[1]]):
        label, values = f"held-out {name.replace('_', ' ')}", [found.get(name) for found in evaluated]
        on = _TAKEN_ON.get(name)
        rows.append(
            _measured(label, *values)
            if on is None
            else _held_out(label, values, [found.get(on) for found in evaluated])
        )
    rows.append(_measured("seconds", *(record.summary.get("seconds") for record in (one, other))))
    rows.append(_measured("positions a second, median step", one.tokens_per_second(), other.tokens_per_second()))
    costs = [record.summary.get("cost") or {} for record in (one, other)]
    rows.append(_measured("RMB", *(cost.get("rmb") for cost in costs)))
    kinds = dict.fromkeys(incident["kind"] for record in (one, other) for incident in record.incidents)
    for kind in kinds:
        counts = [sum(incident["kind"] == kind for incident in record.incidents) for record in (one, other)]
        rows.append((f"incidents: {kind}", *counts, counts[1] - counts[0]))
    return rows


# For each score of the final evaluation the entry that identifies its rows. The other entries are counts.
_TAKEN_ON = dict.fromkeys(("nll", "nll_se", "masked_accuracy", "eos_accuracy"), "grid")
_TAKEN_ON["exact_accuracy"] = "answered"


def _held_out(label: str, values: Sequence[float | None], taken_on: Sequence[str | None]) -> tuple[Any, ...]:
    """Returns a row of the table, with a difference only if both numbers are known to be from the same rows."""
    if None not in values and not all(taken_on):
        return (label, *values, "the rows may differ")
    if None not in values and taken_on[0] != taken_on[1]:
        return (label, *values, "the rows differ")
    return _measured(label, *values)


def _measured(label: str, first: float | None, second: float | None) -> tuple[Any, ...]:
    """Returns a row of the table with the difference second - first; "-" if a number is missing or not finite."""
    numbers = isinstance(first, int | float) and isinstance(second, int | float)
    difference = f"{second - first:+.5g}" if numbers and math.isfinite(second - first) else "-"  # type: ignore[operator]
    return (label, first, second, difference)
