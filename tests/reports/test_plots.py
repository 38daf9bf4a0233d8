from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from qvl_pipeline.reports.plots import WIDTH, loss_curve


def logged(losses: list[float], step: int = 5) -> pd.DataFrame:
    steps = np.arange(1, len(losses) + 1) * step
    return pd.DataFrame({"step": steps, "loss": losses, "learning_rate": np.linspace(1e-5, 0, len(losses))})


def points(path: str) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_the_line_is_the_loss_in_the_scale_of_its_ticks() -> None:
    losses = [4.0, 3.0, 1.0, 2.0] * 20
    loss, rate = loss_curve(logged(losses)).panels
    drawn = points(dict(loss.lines)["raw"])
    (bottom, low), (top, high) = loss.y_ticks[0], loss.y_ticks[-1]
    values = [float(low) + (y - bottom) / (top - bottom) * (float(high) - float(low)) for _, y in drawn]
    assert values == pytest.approx(losses, abs=0.02)
    assert [x for x, _ in drawn] == pytest.approx(np.linspace(0, WIDTH, 80), abs=0.01)
    assert (bottom, low) == (loss.height, "0")
    assert rate.y_ticks[-1][1] == "1e-05"


def test_the_smooth_line_is_a_running_mean() -> None:
    curve = loss_curve(logged([1.0, 3.0] * 100))
    assert curve.window == 9
    lines = dict(curve.panels[0].lines)
    raw, smooth = ([y for _, y in points(lines[name])] for name in ("raw", "smooth"))
    means = [sum(raw[middle - 4 : middle + 5]) / 9 for middle in range(4, 196)]
    assert smooth[4:196] == pytest.approx(means, abs=0.02)


def test_x_ticks_name_the_steps_at_their_place() -> None:
    loss = loss_curve(logged([1.0] * 81)).panels[0]  # steps 5 to 405
    for place, label in loss.x_ticks:
        assert place == pytest.approx(100 * (int(label) - 5) / 400, abs=0.01)
    assert len(loss.x_ticks) >= 4


def test_a_long_run_is_thinned_out() -> None:
    curve = loss_curve(logged(list(np.linspace(5, 1, 12_345))))
    assert curve.stride == 13
    assert len(points(dict(curve.panels[0].lines)["raw"])) == 950


def test_one_logged_step_is_a_dot() -> None:
    loss = loss_curve(logged([2.5])).panels[0]
    assert dict(loss.lines)["raw dots"].startswith(f"M{WIDTH // 2} ")


def test_losses_that_are_all_zero_are_drawn() -> None:
    loss, _ = loss_curve(logged([0.0, 0.0])).panels
    assert [y for _, y in points(dict(loss.lines)["raw"])] == [loss.height, loss.height]
