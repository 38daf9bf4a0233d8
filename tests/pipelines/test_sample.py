from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qvl_pipeline.config import ModelConfig, SampleConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.decoding import read_frame_table
from qvl_pipeline.media.frame_store import FrameStore
from qvl_pipeline.pipelines.sample import nodes
from qvl_pipeline.pipelines.sample.nodes import list_clips, sample_clips
from tests.data.samples import samples_table
from tests.media.clips import number_in, write_clip

CONSTANT = [number / 10 for number in range(60)]
VARIABLE = np.concatenate([np.arange(40) / 20, 2 + np.arange(20) / 2]).tolist()
MODEL = ModelConfig(processor_type="qwen3_vl")


def config(**changes: Any) -> SampleConfig:
    return SampleConfig(**{"video_min_frames": 2, "video_min_pixels": 1024, "video_max_pixels": 64 * 64} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "constant.mp4", CONSTANT, time_base=Fraction(1, 10), b_frames=2)
    write_clip(folder / "variable.mp4", VARIABLE, time_base=Fraction(1, 1000), b_frames=2)
    return folder


@pytest.fixture(scope="module")
def media_index(folder: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(folder.glob("*.mp4")):
        table = read_frame_table(str(path))
        rows.append({"path": str(path), "type": "video", "n_frames": len(table.seconds), "fps": table.fps})
    return pd.DataFrame(rows)


@pytest.fixture
def clip(folder: Path) -> Callable[..., tuple[str, str, float | None, float | None]]:
    return lambda name, start=None, end=None: ("video", str(folder / f"{name}.mp4"), start, end)


def table_of(*clips: tuple[str, str, float | None, float | None]) -> pd.DataFrame:
    return samples_table([{"messages": [("user", list(clips)), ("assistant", "7")]}])


def sampled(tmp_path: Path, samples: pd.DataFrame, media_index: pd.DataFrame, **changes: Any) -> FrameStore:
    sample_clips(samples, media_index, config(**changes), MODEL)(tmp_path / "store")
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
    assert list_clips(samples) == [whole[1:], part[1:], other[1:]]
    store = sampled(tmp_path, samples, media_index)
    assert list(store) == [whole[1], f"{whole[1]}#1.0-3.0", other[1]]


def test_frames_fit_the_patches_of_the_model(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    for family, side in (("qwen3_vl", 64), ("qwen2_5_vl", 56)):
        model = ModelConfig(processor_type=family)
        sample_clips(table_of(clip("constant")), media_index, config(), model)(tmp_path / family)
        store = FrameStore(tmp_path / family)
        [clip_id] = store
        assert store.frames(clip_id).shape[1:] == (3, side, side)


def test_the_bytes_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, media_index: pd.DataFrame, clip: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = table_of(*(clip(name, start, start + 2) for name in ("constant", "variable") for start in range(4)))
    for threads in (1, 4):
        monkeypatch.setattr(nodes.os, "cpu_count", lambda threads=threads: threads)
        sampled(tmp_path / str(threads), samples, media_index)
    files = sorted((tmp_path / "1" / "store").iterdir())
    assert [file.name for file in files] == ["frames-00000.arrow", "index.parquet"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "4" / "store" / file.name).read_bytes()


def test_no_more_clips_are_held_than_the_window() -> None:
    held, most = 0, 0
    lock = threading.Lock()

    def read(number: int) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return number

    with ThreadPoolExecutor(4) as pool:
        for expected, number in enumerate(nodes._in_order(pool, read, list(range(50)), window=6)):
            assert number == expected
            with lock:
                held -= 1
    assert most <= 6


def test_a_clip_that_is_too_short_is_refused_before_any_decoding(
    media_index: pd.DataFrame, clip: Callable[..., Any]
) -> None:
    samples = table_of(clip("constant"), clip("variable"))
    settings = config(video_sampling_strategy="frame_num", frame_num=100)
    with pytest.raises(UserError, match=r"2 clips are too short .* '.*constant.mp4' \(100 frames are to be sampled"):
        sample_clips(samples, media_index, settings, MODEL)


def test_a_clip_that_was_not_probed_is_an_error(media_index: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"video 'gone.mp4' is not in media_index: run the pipeline 'validate' again"):
        sample_clips(table_of(("video", "gone.mp4", None, None)), media_index, config(), MODEL)


def test_a_file_that_has_changed_since_is_an_error_that_names_it(
    tmp_path: Path, media_index: pd.DataFrame, folder: Path
) -> None:
    path = tmp_path / "short.mp4"
    write_clip(path, CONSTANT[:3], time_base=Fraction(1, 10))
    index = media_index.iloc[:1].assign(path=str(path))
    write = sample_clips(table_of(("video", str(path), 1.0, 4.0)), index, config(), MODEL)
    with pytest.raises(UserError, match=r"clip '.*short.mp4' from 1.0 to 4.0 cannot be sampled: fewer than two frames"):
        write(tmp_path / "store")


def test_without_clips_the_store_is_empty(tmp_path: Path, media_index: pd.DataFrame) -> None:
    samples = samples_table([{"messages": [("user", "Hi"), ("assistant", "7")]}])
    assert len(sampled(tmp_path, samples, media_index)) == 0
