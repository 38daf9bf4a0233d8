"""Training on clips that are decoded whenever they are read, against training on stored frames."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from qvl_pipeline.config import SampleConfig
from qvl_pipeline.data.frames.clips import Clip, read_clip
from qvl_pipeline.media.frames.store import FrameStoreWriter
from tests.engine.training import changed, make_training, trained
from tests.media.clips import SIZE, write_clip

KINDS = ("video", "text", "video", "image")
RULES = {"video_sampling_strategy": "frame_num", "frame_num": 4, "video_min_pixels": 1024, "video_max_pixels": SIZE**2}


def write_store(folder: Path, clips: list[Path], materialize: bool) -> str:
    sample = SampleConfig(**RULES, materialize=materialize)
    with FrameStoreWriter(folder) as store:
        for path in clips:
            content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
            clip = Clip(str(path), None, None, content_hash, 40, 10.0, SIZE, SIZE)
            store.add(read_clip(clip, sample=sample, patch_size=16, backend="pyav"))
    return str(folder)


def test_training_is_the_same_to_the_bit(
    tmp_path: Path, tiny_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds=KINDS, packs_per_step=2)
    monkeypatch.chdir(tmp_path / "data")  # the clips of that training are "0.mp4" and "2.mp4"
    clips = [Path(f"{number}.mp4") for number, kind in enumerate(KINDS) if kind == "video"]
    for offset, path in enumerate(clips):
        write_clip(path, [number / 10 for number in range(offset, 40 + offset)], time_base=Fraction(1, 10), b_frames=2)
    rows, weights = [], []
    for name, materialize in (("stored", True), ("fly", False)):
        store = write_store(tmp_path / name, clips, materialize)
        assert bool(list(Path(store).glob("frames-*.arrow"))) == materialize
        spec = changed(training, tmp_path / f"run_{name}", data={"video_frames": store})
        rows.append([(row["loss"], row["grad_norm"]) for row in trained(spec, 1)])
        weights.append((tmp_path / f"run_{name}" / "export" / "model.safetensors").read_bytes())
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    assert weights[0] == weights[1]
