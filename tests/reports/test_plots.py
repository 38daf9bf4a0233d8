from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from qvl_pipeline.reports.plots import WIDTH, training_curves


def logged(losses: list[float], step: int = 5) -> pd.DataFrame:
    steps = np.arange(1, len(losses) + 1) * step
    return pd.DataFrame({"step": steps, "loss": losses, "learning_rate": np.linspace(1e-5, 0, len(losses))})


def points(path: str) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_the_line_is_the_loss_in_the_scale_of_its_ticks() -> None:
    losses = [4.0, 3.0, 1.0, 2.0] * 20
    curves = training_curves(logged(losses))
    loss, (rate,) = curves.loss, curves.others
    drawn = points(dict(loss.lines)["raw"])
    (bottom, low), (top, high) = loss.y_ticks[0], loss.y_ticks[-1]
    values = [float(low) + (y - bottom) / (top - bottom) * (float(high) - float(low)) for _, y in drawn]
    assert values == pytest.approx(losses, abs=0.02)
    assert [x for x, _ in drawn] == pytest.approx(np.linspace(0, WIDTH, 80), abs=0.01)
    assert (bottom, low) == (loss.height, "0")
    assert rate.y_ticks[-1][1] == "1e-05"


def test_the_smooth_line_is_a_running_mean() -> None:
    curve = training_curves(logged([1.0, 3.0] * 100))
    assert curve.window == 9
    lines = dict(curve.loss.lines)
    raw, smooth = ([y for _, y in points(lines[name])] for name in ("raw", "smooth"))
    means = [sum(raw[middle - 4 : middle + 5]) / 9 for middle in range(4, 196)]
    assert smooth[4:196] == pytest.approx(means, abs=0.02)


def test_x_ticks_name_the_steps_at_their_place() -> None:
    loss = training_curves(logged([1.0] * 81)).loss  # steps 5 to 405
    for place, label in loss.x_ticks:
        assert place == pytest.approx(100 * (int(label) - 5) / 400, abs=0.01)
    assert len(loss.x_ticks) >= 4


def test_a_long_run_is_thinned_out() -> None:
    curve = training_curves(logged(list(np.linspace(5, 1, 12_345))))
    assert curve.stride == 13
    assert len(points(dict(curve.loss.lines)["raw"])) == 950


def test_one_logged_step_is_a_dot() -> None:
    loss = training_curves(logged([2.5])).loss
    assert dict(loss.lines)["raw dots"].startswith(f"M{WIDTH // 2} ")


def test_losses_that_are_all_zero_are_drawn() -> None:
    loss = training_curves(logged([0.0, 0.0])).loss
    assert [y for _, y in points(dict(loss.lines)["raw"])] == [loss.height, loss.height]


def test_each_part_has_a_rate_of_its_own_and_what_was_not_logged_has_no_plot() -> None:
    rates = {
        "learning_rate/vit": [1e-4, 1e-4],
        "learning_rate/llm": [1e-3, 5e-4],
        "mfu": [None, None],
        "grad_norm": [2, 1],
    }
    curves = training_curves(logged([1.0, 2.0]).assign(**rates))
    assert [panel.title for panel in curves.others] == ["Gradient norm", "Learning rate"]
    assert curves.others[1].legend == [("part0", "vit"), ("part1", "llm")]
    assert {name for name, _ in curves.others[1].lines} >= {"part0", "part1"}


def test_the_eval_loss_is_drawn_at_the_steps_that_have_one() -> None:
    curves = training_curves(logged([4.0] * 40).assign(eval_loss=[None, 3.0] + [None] * 37 + [2.0]))
    assert [x for x, _ in points(dict(curves.loss.lines)["eval"])] == pytest.approx([WIDTH / 39, WIDTH], abs=0.01)
    assert curves.loss.legend == [("raw", "training"), ("eval", "eval split")]
    assert training_curves(logged([4.0] * 40)).loss.legend == []


def test_large_ticks_are_written_out() -> None:
    speeds = training_curves(logged([1.0, 1.0]).assign(tokens_per_second=[9000.0, 23_000.0])).others[1]
    assert [label for _, label in speeds.y_ticks][-1].endswith(",000")
