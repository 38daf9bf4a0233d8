from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.store import FrameStore, FrameStoreWriter, StoredClip, clip_id


def pictures(seed: int, n_frames: int = 4, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(n_frames, 3, height, width), dtype=np.uint8)


def stored(path: str, frames: np.ndarray, encoding: str = "png", start: float | None = None) -> StoredClip:
    return StoredClip(
        path=path,
        start=start,
        end=None,
        height=frames.shape[2],
        width=frames.shape[3],
        source_fps=4.0,
        encoding=encoding,
        frame_indices=[2 * number for number in range(len(frames))],
        seconds=[number / 2 for number in range(len(frames))],
        frames=[encode_frame(frame, encoding, jpeg_quality=95) for frame in frames],
    )


@pytest.mark.parametrize("encoding", ["raw", "zstd", "png"])
def test_lossless_encodings_give_the_pixels_back(tmp_path: Path, encoding: str) -> None:
    clips = {name: pictures(seed, n_frames=seed + 2) for seed, name in enumerate(["a.mp4", "b.mp4", "c.mp4"])}
    with FrameStoreWriter(tmp_path) as writer:
        for name, frames in clips.items():
            writer.add(stored(name, frames, encoding))
    store = FrameStore(tmp_path)
    assert list(store) == list(clips)
    for name, frames in clips.items():
        np.testing.assert_array_equal(store.frames(name), frames)


def test_jpeg_gives_nearly_the_pixels_back(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8), (2, 3, 32, 48))
    with FrameStoreWriter(tmp_path) as writer:
        writer.add(stored("a.mp4", smooth, "jpeg"))
    assert np.abs(FrameStore(tmp_path).frames("a.mp4").astype(int) - smooth).max() <= 4


def test_raw_frames_are_a_view_of_the_file(tmp_path: Path) -> None:
    with FrameStoreWriter(tmp_path) as writer:
        writer.add(stored("a.mp4", pictures(0), "raw"))
    before = pa.total_allocated_bytes()
    frames = FrameStore(tmp_path).frames("a.mp4")
    assert not frames.flags.owndata
    assert not frames.flags.writeable
    assert pa.total_allocated_bytes() - before < frames.nbytes


def test_a_full_shard_is_closed_and_its_clips_stay_readable(tmp_path: Path) -> None:
    clips = {f"{number}.mp4": pictures(number) for number in range(7)}
    with FrameStoreWriter(tmp_path, shard_bytes=2 * pictures(0).nbytes) as writer:
        for name, frames in clips.items():
            writer.add(stored(name, frames, "raw"))
    assert sorted(path.name for path in tmp_path.glob("frames-*.arrow")) == [f"frames-0000{n}.arrow" for n in range(4)]
    store = FrameStore(tmp_path)
    for name, frames in reversed(clips.items()):
        np.testing.assert_array_equal(store.frames(name), frames)


def test_the_files_are_as_the_contract_says(tmp_path: Path) -> None:
    with FrameStoreWriter(tmp_path) as writer:
        writer.add(stored("a.mp4", pictures(0)))
        writer.add(stored("a.mp4", pictures(1), start=1.5))
    index = pa.ipc.open_file(tmp_path / "index.arrow").read_all().to_pylist()
    expected = {
        "path": "a.mp4",
        "end": None,
        "shard": "frames-00000.arrow",
        "n_frames": 4,
        "height": 32,
        "width": 48,
        "source_fps": 4.0,
        "encoding": "png",
        "backend": "pyav",
        "content_hash": None,
        "frame_indices": [0, 2, 4, 6],
        "seconds": [0.0, 0.5, 1.0, 1.5],
    }
    assert index == [
        {"clip_id": "a.mp4", "start": None, "batch": 0, **expected},
        {"clip_id": "a.mp4#1.5-", "start": 1.5, "batch": 1, **expected},
    ]
    with pa.ipc.open_file(str(tmp_path / "frames-00000.arrow")) as shard:
        assert shard.num_record_batches == 2
        assert [(field.name, field.type) for field in shard.schema] == [
            ("frame", pa.binary()),
            ("second", pa.float64()),
            ("index", pa.int64()),
        ]
        assert shard.get_batch(1).column("second").to_pylist() == [0.0, 0.5, 1.0, 1.5]


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with FrameStoreWriter(tmp_path / name) as writer:
            writer.add(stored("a.mp4", pictures(0)))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(None, None, "a.mp4"), (1.5, None, "a.mp4#1.5-"), (None, 2, "a.mp4#-2.0"), (0, 2.25, "a.mp4#0.0-2.25")],
)
def test_a_clip_is_named_by_its_file_and_its_bounds(start: float | None, end: float | None, expected: str) -> None:
    assert clip_id("a.mp4", start, end) == expected


def fail_half_way(folder: Path) -> None:
    with FrameStoreWriter(folder) as writer:
        writer.add(stored("a.mp4", pictures(0)))
        raise RuntimeError


def test_an_unknown_clip_and_an_unfinished_store_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path)
    with pytest.raises(UserError, match=r"index.arrow is missing: run the pipeline 'sample'"):
        FrameStore(tmp_path)
    with FrameStoreWriter(tmp_path):
        pass
    with pytest.raises(UserError, match=r"holds no frames of 'b.mp4'"):
        FrameStore(tmp_path).frames("b.mp4")


def test_a_store_can_be_sent_to_another_process(tmp_path: Path) -> None:
    with FrameStoreWriter(tmp_path) as writer:
        writer.add(stored("a.mp4", pictures(0)))
    store = FrameStore(tmp_path)
    store.frames("a.mp4")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).frames("a.mp4"), pictures(0))
