"""What an interrupted `sample` leaves: no process, no half store, and every clip that was finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.config import DataEngineConfig, ModelConfig, SampleConfig
from qvl_pipeline.data.frames import writing
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.decode_worker import DecodeWorker
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.pipelines.sample.nodes import sample_clips
from tests.data.samples import samples_table
from tests.media.clips import index_clips, write_clip
from tests.pipelines import bad_readers

MODEL = ModelConfig(processor_type="qwen3_vl")
# Ends as `kedro run` does. Says when the first decoding process is about to start, or when the third clip is written.
PROGRAM = """
import pickle, signal, sys
from pathlib import Path
from qvl_pipeline.cli.run import _Terminated, _end, _leave
from qvl_pipeline.datasets import FolderDataset
from qvl_pipeline.media.frames import decode_worker, store
from qvl_pipeline.pipelines.sample.nodes import sample_clips

def say_when(owner, name, calls, before):
    real, left = getattr(owner, name), [calls]
    def said(self, *arguments):
        done = None if before else real(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            print("now", flush=True)
            if not before:
                sys.stdin.read()
        return real(self, *arguments) if before else done
    setattr(owner, name, said)

if __name__ == "__main__":
    arguments, folder, moment = pickle.loads(Path(sys.argv[1]).read_bytes())
    signal.signal(signal.SIGTERM, _leave)
    if moment == "starting":
        say_when(decode_worker.DecodeWorker, "_start", 1, True)
    else:
        say_when(store.FrameStoreWriter, "add", 3, False)
    try:
        FolderDataset(filepath=folder).save(sample_clips(*arguments))
    except KeyboardInterrupt:
        _end(130)
    except _Terminated as error:
        _end(error.code)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("clips")
    seconds = [number / 10 for number in range(20)]
    return index_clips([write_clip(folder / f"{n}.mp4", seconds[n:], time_base=Fraction(1, 10)) for n in range(6)])


def arguments(clips: pd.DataFrame, cache: Path) -> tuple[object, ...]:
    small = {"video_min_frames": 2, "video_min_pixels": 1024, "video_max_pixels": 64 * 64, "num_workers": 2}
    messages = [[("user", [("video", path, None, None)]), ("assistant", "7")] for path in clips["path"]]
    samples = samples_table([{"messages": turns} for turns in messages])
    return samples, clips, SampleConfig(**small, frame_cache=str(cache)), MODEL, DataEngineConfig()


def processes_of(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.parametrize(
    ("moment", "number"),
    [("starting", signal.SIGINT), ("starting", signal.SIGTERM), ("third clip", signal.SIGINT)],
    ids=["SIGINT while starting", "SIGTERM while starting", "SIGINT after three clips"],
)
def test_an_interrupted_run_ends_at_once_and_keeps_its_clips(
    moment: str, number: signal.Signals, clips: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    given = arguments(clips, tmp_path / "cache")
    pd.to_pickle((given, str(tmp_path / "store"), moment), tmp_path / "arguments", compression=None)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "arguments")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    ) as run:
        while (line := run.stdout.readline()) != "now\n":  # after it comes what the bar shows
            assert line
        os.killpg(run.pid, number)  # as a terminal does, and a batch system
        sent = time.monotonic()
        assert run.wait(120) == 128 + number
        assert time.monotonic() - sent < 60, "it took seconds at most, on a machine with other work too"
        assert "Traceback" not in run.stderr.read()
        while left := processes_of(run.pid):  # the server of decoding processes is importing, and ends then
            assert time.monotonic() - sent < 120, left
            time.sleep(0.1)
    assert [path.name for path in tmp_path.iterdir() if "store" in path.name] == []
    kept = [
        name for table in (tmp_path / "cache").glob("*.parquet") for name in pq.read_table(table)["path"].to_pylist()
    ]
    assert kept == ([] if moment == "starting" else clips["path"][:3].tolist())

    decoded: list[str] = []
    read = DecodeWorker.read
    monkeypatch.setattr(DecodeWorker, "read", lambda self, clip: decoded.append(clip.path) or read(self, clip))
    sample_clips(*given)(tmp_path / "again")
    assert sorted(decoded) == clips["path"][len(kept) :].tolist()
    sample_clips(*arguments(clips, tmp_path / "other"))(tmp_path / "undisturbed")
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1, "what an interrupted run kept has no other use"


def test_a_store_goes_on_with_the_longest_shard_that_it_may_begin_with(
    clips: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard was finished by a run that found its beginning in the cache and was interrupted later."""
    monkeypatch.setattr("qvl_pipeline.media.frames.store.FrameStoreWriter.__init__.__defaults__", (360, None))
    add, added = writing.FrameStoreWriter.add, []

    def interrupted_in(clip: int) -> None:
        def interrupted(self: object, stored: object, key: str = "") -> None:
            if len(added) == clip:
                raise KeyboardInterrupt
            added.append(key)
            add(self, stored, key)

        added.clear()
        monkeypatch.setattr(writing.FrameStoreWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample_clips(*arguments(clips, tmp_path / "cache"))(tmp_path / f"until{clip}")

    interrupted_in(1)
    interrupted_in(5)
    monkeypatch.setattr(writing.FrameStoreWriter, "add", add)
    sample_clips(*arguments(clips, tmp_path / "cache"))(tmp_path / "whole")
    first = "frames-00000.arrow"
    assert FrameStore(tmp_path / "whole").columns(["shard"])["shard"].to_pylist().count(first) == 3
    assert (tmp_path / "whole" / first).samefile(tmp_path / "until5" / first), "linked, not written again"


def test_a_worker_that_is_closed_starts_no_process() -> None:
    worker = DecodeWorker(bad_readers.crash_on_two, timeout_s=60)
    worker.close()
    with pytest.raises(RuntimeError, match="the worker is closed"):
        worker.read(1)


def test_frames_that_are_lost_are_named_before_anything_reads_them(clips: pd.DataFrame, tmp_path: Path) -> None:
    sample_clips(*arguments(clips, tmp_path / "cache"))(tmp_path / "store")
    shard = tmp_path / "store" / "frames-00000.arrow"
    FrameStore(tmp_path / "store").check_shards()
    whole = shard.read_bytes()
    shard.unlink()  # a name of its own: the cache has the other
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"frames are lost, .*frames-00000.arrow cannot be read .*--pipelines sample`"):
        FrameStore(tmp_path / "store").check_shards()
    shard.unlink()
    with pytest.raises(UserError, match=r"frames-00000.arrow is missing: run `kedro run --pipelines sample`"):
        FrameStore(tmp_path / "store").check_shards()
