"""The train stage around the engine: fingerprints, the launcher, how a failure looks, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvl_pipeline.config import BatchingConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.mlflow.unsent import only_sender
from qvl_pipeline.training import scratch
from qvl_pipeline.training.identity import run_fingerprint
from qvl_pipeline.training.launcher import Processes, RankFailedError, _describe_failure, launch
from qvl_pipeline.training.processes import training_processes
from qvl_pipeline.training.progress import training_progress
from qvl_pipeline.training.running import collect
from qvl_pipeline.training.scratch import held, is_finished, leave, note_published, publish, starts_afresh
from qvl_pipeline.training.spec import Inputs, make_spec
from tests.engine.training import changed, make_training

SAMPLE = SampleConfig()
MODEL = ModelConfig(processor_type="qwen3_vl")
SUMMARY = {"steps": 40, "epochs": 2, "fingerprint": "abc", "samples_per_epoch": 100.0}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    folder = tmp_path_factory.mktemp("launcher")
    build_tiny_model(folder / "model", family="qwen3_vl", seed=0, corpus=["which digit?"])
    base = make_training(folder, folder / "model", "qwen3_vl", kinds=("text", "image") * 1000, packs_per_step=2)
    Path(base.run.output_dir).mkdir()
    return base


def start(spec: TrainSpec) -> Path:
    output_dir = Path(spec.run.output_dir)
    output_dir.mkdir(exist_ok=True)
    spec.save(output_dir / "train_spec.json")
    return output_dir / "train_spec.json"


class TestFingerprint:
    def test_what_only_changes_the_view_keeps_the_checkpoints(self) -> None:
        first = run_fingerprint(SAMPLE, MODEL, TrainConfig(save_steps=10, logging_steps=1), SUMMARY, [])
        assert (
            run_fingerprint(
                SampleConfig(), MODEL, TrainConfig(save_steps=20, nproc_per_node=4, report_to="none"), SUMMARY, []
            )
            == first
        )

    @pytest.mark.parametrize(
        ("model", "train", "plan"),
        [
            (MODEL, TrainConfig(learning_rate=3e-5), SUMMARY),
            (MODEL.model_copy(update={"tiny_seed": 1}), TrainConfig(), SUMMARY),
            (MODEL, TrainConfig(), SUMMARY | {"fingerprint": "abd"}),
        ],
    )
    def test_what_changes_the_training_does_not_share_checkpoints(
        self, model: ModelConfig, train: TrainConfig, plan: dict
    ) -> None:
        assert run_fingerprint(SAMPLE, model, train, plan, []) != run_fingerprint(
            SampleConfig(), MODEL, TrainConfig(), SUMMARY, []
        )

    def test_another_base_model_and_other_frames_do_not_share_checkpoints(self) -> None:
        contents = (["sha:1", "sha:2"], ["sha:3", "sha:2"], ["sha:1", "sha:3"])
        assert len({run_fingerprint(SAMPLE, MODEL, TrainConfig(), SUMMARY, digests) for digests in contents}) == 3


class TestPublishing:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        """A training that was finished and not published."""
        run = tmp_path / "scratch" / "run"
        for part in ("export/model.safetensors", "checkpoints/checkpoint-9/COMPLETE", "metrics.jsonl", "result.json"):
            (run / part).parent.mkdir(parents=True, exist_ok=True)
            (run / part).touch()
        return run

    def test_published_run_keeps_its_curve_but_not_its_checkpoints(self, run: Path, tmp_path: Path) -> None:
        publish(run, {"README.md": "# a card"}, tmp_path / "trained")
        assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == ["README.md", "model.safetensors"]
        assert (tmp_path / "trained" / "README.md").read_text() == "# a card"
        assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "result.json", "checkpoints", "export"}
        note_published(run)
        leave(tmp_path / "scratch")
        assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "result.json", "PUBLISHED"}

    def test_until_the_command_is_done_nothing_is_trained_again(self, run: Path) -> None:
        """Cut off after any of the steps; the last of them is the rename of the export."""
        assert is_finished(run)
        assert not starts_afresh(run, resume=True)
        note_published(run)
        assert is_finished(run)
        assert not starts_afresh(run, resume=True)
        with held(run, resume=True):
            assert (run / "metrics.jsonl").exists()
        leave(run.parent)
        assert starts_afresh(run, resume=True)

    def test_an_unpublished_run_is_not_left(self, run: Path) -> None:
        leave(run.parent)
        assert is_finished(run)

    def test_another_run_that_is_not_done_keeps_its_export(self, run: Path) -> None:
        note_published(run)
        with only_sender(run):
            leave(run.parent)
        assert is_finished(run)

    def test_what_cannot_be_deleted_is_named_and_no_reason_to_fail(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(folder: Path, **_: Any) -> None:
            raise PermissionError(1, "Operation not permitted", str(folder))

        monkeypatch.setattr("shutil.rmtree", refuse)
        note_published(run)
        leave(run.parent)
        assert f"{run / 'checkpoints'} is no longer needed, but cannot be deleted: remove it by hand" in caplog.text
        assert starts_afresh(run, resume=True)

    def test_an_export_that_was_taken_away_is_made_again_from_the_last_checkpoint(self, run: Path) -> None:
        (run / "export" / "model.safetensors").unlink()
        (run / "export").rmdir()
        with held(run, resume=True):
            assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "checkpoints"}


class TestCollecting:
    @pytest.mark.parametrize(("rates", "columns"), [((1e-3, 1e-4), ["llm", "vit"]), ((1e-3, 1e-3), [])])
    def test_rates_of_parts_are_columns_where_they_differ(
        self, tmp_path: Path, rates: tuple[float, float], columns: list[str]
    ) -> None:
        row = {"tokens": 10, "tokens_per_second": 5.0, "loss": 1.0, "learning_rate": 1e-3, "loss_by_source": {"a": 1.0}}
        rows = [row | {"step": step, "learning_rates": {"llm": rates[0], "vit": rates[1]}} for step in (1, 2)]
        (tmp_path / scratch.METRICS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / scratch.RESULT).write_text("{}")
        table, result = collect(tmp_path)
        assert [name.partition("/")[2] for name in table if name.startswith("learning_rate/")] == columns
        assert {"learning_rates", "loss_by_source"}.isdisjoint(table.columns)
        assert result["train_time_s"] == 4.0
        if columns:
            assert table["learning_rate/vit"].tolist() == [1e-4, 1e-4]


class TestSpec:
    def spec(self, folder: Path, manifest: dict, model: ModelConfig, train: TrainConfig, **batching: Any) -> TrainSpec:
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return make_spec(
            Inputs(folder, Path("tokenized.arrow"), Path("stream.parquet"), Path("frames"), SUMMARY),
            sample=SAMPLE,
            model=model,
            batching=BatchingConfig(per_device_train_batch_size=3, **batching),
            weights={"a": 2.0},
            train=train,
            output_dir=folder / "run",
            identity={},
            resume_from="",
        )

    def test_tiny_model_lies_in_the_folder_itself(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, {"path": ".", "family": "qwen3_vl"}, MODEL, TrainConfig(warmup_ratio=0.1))
        assert spec.model.path == spec.model.processor == str(tmp_path)
        assert spec.optim.warmup_steps == 4
        assert spec.data.per_device_train_batch_size == 3

    def test_feeding_reaches_the_engine(self, tmp_path: Path) -> None:
        train = TrainConfig(
            dataloader_num_workers=2,
            dataloader_prefetch_factor=5,
            dataloader_pin_memory=False,
            on_bad_sample="skip",
        )
        manifest = {"path": ".", "family": "qwen3_vl"}
        planned = self.spec(tmp_path, manifest, MODEL, train)
        feeding = (
            planned.data.dataloader_num_workers,
            planned.data.dataloader_prefetch_factor,
            planned.data.dataloader_pin_memory,
        )
        assert feeding == (2, 5, False)
        assert planned.data.on_bad_sample == "skip"
        assert planned.stream.max_steps == 0
        values = {"dataset_type": "vision_iterable", "max_steps": 7, "shuffle_buffer_size": 9}
        stream = self.spec(tmp_path, manifest, MODEL, train, **values).stream
        assert (stream.max_steps, stream.shuffle_buffer_size, stream.packs_per_step) == (7, 9, 3)
        assert stream.weights == {"a": 2.0}

    def test_optimisation_reaches_the_engine(self, tmp_path: Path) -> None:
        values = {
            "optim": "muon",
            "learning_rates": {"vit": 1e-6},
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "ema_decay": 0.9,
        }
        train = TrainConfig(**values, export_ema=True, gradient_checkpointing=["llm"], torch_compile=True)
        spec = self.spec(tmp_path, {"path": ".", "family": "qwen3_vl"}, MODEL, train)
        assert {key: getattr(spec.optim, key) for key in values} == values
        assert spec.export.export_ema
        assert (spec.recompute.llm, spec.recompute.vit) == ("full", "none")
        assert (spec.model.torch_compile, spec.model.torch_compile_backend) == (True, "inductor")

    def test_hub_model_is_passed_on_by_name(self, tmp_path: Path) -> None:
        model = ModelConfig(
            processor_type="qwen2_5_vl", load_from_pretrained_path="org/model", processor_name="org/processor"
        )
        manifest = {"path": "org/model", "family": "qwen2_5_vl"}
        spec = self.spec(tmp_path, manifest, model, TrainConfig(warmup_ratio=0.1, warmup_steps=7))
        assert (spec.model.path, spec.model.processor) == ("org/model", "org/processor")
        assert spec.optim.warmup_steps == 7


def test_processes_without_gpus_are_the_declared_data_parallel_size(monkeypatch: pytest.MonkeyPatch) -> None:
    batching = BatchingConfig(data_parallel_size=3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert training_processes(TrainConfig(), batching).per_node == 3
    assert training_processes(TrainConfig(sp_ulysses_degree=2), batching).per_node == 6
    assert training_processes(TrainConfig(nproc_per_node=5), batching).per_node == 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert training_processes(TrainConfig(), batching).per_node == 8


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert training_processes(TrainConfig(nproc_per_node=4), BatchingConfig()).per_node == 4
    with pytest.raises(
        UserError, match=r"^train.nproc_per_node is 5, but this node has 4 GPUs .* choose at most 4, or"
    ):
        training_processes(TrainConfig(nproc_per_node=5), BatchingConfig())
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    with pytest.raises(UserError, match=r"^PET_NPROC_PER_NODE is 8, but"):
        training_processes(TrainConfig(), BatchingConfig())


class TestPreparing:
    def interrupted(self, folder: Path) -> Path:
        (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        (folder / "checkpoints" / "checkpoint-2" / "COMPLETE").write_text(json.dumps({"step": 2}))
        (folder / "errors").mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
        return folder

    def test_cut_off_run_keeps_its_checkpoint_and_the_rows_up_to_it(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        with held(folder, resume=True):
            pass
        assert (folder / "checkpoints" / "checkpoint-2" / "COMPLETE").exists()
        assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
        assert not (folder / "errors").exists()

    def test_run_that_was_not_published_is_kept_whole(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        (folder / "result.json").touch()
        (folder / "export").mkdir()
        with held(folder, resume=True):
            pass
        assert (folder / "result.json").exists()

    def test_published_run_starts_afresh(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        (folder / "PUBLISHED").touch()
        with held(folder, resume=True):
            pass
        assert list(folder.iterdir()) == []

    def test_the_log_of_a_node_that_joined_before_is_kept(self, tmp_path: Path) -> None:
        for name in ("engine.log", "engine.node1.log"):
            (tmp_path / name).touch()
        with held(tmp_path, resume=False):
            assert [path.name for path in tmp_path.iterdir()] == ["engine.node1.log"]

    @pytest.mark.parametrize("resume", [True, False])
    def test_what_another_process_trains_is_not_touched(
        self, tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scratch, "PATIENCE_S", 0.0)
        folder = tmp_path / "scratch"
        with held(folder, resume=resume):
            self.interrupted(folder)
            with pytest.raises(UserError, match="another process trains there"), held(folder, resume=resume):
                pass
            assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
            assert (folder / "errors").exists()

    def test_resuming_can_be_refused(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        with held(folder, resume=False):
            pass
        assert list(folder.iterdir()) == []


def test_progress_survives_rows_being_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with training_progress(path, max_steps=20) as update:
        path.write_text(json.dumps({"step": 9, "loss": 1.0, "tokens_per_second": 1.0}) + "\n")
        update()
        path.write_text("")
        update()


def test_progress_prints_a_line_every_tenth_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with training_progress(path, max_steps=20) as update:
        update()
        for step in range(1, 21):
            with path.open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step, "tokens_per_second": 1234.5}) + "\n")
            update()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "train: step 20/20, loss 0.0500, 1,234 tokens/s"


class TestFailure:
    def test_rank_that_fails_is_shown_in_one_block(self, training: TrainSpec, tmp_path: Path) -> None:
        folder = Path(training.data.tokenized).parent
        spec = changed(training, tmp_path / "run")
        image = folder / "3.png"
        good = image.read_bytes()
        image.write_bytes(b"broken")
        try:
            with pytest.raises(RankFailedError) as caught:
                launch(start(spec), Processes(2), on_poll=lambda: None)
        finally:
            image.write_bytes(good)
        message = str(caught.value)
        assert message.startswith("training failed on rank 1 at step 2: BadSampleError: sample 'b/3': image '")
        assert "3.png" in message
        assert "engine.log" in message

    def test_rank_that_was_killed_is_named(self, tmp_path: Path) -> None:
        log = tmp_path / "engine.log"
        log.write_text(
            "E1124 torch/distributed/elastic/api.py:984] failed (exitcode: -9) local_rank: 1 (pid: 4) of bin\n"
        )
        message = _describe_failure("training", tmp_path, log, 1)
        assert message.startswith("training ended because rank 1 of this node was killed by SIGKILL")
        assert "memory" in message

    def test_what_nccl_tells_does_not_hide_the_end_of_the_log(self, tmp_path: Path) -> None:
        log = tmp_path / "engine.log"
        log.write_text("the reason\n" + "node-a:41:77 [0] NCCL INFO comm 0x7f rank 0 - Abort COMPLETE\n" * 20)
        assert _describe_failure("training", tmp_path, log, 1).endswith(f"the end of {log}:\n    the reason")

    def test_engine_that_cannot_even_start_shows_the_end_of_its_log(self, tmp_path: Path) -> None:
        with pytest.raises(RankFailedError, match="no error report") as caught:
            launch(tmp_path / "missing.json", Processes(1), on_poll=lambda: None)
        assert "missing.json" in str(caught.value)


LAUNCH = """
from pathlib import Path
from qvl_pipeline.training.launcher import Processes, launch
launch(Path({!r}), Processes(2), lambda: None)
"""


def launched(spec_path: Path) -> subprocess.Popen[str]:
    """Start training from a process of its own, and wait until it has taken a step."""
    code = LAUNCH.format(str(spec_path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wait_until(lambda: (spec_path.parent / "metrics.jsonl").exists(), 120)
    assert len(processes_of(spec_path)) == 3
    return parent


def test_nothing_is_left_when_the_parent_is_killed(training: TrainSpec, tmp_path: Path) -> None:
    spec_path = start(changed(training, tmp_path / "run"))
    parent = launched(spec_path)
    parent.kill()
    parent.wait(60)
    wait_until(lambda: not processes_of(spec_path), 60)
    assert len(pd.read_json(tmp_path / "run" / "metrics.jsonl", lines=True)) < 1000


def test_ranks_do_not_outlive_a_launcher_that_was_killed(training: TrainSpec, tmp_path: Path) -> None:
    """They would write beside the next run; loaders, which they have here, are gone with them."""
    spec_path = start(changed(training, tmp_path / "run", data={"dataloader_num_workers": 1}))
    code = LAUNCH.format(str(spec_path))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), 120)
    found = processes_of(spec_path)
    assert len(found) > 3, "a loader has the command line of its rank"
    with pytest.raises(UserError, match="another process trains there"), only_sender(tmp_path / "run"):
        pass
    [torchrun] = [pid for pid, command in found if "torch.distributed.run" in command]
    os.kill(torchrun, signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    assert processes_of(spec_path) == []
    assert "RankFailedError" in errors
    wait_until(lambda: is_free(tmp_path / "run"), 60)  # a killed process holds its locks until it is taken down


def is_free(run: Path) -> bool:
    with contextlib.suppress(UserError), only_sender(run):
        return True
    return False


def test_a_rank_whose_launcher_was_gone_before_it_looked_ends(training: TrainSpec, tmp_path: Path) -> None:
    spec_path = start(changed(training, tmp_path / "run"))
    command = [sys.executable, "-m", "qvl_pipeline.engine", str(spec_path)]
    done = subprocess.run(command, env=os.environ | {"RANK": "0", "QVL_LAUNCHER_PID": "1"}, timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_a_second_interrupt_ends_ranks_that_do_not_get_to_the_end_of_their_step(
    training: TrainSpec, tmp_path: Path
) -> None:
    spec_path = start(changed(training, tmp_path / "run"))
    parent = launched(spec_path)
    for pid, command in processes_of(spec_path):
        if "torch.distributed.run" not in command:
            os.kill(pid, signal.SIGSTOP)
    os.kill(parent.pid, signal.SIGINT)
    assert "interrupt again to stop at once" in parent.stdout.readline()
    assert parent.poll() is None
    os.kill(parent.pid, signal.SIGINT)
    assert parent.wait(60) == -signal.SIGINT
    wait_until(lambda: not processes_of(spec_path), 60)
    assert not (tmp_path / "run" / "stopped.json").exists()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def processes_of(spec_path: Path) -> list[tuple[int, str]]:
    """Return process id and command line of torchrun and the ranks of a job."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if "qvl_pipeline.engine\0" in command and str(spec_path) in command:
            found.append((int(process.name), command))
    return found
