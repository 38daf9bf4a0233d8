from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.mlflow.sinks import MetricsSink, make_sinks, training_metrics


def row(step: int, note: str = "text") -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "loss_by_source": {"digits": 2.0}, "note": note}


def write(path: Path, steps: range, mode: str = "a", note: str = "text") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(row(step, note)) + "\n" for step in steps)


class Tracker:
    """Takes rows, unless it is down."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.down = False

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        if self.down:
            raise ConnectionError("no route to host")
        self.steps += [row["step"] for row in rows]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


@pytest.fixture
def sink(metrics: Path, tracker: Tracker) -> MetricsSink:
    return MetricsSink("tracker", "run-1", metrics, tracker)


def poll(sink: MetricsSink) -> None:
    """Poll, and wait until the rows were sent; also when the last time failed a moment ago."""
    sink._next_try = 0.0
    sink.poll()
    sink._thread.join()


def test_rows_are_sent_once_as_they_come(sink: MetricsSink, metrics: Path, tracker: Tracker) -> None:
    poll(sink)
    write(metrics, range(1, 3))
    poll(sink)
    poll(sink)
    write(metrics, range(3, 5))
    sink.close()
    assert tracker.steps == [1, 2, 3, 4]


def test_half_a_row_waits_for_its_end(sink: MetricsSink, metrics: Path, tracker: Tracker) -> None:
    whole = json.dumps(row(1)) + "\n"
    metrics.write_text(whole[:10])
    poll(sink)
    assert tracker.steps == []
    metrics.write_text(whole)
    poll(sink)
    assert tracker.steps == [1]


def test_a_tracker_that_is_down_gets_the_rows_later_and_is_warned_of_once(
    sink: MetricsSink, metrics: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.down = True
    write(metrics, range(1, 4))
    poll(sink)
    poll(sink)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no route to host" in caplog.text
    tracker.down = False
    write(metrics, range(4, 6))
    poll(sink)
    assert tracker.steps == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_down_is_asked_less_and_less_often(
    sink: MetricsSink, metrics: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tried = 1000.0, []

    def fail(rows: list[dict[str, Any]]) -> None:
        tried.append(now)
        raise ConnectionError

    monkeypatch.setattr("time.monotonic", lambda: now)
    sink._send = fail
    write(metrics, range(1, 4))
    while now < 1200:
        sink.poll()
        sink._thread.join()
        now += 1
    assert tried == [1000, 1001, 1003, 1007, 1015, 1031, 1063, 1123, 1183]
    sink._send = tracker
    sink.close()
    assert tracker.steps == [1, 2, 3], "the last time is not waited for"


def test_rows_that_no_tracker_took_are_counted_at_the_end(
    sink: MetricsSink, metrics: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.down = True
    write(metrics, range(1, 4))
    sink.close()
    assert f"tracker did not get the last 3 rows of {metrics}" in caplog.text


def test_a_slow_tracker_delays_neither_poll_nor_close(metrics: Path) -> None:
    released = threading.Event()
    sink = MetricsSink("slow", "run-1", metrics, lambda rows: released.wait(30))
    write(metrics, range(1, 2))
    started = time.perf_counter()
    sink.poll()
    sink.poll()
    sink.close(timeout_s=0.2)
    assert time.perf_counter() - started < 15
    released.set()


def test_the_same_run_goes_on_where_it_was(metrics: Path, sink: MetricsSink) -> None:
    write(metrics, range(1, 4))
    sink.close()
    write(metrics, range(4, 6))
    again = Tracker()
    MetricsSink("tracker", "run-1", metrics, again).close()
    assert again.steps == [4, 5]


def test_a_new_run_gets_the_rows_from_before_too(metrics: Path, sink: MetricsSink) -> None:
    write(metrics, range(1, 4))
    sink.close()
    write(metrics, range(4, 6))
    new = Tracker()
    MetricsSink("tracker", "run-2", metrics, new).close()
    assert new.steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("regrown", [range(3, 5), range(3, 40)])
def test_a_file_cut_back_to_a_checkpoint_repeats_no_step(
    sink: MetricsSink, metrics: Path, tracker: Tracker, regrown: range
) -> None:
    write(metrics, range(1, 6))
    poll(sink)
    write(metrics, range(1, 3), mode="w")
    write(metrics, regrown, note="rows of another length")
    poll(sink)
    write(metrics, range(regrown.stop, regrown.stop + 3))
    poll(sink)
    assert tracker.steps == list(range(1, regrown.stop + 3))


def test_the_numbers_of_a_row_are_named_for_the_trackers() -> None:
    about = {"max_steps": 9, "time": 1.7e9, "mfu": None, "eval_loss": 3.0, "eval_loss_by_source": {"a": 2.0}}
    evaluated = {"train/eval_loss": 3.0, "train/eval_loss_by_source/a": 2.0}
    assert training_metrics(row(4)) | evaluated == training_metrics(row(4) | about)
    assert training_metrics(row(4)) == {"train/loss": 0.25, "train/loss_by_source/digits": 2.0}


def test_mlflow_gets_every_row_at_its_step(
    metrics: Path, tracking_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    mlflow.set_tracking_uri(tracking_database)
    with mlflow.start_run() as run:
        (sink,) = make_sinks(["mlflow"], metrics, "name")
        write(metrics, range(1, 801))
        sink.close()
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == {step: 1 / step for step in range(1, 801)}
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss_by_source/digits")) == 800
    assert caplog.messages == []


def test_mlflow_out_of_reach_ends_nothing(
    metrics: Path, tracking_database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    mlflow.set_tracking_uri(tracking_database)
    with mlflow.start_run():
        (sink,) = make_sinks(["mlflow"], metrics, "name")
        write(metrics, range(1, 3))
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
            poll(sink)
        assert "mlflow takes no metrics at the moment" in caplog.text
        sink.close()
        run = mlflow.active_run()
    assert mlflow.get_run(run.info.run_id).data.metrics["train/loss"] == 0.5


def test_mlflow_without_a_run_is_refused(metrics: Path) -> None:
    with pytest.raises(UserError, match="no MLflow run is active"):
        make_sinks(["mlflow"], metrics, "name")


def test_none_is_no_tracker(metrics: Path) -> None:
    assert make_sinks(["none"], metrics, "name") == []


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named(metrics: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=f"uv pip install {tracker}"):
        make_sinks([tracker], metrics, "name")


def test_wandb_gets_every_row_at_its_step(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged, started = {}, {}
    run = SimpleNamespace(id="run", log=lambda values, step: logged.update({step: values}))
    wandb = ModuleType("wandb")
    wandb.Error = ConnectionError
    wandb.init = lambda **options: started.update(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (sink,) = make_sinks(["wandb"], metrics, "tiny")
    write(metrics, range(1, 3))
    sink.close()
    assert started["name"] == "tiny"
    assert logged == {step: training_metrics(row(step)) for step in (1, 2)}


def test_wandb_without_a_login_is_said_before_training(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        pass

    def init(**_: Any) -> None:
        raise Error("api_key not configured")

    wandb = ModuleType("wandb")
    wandb.Error, wandb.init = Error, init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match="'wandb', which does not start: api_key not configured"):
        make_sinks(["wandb"], metrics, "tiny")


def test_tensorboard_gets_every_row_at_its_step(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: Path) -> None:
            assert folder == metrics.with_name("tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            logged.append((name, value, step))

        def flush(self) -> None:
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (sink,) = make_sinks(["tensorboard"], metrics, "tiny")
    write(metrics, range(1, 2))
    sink.close()
    assert logged == [("train/loss", 1.0, 1), ("train/loss_by_source/digits", 2.0, 1)]
