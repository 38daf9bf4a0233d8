from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.config import DataEngineConfig, ModelConfig, SampleConfig, ValidateConfig
from qvl_pipeline.data.frames import writing
from qvl_pipeline.data.frames.clips import list_clips
from qvl_pipeline.data.made_with import made_with
from qvl_pipeline.data.spread import in_order
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames import store
from qvl_pipeline.media.frames.decode_worker import DecodeWorker, Failure
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.pipelines.sample.nodes import keep_sampled, quarantine_samples, sample_clips
from tests.data.samples import samples_table
from tests.media.clips import index_clips, number_in, write_clip
from tests.pipelines import bad_readers

CONSTANT = [number / 10 for number in range(60)]
VARIABLE = np.concatenate([np.arange(40) / 20, 2 + np.arange(20) / 2]).tolist()
MODEL = ModelConfig(processor_type="qwen3_vl")
HERE = DataEngineConfig()


def config(**changes: Any) -> SampleConfig:
    small = {"video_min_frames": 2, "video_min_pixels": 1024, "video_max_pixels": 64 * 64}
    return SampleConfig(**small | {"frame_cache": None, "num_workers": 1, "max_reject_fraction": 1} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "constant.mp4", CONSTANT, time_base=Fraction(1, 10), b_frames=2)
    write_clip(folder / "variable.mp4", VARIABLE, time_base=Fraction(1, 1000), b_frames=2)
    return folder


@pytest.fixture(scope="module")
def media_index(folder: Path) -> pd.DataFrame:
    return index_clips(sorted(folder.glob("*.mp4")))


@pytest.fixture
def clip(folder: Path) -> Callable[..., tuple[str, str, float | None, float | None]]:
    return lambda name, start=None, end=None: ("video", str(folder / f"{name}.mp4"), start, end)


def table_of(*clips: tuple[str, str, float | None, float | None]) -> pd.DataFrame:
    return samples_table([{"messages": [("user", list(clips)), ("assistant", "7")]}])


def sampled(tmp_path: Path, samples: pd.DataFrame, media_index: pd.DataFrame, **changes: Any) -> FrameStore:
    sample_clips(samples, media_index, config(**changes), MODEL, HERE)(tmp_path / "store")
    return FrameStore(tmp_path / "store")


def numbers(store: FrameStore, clip_id: str) -> list[int]:
    """Frame numbers that the stored pictures show."""
    return [number_in(frame.transpose(1, 2, 0)) for frame in store.frames(clip_id)]


@pytest.mark.parametrize(
    ("bounds", "changes"),
    [
        ((None, None), {"fps": 2}),
        ((None, None), {"fps": 5, "video_max_frames": 8}),
        ((None, None), {"video_sampling_strategy": "frame_num", "frame_num": 6}),
        ((1.0, 2.6), {"fps": 4}),
        ((None, 1.9), {"fps": 4}),
        ((3.5, None), {"fps": 2}),
    ],
    ids=["rate", "cap", "number", "part", "beginning", "end"],
)
@pytest.mark.parametrize("name", ["constant", "variable"])
def test_stored_seconds_are_those_of_the_frames_that_the_pictures_show(
    tmp_path: Path,
    media_index: pd.DataFrame,
    clip: Callable[..., Any],
    name: str,
    bounds: tuple[float | None, float | None],
    changes: dict[str, Any],
) -> None:
    store = sampled(tmp_path, table_of(clip(name, *bounds)), media_index, **changes)
    [clip_id] = store
    info = store.info(clip_id)
    seconds = CONSTANT if name == "constant" else VARIABLE
    shown = numbers(store, clip_id)
    assert shown == info["frame_indices"]
    assert info["seconds"] == pytest.approx([seconds[number] for number in shown], abs=1e-9)
    start, end = (bound if bound is not None else limit for bound, limit in zip(bounds, (0, np.inf), strict=True))
    assert start <= info["seconds"][0]
    assert info["seconds"][-1] <= end
    assert len(shown) == info["n_frames"]
    assert len(shown) % 2 == 0


