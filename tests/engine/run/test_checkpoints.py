"""Checkpoints in the background: what they hold, when they appear, and what a failed one leaves."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.fsdp import fully_shard

from qvl_pipeline.engine.run import checkpoints as module
from qvl_pipeline.engine.run.checkpoint_files import (
    CheckpointError,
    DamagedCheckpointError,
    completed,
    newest_sound,
    read_marker,
)
from qvl_pipeline.engine.run.checkpoints import Checkpoints, ModelState, OptimizerState, RandomState, _remove
from tests.engine.ranks import run_ranks


class Training:
    """A sharded layer with its optimizer and checkpoints."""

    def __init__(self, folder: Path, *, asynchronous: bool = True, keep: int = 1) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        torch.manual_seed(0)
        self.model = nn.Linear(6, 4)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.checkpoints = Checkpoints(
            folder,
            {"model": ModelState(self.model), "optimizer": OptimizerState(self.model, [self.optimizer])},
            rank_state={"random": RandomState(torch.device("cpu"))},
            identity={"plan": "abc"},
            keep=keep,
            asynchronous=asynchronous,
        )

    def step(self) -> None:
        self.model(torch.rand(3, 6)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return self.model.weight.full_tensor().detach().clone()


def state_is_that_of_the_save(folder: Path) -> None:
    """Train on while the write is held up; then go on from the checkpoint."""
    write, release = FileSystemWriter.write_data, threading.Event()

    def late(self: FileSystemWriter, *args: Any) -> Any:
        release.wait()
        return write(self, *args)

    FileSystemWriter.write_data = late
    training = Training(folder)
    torch.manual_seed(dist.get_rank())  # each rank has its own generator
    training.step()
    saved = training.weights()
    training.checkpoints.save(1)
    training.step()
    expected = training.weights()
    assert not torch.equal(saved, expected)
    assert not training.checkpoints.end_step(stop_requested=False)
    assert completed(folder) == []
    release.set()
    training.checkpoints.save(2)  # waits for the first
    assert [step for step, _ in completed(folder)] == [1]
    training.checkpoints.wait()
    dist.barrier()
    assert [step for step, _ in completed(folder)] == [1, 2]  # two, though one is to be kept
    again = Training(folder.parent / "other")
    training.checkpoints.save(3)
    training.step()
    expected = training.weights()
    training.checkpoints.wait()
    dist.barrier()
    assert again.checkpoints.load(folder / "checkpoint-3") == 3
    again.step()
    assert torch.equal(again.weights(), expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_holds_weights_optimizer_and_generators_of_the_moment_it_was_asked_for(
    ranks: int, tmp_path: Path
) -> None:
    run_ranks(state_is_that_of_the_save, ranks, tmp_path / "run", log_dir=tmp_path / "logs")
    marker = read_marker(tmp_path / "run" / "checkpoint-3")
    assert (marker["step"], marker["world_size"], marker["identity"]) == (3, ranks, {"plan": "abc"})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "checkpoint-3"}


def goes_on_from_the_sound_one(folder: Path) -> None:
    training = Training(folder, asynchronous=False)
    states = {}
    for step in (1, 2):
        training.step()
        training.checkpoints.save(step)
        states[step] = training.weights()
    dist.barrier()
    if dist.get_rank() == 0:
        flip(next((folder / "checkpoint-2").glob(f"__{dist.get_world_size() - 1}_*.distcp")))
    dist.barrier()
    again = Training(folder)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-2/__\d_0.distcp is not what was written"):
        again.checkpoints.load(folder / "checkpoint-2")
    assert again.checkpoints.load_newest() == 1
    assert torch.equal(again.weights(), states[1])
    again.step()
    again.checkpoints.save(2)  # where the damaged one was
    again.checkpoints.wait()
    dist.barrier()
    assert [step for step, _ in completed(folder)] == [1, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_flipped_bit_in_the_newest_checkpoint_makes_all_ranks_go_on_from_the_one_before(
    ranks: int, tmp_path: Path
) -> None:
    run_ranks(goes_on_from_the_sound_one, ranks, tmp_path / "run", log_dir=tmp_path / "logs")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_of_a_checkpoint_is_checked_and_what_is_damaged_is_set_aside(tmp_path: Path) -> None:
    run_ranks(save_once, 1, tmp_path / "run", log_dir=tmp_path / "logs")
    names = [path.name for path in (tmp_path / "run" / "checkpoint-7").iterdir()]
    assert sorted(names) == [".metadata", "COMPLETE", "__0_0.distcp"]
    for name in names:
        folder = tmp_path / name.strip(".")
        shutil.copytree(tmp_path / "run" / "checkpoint-7", folder / "checkpoint-6")
        shutil.copytree(tmp_path / "run" / "checkpoint-7", folder / "checkpoint-7")
        flip(folder / "checkpoint-7" / name)
        step, [wrong] = newest_sound(folder)
        assert step == 6
        assert str(folder / "checkpoint-7" / name) in wrong
        assert {path.name for path in folder.iterdir()} == {"checkpoint-6", "damaged-checkpoint-7"}


def save_once(folder: Path) -> None:
    training = Training(folder, asynchronous=False)
    training.step()
    training.checkpoints.save(7)
    torch.save(training.weights(), folder / f"weights{dist.get_rank()}.pt")


def load_once(folder: Path) -> None:
    training = Training(folder)
    assert training.checkpoints.load(folder / "checkpoint-7") == 7
    assert torch.equal(training.weights(), torch.load(folder / "weights0.pt"))


def test_a_blocking_checkpoint_loads_on_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(save_once, 2, tmp_path / "run", log_dir=tmp_path / "logs")
    run_ranks(load_once, 1, tmp_path / "run", log_dir=tmp_path / "logs")


def published_when_all_have_written(folder: Path) -> None:
    """Rank 1 is slower than rank 0, which must not publish before."""
    writing: Future[None] = Future()

    def async_save(_state: Any, *, storage_writer: FileSystemWriter, **_options: Any) -> Future[None]:
        storage_writer.path.mkdir(parents=True, exist_ok=True)
        (storage_writer.path / ".metadata").touch()
        return writing

    module.dcp.async_save = async_save
    checkpoints = Training(folder).checkpoints
    checkpoints.save(1)
    if dist.get_rank() == 0:
        writing.set_result(None)
    assert checkpoints.end_step(stop_requested=dist.get_rank() == 1)  # any rank's request is every rank's
    assert completed(folder) == []
    if dist.get_rank() == 1:
        writing.set_result(None)
    assert not checkpoints.end_step(stop_requested=False)
    dist.barrier()
    assert [step for step, _ in completed(folder)] == [1]


def test_a_checkpoint_is_published_when_the_last_rank_has_written_and_ranks_agree_to_stop(tmp_path: Path) -> None:
    run_ranks(published_when_all_have_written, 2, tmp_path / "run", log_dir=tmp_path / "logs")


def disk_of_rank_1_is_full(folder: Path, asynchronous: bool) -> None:
    training = Training(folder, asynchronous=asynchronous)
    training.step()
    training.checkpoints.save(1)
    training.checkpoints.wait()
    dist.barrier()
    if dist.get_rank() == 1:

        def fail(self: FileSystemWriter, *args: Any) -> None:
            raise OSError("No space left on device")

        FileSystemWriter.write_data = fail
    sentence = r"after step 2 could not be written .*rank 1: OSError: No space left on device .*; .*one is checkpoint-1"
    if asynchronous:
        training.checkpoints.save(2)
    with pytest.raises(CheckpointError, match=sentence):
        training.checkpoints.wait() if asynchronous else training.checkpoints.save(2)
    assert [step for step, _ in completed(folder)] == [1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_stops_all_ranks_with_its_reason_and_leaves_the_one_before(
    asynchronous: bool, tmp_path: Path
) -> None:
    run_ranks(disk_of_rank_1_is_full, 2, tmp_path / "run", asynchronous, log_dir=tmp_path / "logs")


def resumes_with_a_part_that_had_no_gradient_yet(folder: Path) -> None:
    """The second layer is used from the second step on."""
    first, again = Towers(folder), Towers(folder)
    first.step(both=False)
    first.checkpoints.save(1)
    first.checkpoints.wait()
    assert again.checkpoints.load(folder / "checkpoint-1") == 1
    for training in (first, again):
        training.step(both=True)
        training.step(both=True)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


class Towers:
    """Two layers of which a step may use one."""

    def __init__(self, folder: Path) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        state = {"model": ModelState(self.model), "optimizer": OptimizerState(self.model, [self.optimizer])}
        self.checkpoints = Checkpoints(folder, state, rank_state={}, identity={}, keep=1, asynchronous=True)

    def step(self, *, both: bool) -> None:
        x = torch.ones(2, 3)
        sum(layer(x).square().sum() for layer in (self.model if both else self.model[:1])).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_part_that_had_no_gradient_yet_starts_fresh_after_resuming(tmp_path: Path) -> None:
    run_ranks(resumes_with_a_part_that_had_no_gradient_yet, 1, tmp_path / "run", log_dir=tmp_path / "logs")


def leftovers_are_removed(folder: Path) -> None:
    Training(folder)
    assert not list(folder.iterdir())


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run" / ".checkpoint-3.partial").mkdir(parents=True)
    run_ranks(leftovers_are_removed, 1, tmp_path / "run", log_dir=tmp_path / "logs")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, r"checkpoint-5 does not exist: give the folder of a checkpoint"),
        (lambda path: path.mkdir(), r"is not a complete checkpoint \(no COMPLETE in it\); complete ones here: none"),
    ],
)
def test_what_is_no_checkpoint_is_refused(make: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-5")
    with pytest.raises(CheckpointError, match=sentence):
        read_marker(tmp_path / "checkpoint-5")


def test_a_checkpoint_that_is_half_deleted_does_not_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "COMPLETE").touch()

    def refuse(path: Path) -> None:
        assert [step for step, _ in completed(tmp_path)] == [4]
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    _remove(tmp_path / "checkpoint-2")
    assert [step for step, _ in completed(tmp_path)] == [4]
    assert f"{tmp_path / 'checkpoint-2'} is no longer needed, but cannot be deleted" in caplog.text
