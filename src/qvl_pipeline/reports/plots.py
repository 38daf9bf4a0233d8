"""Geometry of the line plots of pages: figures become SVG paths, the template draws them in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

WIDTH = 1000
MOST_POINTS = 1000
FEW_POINTS = 30
SMOOTHING_SHARE = 50
LEARNING_RATE = "learning_rate"
LOW = 90  # pixels: a plot of this height has room for two ticks


@dataclass(frozen=True)
class Panel:
    """One plot: `x` runs over `WIDTH` units and is stretched to the page, `y` is in pixels from the top.

    Attributes:
        title: What is plotted.
        height: Height in pixels.
        x_ticks: Position in percent of the width and label of each tick.
        y_ticks: Position in pixels and label of each tick.
        lines: CSS class and SVG path of each line.
        legend: CSS class and name of each line that needs one.
    """

    title: str
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]
    legend: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingCurves:
    """What was logged over the optimizer steps.

    Attributes:
        loss: The loss as logged, its running mean, and the eval loss; `None` when no finite loss was logged.
        others: Gradient norm, learning rate, speed, memory and waiting, as far as they were logged.
        window: Logged steps in the running mean that is the smooth line.
        stride: Every `stride`-th logged step is drawn.
        not_finite: Logged steps whose loss is not a finite number, left out of the plot.
    """

    loss: Panel | None
    others: list[Panel]
    window: int
    stride: int
    not_finite: int


# Columns of the logged steps that are drawn below the loss. Percentages are shares there.
_OTHERS = {
    "grad_norm": "Gradient norm",
    LEARNING_RATE: "Learning rate",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilisation, %",
    "peak_memory_gib": "Peak memory, GiB",
    "data_wait_share": "Waiting for data, % of the time",
}
_SHARES = ("mfu", "data_wait_share")


def training_curves(training_metrics: pd.DataFrame) -> TrainingCurves:
    """Lay out all curves of a training: the loss (as logged, and its centred running mean), and what else was logged.

    Args:
        training_metrics: Column `step`, and any of `loss`, `eval_loss`, `grad_norm`, `learning_rate`,
            `learning_rate/<part>`, `tokens_per_second`, `mfu`, `peak_memory_gib` and `data_wait_share`; one row for
            every logged step.

    Returns:
        The panels with what the reader has to know about them.
    """
    finite = training_metrics[np.isfinite(training_metrics["loss"].astype(float))]
    window = 2 * (len(finite) // SMOOTHING_SHARE) + 1  # odd, so that it is centred
    stride = math.ceil(len(finite) / MOST_POINTS) or 1
    not_finite = len(training_metrics) - len(finite)
    if finite.empty:
        return TrainingCurves(None, [], window, stride, not_finite)
    smooth = finite["loss"].rolling(window, center=True, min_periods=1).mean()
    shown = finite.assign(smooth=smooth).iloc[::stride]
    lines = {"raw": _points(shown, "loss"), "smooth": _points(shown, "smooth")}
    legend = []
    if evaluated := _points(finite, "eval_loss"):  # at few of the steps: none is passed over
        lines["eval"], legend = evaluated, [("raw", "training"), ("eval", "eval split")]
    loss = panel("Loss", 220, lines, y_bins=5, legend=legend)
    others = [drawn for name, title in _OTHERS.items() if (drawn := _other(shown, name, title))]
    return TrainingCurves(loss, others, window, stride, not_finite)


def _other(shown: pd.DataFrame, name: str, title: str) -> Panel | None:
    scale = 100 if name in _SHARES else 1
    parts = [column for column in shown if name == LEARNING_RATE and column.startswith(f"{LEARNING_RATE}/")]
    if parts:
        classes = {f"part{number}": column for number, column in enumerate(parts)}
        lines = {of: points for of, column in classes.items() if (points := _points(shown, column))}
        legend = [(of, classes[of].partition("/")[2]) for of in lines]
    else:
        points = _points(shown, name, scale)
        lines, legend = {"rate": points} if points else {}, []
    return panel(title, LOW, lines, y_bins=2, legend=legend) if lines else None


def _points(rows: pd.DataFrame, column: str, scale: float = 1) -> tuple[list[float], list[float]] | None:
    """Return steps and finite values of a column; nothing where it has none."""
    if column not in rows:
        return None
    values = rows[column].astype(float)
    kept = np.isfinite(values)
    return (rows["step"][kept].tolist(), (scale * values[kept]).tolist()) if kept.any() else None


def overlay(title: str, height: int, curves: dict[str, pd.Series]) -> Panel | None:
    """Lay out curves of several runs in one plot: thin as logged, thick as centred running mean.

    Args:
        title: What is plotted.
        height: Height in pixels.
        curves: Value by optimizer step, by the CSS class of the run.

    Returns:
        The plot; None when there is no finite value.
    """
    lines = {}
    for name, curve in curves.items():
        finite = curve[np.isfinite(curve)]
        window = 2 * (len(finite) // SMOOTHING_SHARE) + 1
        smooth = finite.rolling(window, center=True, min_periods=1).mean()
        stride = math.ceil(len(finite) / MOST_POINTS) or 1
        for kind, values in {"raw": finite, "smooth": smooth}.items():
            if len(finite) and (kind == "smooth" or window > 1):
                lines[f"{name} {kind}"] = (values.index[::stride].tolist(), values.iloc[::stride].tolist())
    return panel(title, height, lines, y_bins=5 if height > LOW else 2) if lines else None


def panel(
    title: str,
    height: int,
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    y_bins: int,
    legend: Sequence[tuple[str, str]] = (),
) -> Panel:
    """Lay out lines in one plot whose vertical axis starts at zero.

    Args:
        title: What is plotted.
        height: Height in pixels.
        lines: x, ascending, and y of every line, by its CSS class.
        y_bins: Ticks of the vertical axis, about.
        legend: CSS class and name of each line that needs one.
    """
    top = max(max(y) for _, y in lines.values()) or 1.0
    # A hair less than the top, or rounding may add a tick above a round top.
    y_ticks = [tick for tick in MaxNLocator(y_bins).tick_values(0, top * (1 - 1e-9)) if tick >= 0]
    left, right = min(x[0] for x, _ in lines.values()), max(x[-1] for x, _ in lines.values())
    left, right = (left, right) if right > left else (left - 1, left + 1)
    x_ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(left, right) if left <= tick <= right]

    paths = []
    for name, (x, y) in lines.items():
        across = [round(WIDTH * (step - left) / (right - left), 2) for step in x]
        down = [round(height * (1 - value / y_ticks[-1]), 2) for value in y]
        paths.append((name, "M" + " ".join(f"{a:g} {b:g}" for a, b in zip(across, down, strict=True))))
        if len(x) <= FEW_POINTS:
            # A line of no length is drawn as a dot by its round cap.
            paths.append((f"{name} dots", "".join(f"M{a:g} {b:g}h0" for a, b in zip(across, down, strict=True))))
    return Panel(
        title=title,
        height=height,
        x_ticks=[(round(100 * (tick - left) / (right - left), 2), f"{tick:,.0f}") for tick in x_ticks],
        y_ticks=[(round(height * (1 - tick / y_ticks[-1]), 2), _tick(tick)) for tick in y_ticks],
        lines=paths,
        legend=list(legend),
    )


def _tick(value: float) -> str:
    """Write a tick as people do: 12,000 and not 1.2e+04; very small ones by their power of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
