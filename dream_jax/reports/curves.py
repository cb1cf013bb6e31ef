"""The curves of a run as a picture: loss, accuracy (each also on held-out rows), learning rate and gradient norm."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np

from dream_jax.files import replacing
from dream_jax.paths import check_replaceable, is_png
from dream_jax.reports.record import MetricRows, Record

FILE = "curves.png"


def draw_curves(record: Record) -> pathlib.Path:
    """Draws `curves.png` in the run's folder, and returns its path."""
    from matplotlib.figure import Figure  # imported here: it takes half a second, and a training run does not need it

    figure = Figure(figsize=(10, 7), layout="constrained")
    (loss, accuracy), (rate, norm) = figure.subplots(2, 2)
    _curve(loss, record.steps, "loss", smooth=True)
    _curve(loss, record.steps, "nll", smooth=True)
    _curve(loss, record.alike, "nll", label="held-out nll", marker="o")
    loss.set(title="loss, and nats per masked token", xlabel="step")
    _curve(accuracy, record.steps, "masked_accuracy", smooth=True)
    _curve(accuracy, record.alike, "masked_accuracy", label="held-out masked accuracy", marker="o")
    accuracy.set(title="share of masked positions predicted correctly", xlabel="step")
    _curve(rate, record.steps, "learning_rate")
    rate.set(title="learning rate", xlabel="step")
    _curve(norm, record.steps, "grad_norm", smooth=True)
    norm.set(title="gradient norm before clipping", xlabel="step")
    for axes in (loss, accuracy, rate, norm):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    for incident in record.incidents:
        if incident["step"] is not None and incident["kind"] != "warning":
            loss.axvline(incident["step"], color="grey", linestyle=":", linewidth=1)
    path = record.folder / FILE
    check_replaceable(path, "a PNG picture", is_png)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def _curve(
    axes: Any, rows: MetricRows, name: str, *, label: str | None = None, smooth: bool = False, marker: str = ""
) -> None:
    """Draws the finite values of one metric over the steps; with `smooth` and over 40 values also a moving average."""
    points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
    if not points:
        return
    steps, values = np.array(points).T
    if smooth and len(values) > 40:
        width = len(values) // 20
        axes.plot(steps, values, alpha=0.25, linewidth=0.8)
        # A moving average; at the ends it is the mean of fewer points.
        weights = np.ones(width)
        means = np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")
        axes.plot(steps, means, label=label or name, color=axes.lines[-1].get_color())
    else:
        axes.plot(steps, values, label=label or name, marker=marker)