def test_a_part_of_variable_rate_is_sampled_at_the_rate_asked_for(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    """2 s at 20 frames a second, then 10 s at 2: both parts give 2 frames a second."""
    store = sampled(tmp_path, table_of(clip("variable", 0.0, 1.9), clip("variable", 2.0, 9.0)), media_index, fps=2)
    assert [len(numbers(store, clip_id)) for clip_id in store] == [2, 14]


def test_every_clip_is_sampled_once_in_order_of_appearance(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    whole, part, other = clip("variable"), clip("variable", 1.0, 3.0), clip("constant")
    samples = pd.concat([table_of(whole, part), table_of(other, whole)])
    listed = [(clip.path, clip.start, clip.end) for clip in list_clips(samples, media_index)]
    assert listed == [whole[1:], part[1:], other[1:]]
    store = sampled(tmp_path, samples, media_index)
    assert list(store) == [whole[1], f"{whole[1]}#1.0-3.0", other[1]]


def test_frames_fit_the_patches_of_the_model(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    for family, side in (("qwen3_vl", 64), ("qwen2_5_vl", 56)):
        model = ModelConfig(processor_type=family)
        sample_clips(table_of(clip("constant")), media_index, config(), model, HERE)(tmp_path / family)
        store = FrameStore(tmp_path / family)
        [clip_id] = store
        assert store.frames(clip_id).shape[1:] == (3, side, side)


@pytest.fixture
def many_clips(media_index: pd.DataFrame, clip: Callable[..., Any]) -> pd.DataFrame:
    """Eight clips, two to a shard when `small_shards`."""
    return table_of(*(clip(name, start, start + 2) for name in ("constant", "variable") for start in range(4)))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is full with two clips."""
    monkeypatch.setattr(store.FrameStoreWriter.__init__, "__defaults__", (350, None))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that were decoded."""
    names: list[str] = []
    read = DecodeWorker.read
    monkeypatch.setattr(DecodeWorker, "read", lambda worker, clip: [names.append(clip.name), read(worker, clip)][1])
    return names


def assert_same_bytes(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in other.iterdir()) == files
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, media_index: pd.DataFrame, many_clips: pd.DataFrame, small_shards: None
) -> None:
    for workers in (1, 3):
        sampled(tmp_path / str(workers), many_clips, media_index, num_workers=workers)
    assert len(list((tmp_path / "1" / "store").glob("*.arrow"))) > 2
    assert_same_bytes(tmp_path / "1" / "store", tmp_path / "3" / "store")


def test_what_was_decoded_before_is_not_decoded_again(
    tmp_path: Path, media_index: pd.DataFrame, many_clips: pd.DataFrame, decoded: list[str], small_shards: None
) -> None:
    settings = {"frame_cache": str(tmp_path / "cache")}
    first = sampled(tmp_path / "1", many_clips, media_index, **settings)
    assert sorted(decoded) == sorted(first)
    decoded.clear()
    sampled(tmp_path / "2", many_clips, media_index, **settings)
    assert decoded == []
    assert_same_bytes(tmp_path / "1" / "store", tmp_path / "2" / "store")
    shard = "store/frames-00000.arrow"
    assert (tmp_path / "1" / shard).samefile(tmp_path / "2" / shard), "a finished shard is linked, not written again"
    # Other rules, other frames.
    sampled(tmp_path / "3", many_clips, media_index, fps=3, **settings)
    assert len(decoded) == 8
    decoded.clear()
    # A clip more at the front: the others are copied into other shards.
    more = pd.concat([table_of(("video", media_index["path"][0], None, None)), many_clips])
    again = sampled(tmp_path / "4", more, media_index, **settings)
    assert decoded == [media_index["path"][0]]
    for name in first:
        np.testing.assert_array_equal(again.frames(name), first.frames(name))
    sampled(tmp_path / "5", more, media_index)
    assert_same_bytes(tmp_path / "4" / "store", tmp_path / "5" / "store")


def test_the_same_content_under_another_name_is_not_decoded_again(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any], decoded: list[str]
) -> None:
    settings = {"frame_cache": str(tmp_path / "cache")}
    first = sampled(tmp_path / "1", table_of(clip("constant")), media_index, **settings)
    path = Path(shutil.copy(media_index["path"][0], tmp_path / "renamed.mp4"))
    decoded.clear()
    store = sampled(tmp_path / "2", table_of(("video", str(path), None, None)), index_clips([path]), **settings)
    assert decoded == []
    assert store.info(str(path))["path"] == str(path)
    np.testing.assert_array_equal(store.frames(str(path)), first.frames(media_index["path"][0]))


def test_shards_that_no_store_holds_are_removed_from_the_cache(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    settings = {"frame_cache": str(tmp_path / "cache")}
    for name in ("constant", "variable"):
        sampled(tmp_path / name, table_of(clip(name)), media_index, **settings)
    shutil.rmtree(tmp_path / "constant")
    sampled(tmp_path / "again", table_of(clip("variable")), media_index, **settings)
    [kept] = (tmp_path / "cache").glob("*.arrow")
    assert kept.samefile(tmp_path / "again" / "store" / "frames-00000.arrow")
    assert [path.stem for path in (tmp_path / "cache").glob("*.parquet")] == [kept.stem]


KILLED_RUN = """
import pickle, sys
from pathlib import Path
from qvl_pipeline.media.frames import store
from qvl_pipeline.media.frames.cache import FrameCache
from qvl_pipeline.pipelines.sample.nodes import sample_clips

if __name__ == "__main__":
    arguments, folder, shards = pickle.loads(Path(sys.argv[1]).read_bytes())
    store.FrameStoreWriter.__init__.__defaults__ = (350, None)
    keep = FrameCache.keep

    def keep_and_wait(self, *arguments):
        global shards
        keep(self, *arguments)
        shards -= 1
        if shards == 0:
            print("now", flush=True)
            sys.stdin.read()

    FrameCache.keep = keep_and_wait
    sample_clips(*arguments)(folder)
"""


def test_a_killed_run_is_taken_up_where_it_was(
    tmp_path: Path, media_index: pd.DataFrame, many_clips: pd.DataFrame, decoded: list[str], small_shards: None
) -> None:
    undisturbed = sampled(tmp_path / "undisturbed", many_clips, media_index)
    settings = config(frame_cache=str(tmp_path / "cache"), num_workers=2)
    (tmp_path / "program.py").write_text(KILLED_RUN)
    arguments = ((many_clips, media_index, settings, MODEL, HERE), tmp_path / "killed", 2)
    pd.to_pickle(arguments, tmp_path / "arguments", compression=None)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "arguments")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout.readline() == "now\n"
        run.send_signal(signal.SIGKILL)
    finished = [pq.read_table(path)["clip_id"].to_pylist() for path in (tmp_path / "cache").glob("*.parquet")]
    assert len(finished) == 2
    shutil.rmtree(tmp_path / "killed")
    decoded.clear()
    store = sampled(tmp_path / "again", many_clips, media_index, frame_cache=str(tmp_path / "cache"))
    assert sorted(decoded) == sorted(set(store) - {name for names in finished for name in names})
    assert_same_bytes(Path(undisturbed.folder), Path(store.folder))


def test_no_more_clips_are_held_than_the_window() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        begin = partial(pool.submit, bad_readers.recorder(started))
        for expected, number in enumerate(in_order(begin, range(50), ahead=6)):
            assert number == expected
            assert len(started) <= expected + 6


def test_too_many_clips_that_are_too_short_are_refused_before_any_decoding(
    media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    samples = pd.concat([table_of(clip("constant")), table_of("How many?")], ignore_index=True)
    settings = {"video_sampling_strategy": "frame_num", "frame_num": 100}
    with pytest.raises(UserError, match=r"1 of 2 samples .* by clip_unfit: .*constant.mp4': 100 frames are to be"):
        sample_clips(samples, media_index, config(max_reject_fraction=0.4, **settings), MODEL, HERE)


def test_what_is_kept_holds_the_parameters_that_it_was_made_with() -> None:
    samples, sample = table_of("How many?"), config()
    samples.attrs = made_with({}, validate=ValidateConfig())
    kept = keep_sampled(samples, samples.iloc[:0], sample, MODEL)
    assert kept.attrs == made_with({}, validate=ValidateConfig(), sample=sample, model=MODEL)


def lost(tmp_path: Path, samples: pd.DataFrame, media_index: pd.DataFrame, **changes: Any) -> list[tuple[str, str]]:
    """Sample, and return the rule and the detail of every sample in quarantine."""
    sampled(tmp_path, samples, media_index, **changes)
    quarantine, report = quarantine_samples(samples, tmp_path / "store")
    counts = report["counts"]
    assert counts["valid"] == len(samples) == counts["sampled"] + counts["quarantined"]
    assert sum(report["rules"].values()) == counts["quarantined"] == len(quarantine)
    kept = keep_sampled(samples, quarantine, config(max_reject_fraction=1), MODEL)
    assert sorted([*kept["sample_id"], *quarantine["sample_id"]]) == sorted(samples["sample_id"])
    if len(quarantine):
        with pytest.raises(UserError, match=r"sample.max_reject_fraction allows; the first is source/\d+, by"):
            keep_sampled(samples, quarantine, config(max_reject_fraction=0), MODEL)
    return list(zip(quarantine["rule"], quarantine["detail"], strict=True))


def damaged_in_the_middle(path: Path) -> pd.DataFrame:
    """Write a clip whose first and last group of pictures are whole, and return its media index."""
    write_clip(path, CONSTANT, time_base=Fraction(1, 10), gop=12)
    with av.open(str(path)) as container:
        payload = [bytes(packet) for packet in container.demux(video=0)][20]
    path.write_bytes(path.read_bytes().replace(payload, b"\xff" * len(payload)))
    return index_clips([path])


def test_a_clip_damaged_in_the_middle_costs_its_sample_only(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "damaged.mkv"
    index = pd.concat([media_index, damaged_in_the_middle(path)], ignore_index=True)
    rows = [[clip("constant")], [clip("variable"), ("video", str(path), None, None)], [clip("variable")]]
    samples = samples_table([{"messages": [("user", parts), ("assistant", "7")]} for parts in rows])
    [(rule, detail)] = lost(tmp_path, samples, index)
    assert rule == "clip_undecodable"
    assert str(path) in detail
    assert list(FrameStore(tmp_path / "store")) == [clip("constant")[1], clip("variable")[1]]
    assert "valid 3 = sampled 2 + quarantined 1; 34 frames of 2 clips" in caplog.messages
    assert f"clip_undecodable: 1, for example source/1: {detail}" in caplog.messages


def test_a_clip_that_hangs_is_given_up_in_time() -> None:
    worker = DecodeWorker(time.sleep, timeout_s=1.0)
    assert worker.read(0) is None
    assert worker.read(60) == Failure("decode_timeout", "took longer than 1 s to decode")
    assert worker.read(0) is None
    worker.close()


def test_a_pipe_in_place_of_a_clip_is_not_waited_for(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    index = pd.concat([media_index, media_index.iloc[:1].assign(path=str(tmp_path / "pipe.mp4"))], ignore_index=True)
    rows = [[("video", str(tmp_path / "pipe.mp4"), None, None)], [clip("constant")]]
    samples = samples_table([{"messages": [("user", parts), ("assistant", "7")]} for parts in rows])
    [(rule, detail)] = lost(tmp_path, samples, index)
    assert (rule, detail.endswith("pipe.mp4' is not a file")) == ("clip_undecodable", True)
    assert list(FrameStore(tmp_path / "store")) == [clip("constant")[1]]


def test_a_decoder_that_crashes_takes_only_its_clip_along() -> None:
    worker = DecodeWorker(bad_readers.crash_on_two, timeout_s=60)
    outcomes = [worker.read(number) for number in (1, 2, 3)]
    worker.close()
    assert outcomes == [1, Failure("decoder_crashed", "crashed the decoder (exit status -11)"), 3]


def test_a_clip_that_has_changed_since_is_named(tmp_path: Path, media_index: pd.DataFrame) -> None:
    path = tmp_path / "short.mp4"
    write_clip(path, CONSTANT[:3], time_base=Fraction(1, 10))
    index = media_index.iloc[:1].assign(path=str(path))
    [(rule, detail)] = lost(tmp_path, table_of(("video", str(path), None, None)), index)
    assert (rule, "has changed since 'validate' ran" in detail) == ("clip_changed", True)


def test_a_part_with_too_few_frames_is_named(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    [(rule, detail)] = lost(tmp_path, table_of(clip("constant", 1.0, 1.05)), media_index)
    assert rule == "clip_unfit"
    assert "fewer than two frames lie between second 1.0 and second 1.05" in detail


def test_a_clip_that_was_not_probed_is_an_error(media_index: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"video 'gone.mp4' is not in media_index: run the pipeline 'validate' again"):
        sample_clips(table_of(("video", "gone.mp4", None, None)), media_index, config(), MODEL, HERE)


def test_a_store_that_does_not_fit_on_the_disk_is_refused(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, decoded: list
) -> None:
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**4))
    with pytest.raises(UserError, match=r"about [\d.]+ kB of frames are to be written .* sample.materialize: false"):
        sampled(tmp_path, table_of(clip("constant")), media_index)
    assert decoded == []
    sampled(tmp_path, table_of(clip("constant")), media_index, materialize=False)


def test_memory_holds_back_the_number_of_processes(media_index: pd.DataFrame, clip: Callable[..., Any]) -> None:
    clips = list_clips(table_of(clip("constant")), media_index)
    gib = writing.GIB

    def workers(size: int, **changes: Any) -> int:
        return writing._count_workers(clips, [size], config(**changes))

    assert workers(10_000, num_workers=3, memory_gib=8) == 3
    assert workers(gib // 2, num_workers=9, memory_gib=8) == 3
    assert workers(gib // 2, num_workers=9, memory_gib=8, materialize=False) == 9
    with pytest.raises(UserError, match=r"constant.mp4' needs about 2.5 GiB .* sample.memory_gib \(2\): raise it"):
        workers(gib // 2, memory_gib=2)


@pytest.mark.parametrize("encoding", ["raw", "zstd", "png"])
def test_frames_decoded_on_the_fly_are_those_that_would_be_stored(
    tmp_path: Path, media_index: pd.DataFrame, many_clips: pd.DataFrame, encoding: str
) -> None:
    stored = sampled(tmp_path / "stored", many_clips, media_index, frame_encoding=encoding)
    fly = sampled(tmp_path / "fly", many_clips, media_index, frame_encoding=encoding, materialize=False)
    assert list((tmp_path / "fly" / "store").glob("frames-*.arrow")) == []
    for name in stored:
        np.testing.assert_array_equal(fly.frames(name), stored.frames(name))
        differing = {key for key in stored.info(name) if fly.info(name)[key] != stored.info(name)[key]}
        assert differing == {"shard", "batch"}


def test_without_clips_the_store_is_empty(tmp_path: Path, media_index: pd.DataFrame) -> None:
    samples = samples_table([{"messages": [("user", "Hi"), ("assistant", "7")]}])
    assert len(sampled(tmp_path, samples, media_index)) == 0
