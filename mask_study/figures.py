"""Draws the figures of a study from the rows of `summary.csv`.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish; series also differ in their marker.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from dream_jax.files import replacing
from dream_jax.paths import check_replaceable, is_png
from mask_study.measures import ORDERS, TAU
from mask_study.variants import MASKS

TableRows = Sequence[dict[str, Any]]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw_all(rows: TableRows, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws each figure for which there are rows, as PNG files in the folder, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[TableRows], Any]] = {
        "orders.png": _orders,
        "likelihood.png": _likelihood,
        "passes.png": _passes,
        "written_at.png": _written_at,
        "ablations.png": _ablations,
    }
    paths = []
    for name, draw in figures.items():
        figure = draw(rows)
        if figure is None:
            continue
        check_replaceable(folder / name, "a PNG picture", is_png)
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        paths.append(folder / name)
    return paths


def _figure(columns: int, width: float, height: float, lines: int = 1) -> tuple[Any, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    return figure, [axes for line in grid for axes in line]


def _panels(tasks: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Returns a figure with one panel per task, three in a line, and the panels by task."""
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, panels = _figure(columns, 3.4 * columns + 0.6, 3.1 * lines + 0.8, lines)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    return figure, dict(zip(tasks, panels, strict=False))


def _finish(figure: Any, panels: dict[str, Any], label: str, columns: int, title: str | None = None) -> None:
    """Labels the vertical axis and adds one legend for all panels."""
    figure.supylabel(label, fontsize=10)
    marks: dict[str, Any] = {}
    for axes in panels.values():
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            marks.setdefault(name, handle)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=columns, title=title)


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _names(rows: TableRows, key: str, among: Sequence[str] | None = None) -> list[str]:
    found = list(dict.fromkeys(row[key] for row in rows))
    return found if among is None else [name for name in among if name in found]


def _only(rows: TableRows, **wanted: str) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _points(axes: Any, xs: Sequence[float], rows: TableRows, number: int, label: str, line: str = "-") -> None:
    heights = [row["mean"] for row in rows]
    axes.errorbar(
        xs, heights, yerr=_errors(rows), label=label, linestyle=line, capsize=2, markersize=5, **_style(number)
    )


def _errors(rows: TableRows) -> list[list[float]]:
    """Returns how far each interval extends below and above its mean; 0 for a single seed.

    The lower end of an error bar is at least a hundredth of the mean, because a logarithmic axis cannot show less.
    """
    ends = [
        (0.0, 0.0)
        if math.isnan(row["low"])
        else (row["mean"] - max(row["low"], row["mean"] / 100), row["high"] - row["mean"])
        for row in rows
    ]
    return [[max(0.0, end[side]) for end in ends] for side in (0, 1)]


def _orders(rows: TableRows) -> Any:
    """Draws accuracy by order of writing: a panel per task, a point per mask and order."""
    rows = _only(rows, measure="accuracy")
    tasks, variants = _names(rows, "task"), _names(rows, "variant", MASKS)
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        for number, order in enumerate(ORDERS):
            found = [_only(rows, task=task, variant=variant, of=order) for variant in variants]
            here = [(column, one[0]) for column, one in enumerate(found) if one]
            xs = [column + 0.17 * (number - 1.5) for column, _ in here]
            _points(axes, xs, [row for _, row in here], number, order, line="none")
        axes.set(title=task, ylim=(-0.03, 1.03))
        axes.set_xticks(range(len(variants)), variants, rotation=35, ha="right")
        axes.grid(axis="y", alpha=0.3)
    _finish(figure, panels, "share of answers that are right", 4, "order of writing")
    return figure


