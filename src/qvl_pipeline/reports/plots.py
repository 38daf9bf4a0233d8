"""Geometry of the line plots in the report: figures become SVG paths, the template draws them in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

WIDTH = 1000
MOST_POINTS = 1000
FEW_POINTS = 30
SMOOTHING_SHARE = 50


@dataclass(frozen=True)
class Panel:
    """One plot: `x` runs over `WIDTH` units and is stretched to the page, `y` is in pixels from the top.

    Attributes:
        title: What is plotted.
        height: Height in pixels.
        x_ticks: Position in percent of the width and label of each tick.
        y_ticks: Position in pixels and label of each tick.
        lines: CSS class and SVG path of each line.
    """

    title: str
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]


@dataclass(frozen=True)
class LossCurve:
    """Loss and learning rate over the optimizer steps.

    Attributes:
        panels: The loss above, the learning rate below; none when no step was logged.
        window: Logged steps in the running mean that is the smooth line.
        stride: Every `stride`-th logged step is drawn.
        not_finite: Logged steps whose loss is not a finite number, left out of the plot.
    """

    panels: list[Panel]
    window: int
    stride: int
    not_finite: int


def loss_curve(training_metrics: pd.DataFrame) -> LossCurve:
    """Lay out the loss (as logged, and its centred running mean) and the learning rate.

    Args:
        training_metrics: Columns `step`, `loss` and `learning_rate`, one row for every logged step.

    Returns:
        The panels with what the reader has to know about them.
    """
    finite = training_metrics[np.isfinite(training_metrics["loss"].astype(float))]
    window = 2 * (len(finite) // SMOOTHING_SHARE) + 1  # odd, so that it is centred
    stride = math.ceil(len(finite) / MOST_POINTS) or 1
    not_finite = len(training_metrics) - len(finite)
    if finite.empty:
        return LossCurve([], window, stride, not_finite)
    smooth = finite["loss"].rolling(window, center=True, min_periods=1).mean()
    shown = finite.assign(smooth=smooth).iloc[::stride]
    steps = shown["step"].tolist()
    drawn = {"raw": (steps, shown["loss"].tolist()), "smooth": (steps, shown["smooth"].tolist())}
    loss = panel("Loss", 220, drawn, y_bins=5)
    rate = panel("Learning rate", 70, {"rate": (steps, shown["learning_rate"].tolist())}, y_bins=2)
    return LossCurve([loss, rate], window, stride, not_finite)


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
    return panel(title, height, lines, y_bins=5) if lines else None


def panel(title: str, height: int, lines: dict[str, tuple[Sequence[float], Sequence[float]]], *, y_bins: int) -> Panel:
    """Lay out lines in one plot whose vertical axis starts at zero.

    Args:
        title: What is plotted.
        height: Height in pixels.
        lines: x, ascending, and y of every line, by its CSS class.
        y_bins: Ticks of the vertical axis, about.
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
        y_ticks=[(round(height * (1 - tick / y_ticks[-1]), 2), f"{tick:.3g}") for tick in y_ticks],
        lines=paths,
    )
