"""A full disk at every point where something is written: one sentence, nothing half there, and on after making room."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from kedro.io import AbstractDataset
from safetensors.torch import save_file

from qvl_pipeline.cli.sentences import one_sentence
from qvl_pipeline.data.batches import TableWriter
from qvl_pipeline.data.tables import REJECTS
from qvl_pipeline.datasets import CurvesDataset, FileDataset, FolderDataset, JsonDataset, PageDataset, TableDataset
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.run.checkpoint_files import CheckpointError, completed
from qvl_pipeline.media.frames.cache import FrameCache
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.storage.batches import write_checked
from qvl_pipeline.storage.room import NoRoomError, room_for
from qvl_pipeline.storage.tables import table_writer
from qvl_pipeline.tracking.mlflow.outbox import Outbox
from qvl_pipeline.tracking.mlflow.run import start_run
from tests.chaos.disks import files_limited_to, listing
from tests.engine.ranks import run_ranks
from tests.engine.run.test_checkpoints import Training

LIMIT = 2048
NOISE = os.urandom(4 * LIMIT)
REJECT = {"source": "a", "row": 1, "rule": "unreadable_row", "detail": NOISE.hex()}


def rows(path: Path) -> None:
    with TableWriter(path, REJECTS) as writer:
        writer.write(pa.Table.from_pylist([REJECT], schema=REJECTS))


def tokens(path: Path) -> None:
    batch = pa.record_batch({"input_ids": pa.array(range(LIMIT), pa.int32())})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        write_checked(writer, batch, 0)


def stream(path: Path) -> None:
    table = pa.table({"messages": [NOISE.hex()]})
    with table_writer(path, table.schema) as writer:
        writer.write_table(table)


def frames(folder: Path, cache: FrameCache | None = None) -> None:
    facts = {"path": "a.mp4", "start": None, "end": None, "height": 2, "width": 2, "source_fps": 1.0, "encoding": "raw"}
    with FrameStoreWriter(folder, cache=cache) as store:
        store.add(StoredClip(**facts, frame_indices=[0], seconds=[0.0], frames=[NOISE]), "key")


def weights(folder: Path) -> None:
    folder.mkdir()
    save_file({"w": torch.zeros(LIMIT)}, folder / "model.safetensors")


def torch_state(folder: Path) -> None:
    folder.mkdir()
    torch.save({"w": torch.zeros(LIMIT)}, folder / "state.pt")


def tiny_model(folder: Path) -> None:
    build_tiny_model(folder, family="qwen3_vl", seed=0, corpus=["which digit?"])


def copied(folder: Path) -> None:
    source = folder.parents[1] / "source"
    source.mkdir(exist_ok=True)
    if not (source / "large").exists():
        (source / "large").symlink_to("/proc/self/exe")
    shutil.copytree(source, folder)


DATASETS: dict[str, tuple[type[AbstractDataset], Any]] = {
    "table": (partial(TableDataset, schema="qvl_pipeline.data.tables.REJECTS"), pd.DataFrame([REJECT])),
    "streamed table": (partial(TableDataset, schema="qvl_pipeline.data.tables.REJECTS", streamed=True), rows),
    "predictions": (TableDataset, pd.DataFrame({"answer": [NOISE.hex()]})),
    "json": (JsonDataset, {"overlong": [NOISE.hex()]}),
    "page": (PageDataset, NOISE.hex()),
    "curves": (CurvesDataset, pd.DataFrame({"loss": range(LIMIT)})),
    "tokenized table": (FileDataset, tokens),
    "stream samples": (FileDataset, stream),
    "frame store": (FolderDataset, frames),
    "weights": (FolderDataset, weights),
    "torch": (FolderDataset, torch_state),
    "tiny model": (FolderDataset, tiny_model),
    "copied model": (FolderDataset, copied),
}


def sentence(action: Callable[[], object]) -> str:
    """Return what `kedro run` shows when it does this."""
    with pytest.raises(click.ClickException) as shown, one_sentence():
        action()
    text = shown.value.message
    assert "\n" not in text
    assert "0.0 GiB" not in text
    assert " are free there. Make room, and run the same command again" in text
    return text


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # what a person would see besides
@pytest.mark.parametrize("name", DATASETS)
def test_a_hand_over_that_does_not_fit_is_named_and_the_old_one_stays(name: str, tmp_path: Path) -> None:
    make, data = DATASETS[name]
    place = tmp_path / "out" / "entry"
    dataset = make(filepath=str(place))
    if make in (FileDataset, FolderDataset):
        dataset.save(lambda path: path.mkdir() if make is FolderDataset else path.write_text("old"))
    before = listing(tmp_path / "out")
    with files_limited_to(LIMIT):
        assert str(place) in sentence(lambda: dataset.save(data))
    assert listing(tmp_path / "out") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == (["entry"] if before or dataset.exists() else [])
    dataset.save(data)
    assert dataset.exists()
    assert listing(tmp_path / "out") != before


def test_the_cache_of_frames_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    whole = tmp_path / "whole"
    frames(whole)
    with files_limited_to(LIMIT), pytest.raises(OSError, match="File too large"):
        FrameCache(tmp_path / "cache").keep(whole / "frames-00000.arrow", ["key"], [], pa.schema([]))
    assert FrameCache(tmp_path / "cache").clip("key") is None
    frames(tmp_path / "again", FrameCache(tmp_path / "cache"))
    assert FrameCache(tmp_path / "cache").clip("key") is not None


def test_a_database_of_runs_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with files_limited_to(LIMIT):
        assert str(tmp_path / "mlflow.db") in sentence(lambda: start_run(uri, "qvl_pipeline", str(tmp_path), "first"))


def test_what_the_tracking_server_did_not_take_is_kept_whole_or_not(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "unsent")
    outbox._next_try = float("inf")
    with files_limited_to(LIMIT), pytest.raises(OSError, match="File too large"):
        outbox.send("run", "a text", {"kind": "text", "text": NOISE.hex(), "name": "a.txt"})
    assert not list((tmp_path / "unsent").rglob("entry.json"))
    outbox.send("run", "a text", {"kind": "text", "text": NOISE.hex(), "name": "a.txt"})
    (kept,) = (tmp_path / "unsent").rglob("entry.json")
    assert json.loads(kept.read_text())["text"] == NOISE.hex()


def checkpoint_does_not_fit(folder: Path, asynchronous: bool) -> None:
    training = Training(folder, asynchronous=asynchronous)

    def save(step: int) -> None:
        training.step()
        training.checkpoints.save(step)
        training.checkpoints.wait()

    save(1)
    said = (
        r"after step 2 could not .* \(about [\d.]+ kB are needed, [\d.]+ [kMGT]?B are free there\); the last complete"
    )
    with files_limited_to(LIMIT), pytest.raises(CheckpointError, match=said):
        save(2)
    dist.barrier()
    assert [step for step, _ in completed(folder)] == [1]
    again = Training(folder, asynchronous=asynchronous)
    assert again.checkpoints.load_newest() == 1
    again.step()
    again.checkpoints.save(2)
    again.checkpoints.wait()
    assert [step for step, _ in completed(folder)] == [1, 2]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_does_not_fit_is_named_with_its_size(asynchronous: bool, tmp_path: Path) -> None:
    run_ranks(checkpoint_does_not_fit, 1, tmp_path / "run", asynchronous, log_dir=tmp_path / "logs")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_whatever_a_library_says_of_a_full_disk_is_one_sentence(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1500)

    def write() -> None:
        with room_for(tmp_path / "file"):
            raise error

    text = sentence(write)
    assert text.startswith(f"{tmp_path / 'file'} cannot be written, the disk is full: 1.5 kB of it were written, ")
    with pytest.raises(NoRoomError, match=r"12.3 MB are needed, "), room_for(tmp_path / "file", 12_345_678):
        raise error