def _likelihood(rows: TableRows) -> Any:
    """Draws nats per masked token by noise level: a panel per task, a line per mask."""
    rows = [row for row in _only(rows, measure="nll") if row["of"] != "all"]
    tasks, variants, levels = _names(rows, "task"), _names(rows, "variant", MASKS), _names(rows, "of")
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        for number, variant in enumerate(variants):
            here = [row for level in levels for row in _only(rows, task=task, variant=variant, of=level)]
            if here:
                aside = 0.015 * (number - (len(variants) - 1) / 2)  # The shift keeps markers from hiding each other.
                xs = [(levels.index(row["of"]) + 0.5) / len(levels) + aside for row in here]
                _points(axes, xs, here, number, variant)
        axes.set(title=task, xlabel="noise level t", xlim=(0, 1), yscale="log")
        axes.grid(alpha=0.3)
    _finish(figure, panels, "nats per masked token, on a logarithmic axis", 5)
    return figure


def _passes(rows: TableRows) -> Any:
    """Draws accuracy by forward passes: a panel per task, a line per mask, a hollow point for the threshold."""
    rows = _only(rows, measure="accuracy")
    tasks, variants = _names(rows, "task"), _names(rows, "variant", MASKS)
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        for number, variant in enumerate(variants):
            mine = _only(rows, task=task, variant=variant)
            few = [row for row in mine if row["of"].startswith("in ")] + _only(mine, of="confidence")
            few.sort(key=lambda row: row["passes"])
            _points(axes, [row["passes"] for row in few], few, number, variant)
            for row in (row for row in mine if row["of"].startswith("all above")):
                axes.plot(row["passes"], row["mean"], markerfacecolor="none", markersize=10, **_style(number))
        axes.set_xscale("log", base=2)
        axes.set(title=task, xlabel="forward passes", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    _finish(
        figure, panels, "share of answers that are right", 5, f"hollow: all tokens above a probability of {TAU} at once"
    )
    return figure


def _written_at(rows: TableRows) -> Any:
    """Draws the step at which the order by confidence writes each position: a panel per task, a line per mask."""
    rows = _only(rows, measure="written at")
    tasks, variants = _names(rows, "task"), _names(rows, "variant", MASKS)
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        for number, variant in enumerate(variants):
            here = sorted(_only(rows, task=task, variant=variant), key=lambda row: int(row["of"]))
            if here:
                _points(axes, [int(row["of"]) for row in here], here, number, variant)
        last = max(int(row["of"]) for row in _only(rows, task=task))
        axes.set(title=task, xlabel="position in the answer", ylim=(-0.5, last + 0.5))
        axes.grid(alpha=0.3)
    _finish(figure, panels, "mean step at which it is written", 5)
    return figure


def _ablations(rows: TableRows) -> Any:
    """Draws accuracy and likelihood of variants that differ in more than the mask, and of the bidirectional model."""
    others = [name for name in _names(rows, "variant") if name not in MASKS]
    if not others:
        return None
    tasks = [task for task in _names(rows, "task") if any(row["variant"] in others for row in _only(rows, task=task))]
    figure, panels = _figure(len(tasks), 4.2 * len(tasks) + 0.6, 6.3, lines=3)
    asked = (
        ("accuracy", "in 1 passes", "right answers, in one pass"),
        ("accuracy", "confidence", "right answers, by confidence"),
        ("nll", "all", "nats per masked token"),
    )
    for line, (name, of, label) in enumerate(asked):
        for column, task in enumerate(tasks):
            axes = panels[line * len(tasks) + column]
            here = [row for row in _only(rows, task=task, measure=name, of=of)]
            here.sort(key=lambda row: (row["variant"] in others, row["variant"]))
            for line_of_row, row in enumerate(here):
                style = _style(1 if row["variant"] in others else 0)
                axes.errorbar([row["mean"]], [line_of_row], xerr=_errors([row]), capsize=2, linestyle="none", **style)
            axes.set_yticks(range(len(here)), [row["variant"] for row in here])
            axes.invert_yaxis()
            axes.margins(y=0.1)
            axes.set(title=task if line == 0 else "", xlabel=label)
            axes.grid(axis="x", alpha=0.3)
    figure.suptitle("circles: masks as they are; squares: with something else changed", fontsize=9)
    return figure
