"""Draws the figures of a study from the rows of `summary.csv`, in English as PNG and in Chinese as SVG.

A point is the mean over seeds. Its whiskers reach from the lowest to the highest seed, so both ends are measured numbers.
What was not run is said in words, so it cannot be taken for a zero. Dashed lines are floors: no model of this kind can have
fewer nats. The colours are those of Okabe and Ito, which colour-blind readers can distinguish; series also differ in
their marker.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dream_jax.files import replacing
from dream_jax.paths import check_replaceable, is_png
from mask_study.floors import floor_of
from mask_study.measures import ORDERS, TAU
from mask_study.tables import translated
from mask_study.variants import MASKS

TableRows = Sequence[dict[str, Any]]
Curves = Sequence[tuple[str, str, int, Sequence[float]]]
"""Task, variant, seed and the training nll of each twentieth of the steps, for each run."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_CHINESE = {
    "order of writing": "书写顺序",
    "right answers, %": "全对率，%",
    "noise level t": "噪声水平 t",
    "nats per masked token": "每个 [M] 的 nat",
    "dashed: the floor of the mask of this colour": "虚线：该颜色的注意力掩码的下限",
    "forward passes": "前向次数",
    "position in the answer": "答案中的位置",
    "mean step at which it is written": "写下它的平均步数",
    "right answers in one pass, %": "一次前向的全对率，%",
    "right answers by confidence, %": "按置信度的全对率，%",
    "share of the training": "训练进度",
    "nats per masked token of training rows": "训练行上每个 [M] 的 nat",
    "one line per seed": "每个种子一条线",
    "circles: masks as they are; squares: with something else changed": "圆：只换注意力掩码；方：另有改动",
    f"hollow: all tokens above a probability of {TAU} at once": f"空心：概率超过 {TAU} 的 token 一次全写",
}
_FONTS = ["Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "SimHei", "DejaVu Sans"]


class _Words:
    """The language of the labels."""

    def __init__(self, chinese: bool):
        self._chinese = chinese

    def __call__(self, text: str) -> str:
        return _CHINESE.get(text, translated(text)) if self._chinese else text

    def missing(self, names: Sequence[str], *, run: bool = False) -> str:
        """Returns what was not run, or with `run` what was run but not measured."""
        if self._chinese:
            return ("未测量：" if run else "未运行：") + "、".join(map(self, names))
        return ("not measured: " if run else "not run: ") + ", ".join(map(self, names))


def draw_all(rows: TableRows, folder: pathlib.Path, curves: Curves = (), floors: TableRows = ()) -> list[pathlib.Path]:
    """Draws each figure for which there are rows into the folder, NAME.png and NAME.zh.svg, and returns their paths.

    The text of an SVG file is text, so the reader's program needs a font with Chinese letters and this one does not.

    Args:
      rows: the rows of summary.csv.
      folder: the folder of the figures.
      curves: the training curves of all runs; without them there is no figure of them.
      floors: the rows of floors.csv; without them no dashed lines are drawn for countdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[_Words], Any]] = {
        "orders": lambda words: _orders(rows, words),
        "likelihood": lambda words: _likelihood(rows, floors, words),
        "passes": lambda words: _passes(rows, words),
        "learning": lambda words: _learning(curves, words),
        "written_at": lambda words: _written_at(rows, words),
        "ablations": lambda words: _ablations(rows, words),
    }
    paths = []
    for name, draw in figures.items():
        for chinese in (False, True):
            path = folder / (f"{name}.zh.svg" if chinese else f"{name}.png")
            options: Any = {}
            if chinese:
                options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
                options["font.sans-serif"] = _FONTS
            with matplotlib.rc_context(options), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
                figure = draw(_Words(chinese))
                if figure is None:
                    continue
                check_replaceable(path, "a picture", _is_svg if chinese else is_png)
                with replacing(path) as temporary:
                    if chinese:
                        figure.savefig(temporary, format="svg", metadata={"Date": None})
                    else:
                        figure.savefig(temporary, dpi=130, format="png")
            paths.append(path)
    return paths


def _is_svg(content: bytes) -> bool:
    return b"<svg" in content[:2000]


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


def _points(
    axes: Any, xs: Sequence[float], rows: TableRows, number: int, label: str, line: str = "-", factor: float = 1.0
) -> None:
    heights = [factor * row["mean"] for row in rows]
    axes.errorbar(
        xs, heights, yerr=_errors(rows, factor), label=label, linestyle=line, capsize=2, markersize=5, **_style(number)
    )


def _errors(rows: TableRows, factor: float = 1.0) -> list[list[float]]:
    """Returns how far the lowest and the highest seed are below and above the mean."""
    # Rounding of the mean can put it outside of equal seeds.
    below = [factor * max(0.0, row["mean"] - row["least"]) for row in rows]
    above = [factor * max(0.0, row["most"] - row["mean"]) for row in rows]
    return [below, above]


def _say_missing(axes: Any, names: Sequence[str], words: _Words, *, run: bool = False) -> None:
    """Writes into a panel which variants were not run on its task, or with `run` which were not measured."""
    if names:
        axes.text(
            0.5,
            0.985,
            words.missing(names, run=run),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=6.5,
            color="#777777",
        )


def _orders(rows: TableRows, words: _Words) -> Any:
    """Draws accuracy by order of writing: a panel per task, a point per mask and order."""
    rows = _only(rows, measure="accuracy")
    tasks, variants = _names(rows, "task"), _names(rows, "variant", MASKS)
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        mine = [variant for variant in variants if _only(rows, task=task, variant=variant)]
        for number, order in enumerate(ORDERS):
            here = [row for variant in mine for row in _only(rows, task=task, variant=variant, of=order)]
            xs = [mine.index(row["variant"]) + 0.17 * (number - 1.5) for row in here]
            _points(axes, xs, here, number, words(order), line="none", factor=100.0)
        axes.set(title=words(task), ylim=(-3, 112))
        axes.set_yticks(range(0, 101, 20))
        axes.set_xticks(range(len(mine)), map(words, mine), rotation=35, ha="right")
        axes.grid(axis="y", alpha=0.3)
        _say_missing(axes, [variant for variant in variants if variant not in mine], words)
    _finish(figure, panels, words("right answers, %"), 4, words("order of writing"))
    return figure


def _likelihood(rows: TableRows, floors: TableRows, words: _Words) -> Any:
    """Draws nats per masked token by noise level: a panel per task, a line per mask, a dashed line per floor above 0."""
    rows = [row for row in _only(rows, measure="nll") if row["of"] != "all"]
    tasks, variants, levels = _names(rows, "task"), _names(rows, "variant", MASKS), _names(rows, "of")
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        missing = []
        for number, variant in enumerate(variants):
            here = [row for level in levels for row in _only(rows, task=task, variant=variant, of=level)]
            if not here:
                missing.append(variant)
                continue
            aside = 0.015 * (number - (len(variants) - 1) / 2)  # The shift keeps markers from hiding each other.
            xs = [(levels.index(row["of"]) + 0.5) / len(levels) + aside for row in here]
            _points(axes, xs, here, number, words(variant))
            lines = [floor_of(task, variant, row["of"], floors) for row in here]
            if all(lines):  # a floor of 0 has no position on a logarithmic axis
                axes.plot(xs, lines, linestyle="--", linewidth=1, color=_style(number)["color"])
        axes.set(title=words(task), xlabel=words("noise level t"), xlim=(0, 1), yscale="log")
        axes.grid(alpha=0.3)
        _say_missing(axes, missing, words)
    _finish(figure, panels, words("nats per masked token"), 5, words("dashed: the floor of the mask of this colour"))
    return figure


def _passes(rows: TableRows, words: _Words) -> Any:
    """Draws accuracy by forward passes: a panel per task, a line per mask, a hollow point for the threshold."""
    rows = _only(rows, measure="accuracy")
    tasks, variants = _names(rows, "task"), _names(rows, "variant", MASKS)
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        missing = []
        for number, variant in enumerate(variants):
            mine = _only(rows, task=task, variant=variant)
            if not mine:
                missing.append(variant)
                continue
            few = [row for row in mine if row["of"].startswith("in ")] + _only(mine, of="confidence")
            few.sort(key=lambda row: row["passes"])
            _points(axes, [row["passes"] for row in few], few, number, words(variant), factor=100.0)
            for row in (row for row in mine if row["of"].startswith("all above")):
                axes.plot(row["passes"], 100 * row["mean"], markerfacecolor="none", markersize=10, **_style(number))
        axes.set_xscale("log", base=2)
        axes.set(title=words(task), xlabel=words("forward passes"), ylim=(-3, 112))
        axes.set_yticks(range(0, 101, 20))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        _say_missing(axes, missing, words)
    hollow = words(f"hollow: all tokens above a probability of {TAU} at once")
    _finish(figure, panels, words("right answers, %"), 5, hollow)
    return figure


def _learning(curves: Curves, words: _Words) -> Any:
    """Draws the training nll of each run: a panel per task, a line per mask and seed."""
    tasks = list(dict.fromkeys(task for task, *_ in curves))
    variants = [name for name in MASKS if any(variant == name for _, variant, *_ in curves)]
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        missing = []
        for number, variant in enumerate(variants):
            mine = [nll for of, name, _, nll in curves if (of, name) == (task, variant)]
            if not mine:
                missing.append(variant)
            for line, nll in enumerate(mine):
                label = words(variant) if line == 0 else None
                xs = [(part + 0.5) / len(nll) for part in range(len(nll))]
                axes.plot(xs, nll, label=label, linewidth=1, color=_style(number)["color"])
        axes.set(title=words(task), xlabel=words("share of the training"), xlim=(0, 1), yscale="log")
        axes.grid(alpha=0.3)
        _say_missing(axes, missing, words)
    _finish(figure, panels, words("nats per masked token of training rows"), 5, words("one line per seed"))
    return figure


def _written_at(rows: TableRows, words: _Words) -> Any:
    """Draws the step at which the order by confidence writes each position: a panel per task, a line per mask."""
    rows = _only(rows, measure="written at")
    tasks, variants = _names(rows, "task"), _names(rows, "variant", MASKS)
    if not variants:
        return None
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        missing = []
        for number, variant in enumerate(variants):
            here = sorted(_only(rows, task=task, variant=variant), key=lambda row: int(row["of"]))
            if here:
                _points(axes, [int(row["of"]) for row in here], here, number, words(variant))
            else:
                missing.append(variant)
        last = max(int(row["of"]) for row in _only(rows, task=task))
        axes.set(title=words(task), xlabel=words("position in the answer"), ylim=(-0.5, 1.12 * last + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        _say_missing(axes, missing, words)
    _finish(figure, panels, words("mean step at which it is written"), 5)
    return figure


def _ablations(rows: TableRows, words: _Words) -> Any:
    """Draws accuracy and likelihood of variants that differ in more than the mask, and of the bidirectional model."""
    others = [name for name in _names(rows, "variant") if name not in MASKS]
    if not others:
        return None
    tasks = [task for task in _names(rows, "task") if any(row["variant"] in others for row in _only(rows, task=task))]
    figure, panels = _figure(len(tasks), 4.2 * len(tasks) + 0.6, 6.3, lines=3)
    asked = (
        ("accuracy", "in 1 passes", "right answers in one pass, %", 100.0),
        ("accuracy", "confidence", "right answers by confidence, %", 100.0),
        ("nll", "all", "nats per masked token", 1.0),
    )
    for line, (name, of, label, factor) in enumerate(asked):
        for column, task in enumerate(tasks):
            axes = panels[line * len(tasks) + column]
            here = [row for row in _only(rows, task=task, measure=name, of=of)]
            here.sort(key=lambda row: (row["variant"] in others, row["variant"]))
            for line_of_row, row in enumerate(here):
                style = _style(1 if row["variant"] in others else 0)
                axes.errorbar(
                    [factor * row["mean"]],
                    [line_of_row],
                    xerr=_errors([row], factor),
                    capsize=2,
                    linestyle="none",
                    **style,
                )
            axes.set_yticks(range(len(here)), [words(row["variant"]) for row in here])
            axes.invert_yaxis()
            measured = [row["variant"] for row in here]
            absent = [name for name in _names(_only(rows, task=task), "variant") if name not in measured]
            axes.margins(y=0.2 if absent else 0.1)
            _say_missing(axes, absent, words, run=True)
            axes.set(title=words(task) if line == 0 else "", xlabel=words(label))
            axes.grid(axis="x", alpha=0.3)
    figure.suptitle(words("circles: masks as they are; squares: with something else changed"), fontsize=9)
    return figure
