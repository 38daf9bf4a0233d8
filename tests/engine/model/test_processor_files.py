"""What is exported beside weights: the base model's files, and a processor that sees what training saw."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoVideoProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata

from qvl_pipeline.engine.model.export.base_files import find_base_files, with_dtype
from qvl_pipeline.engine.model.export.folder import exported_files
from qvl_pipeline.engine.model.export.processor_files import video_values
from qvl_pipeline.engine.spec import SamplingSpec, TrainSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.frames.sampling import smart_nframes, video_size
from tests.engine.training import changed, make_training
from tests.layouts import OLD_FORMS, in_old_form

SAMPLING = SamplingSpec(
    video_sampling_strategy="fps",
    fps=1.0,
    frame_num=32,
    video_min_frames=3,
    video_max_frames=513,
    video_min_pixels=12544,
    video_max_pixels=50176,
    video_total_pixels=128_000 * 28 * 28 * 9 // 10,
)
PER_CLIP = {Qwen3VLVideoProcessor: True, Qwen2VLVideoProcessor: False}


@pytest.fixture(params=["transformers 5", "4.5x"])
def base(request: pytest.FixtureRequest, family: str, tiny_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    new = tiny_folders(family)
    return (
        new if request.param == "transformers 5" else in_old_form(new, tmp_path / "old", pixels=family == "qwen2_5_vl")
    )


def make_spec(folder: Path, base: Path, family: str) -> TrainSpec:
    training = make_training(folder / "data", base, family, kinds=("text",))
    model = {"image_min_pixels": 4096, "image_max_pixels": 9216}
    return dataclasses.replace(changed(training, folder / "run", model=model), sampling=SAMPLING)


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_all_forms_of_the_processor_say_how_training_sampled_and_all_else_is_the_base(
    base: Path, family: str, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, base, family)
    files = exported_files(AutoProcessor.from_pretrained(base), spec)
    # Releases such as 4.49 fail on the parts of the single file, so it is there only where the base has it.
    of_processor = {*OLD_FORMS} | {path.name for path in base.glob("processor_config.json")}
    kept = {path.name for path in base.iterdir() if path.suffix != ".safetensors"} - of_processor
    assert files.keys() == kept | of_processor
    for name in kept:
        assert files[name] == (base / name).read_bytes(), name

    images, videos = (json.loads(files[name]) for name in OLD_FORMS)
    if single := json.loads(files.get("processor_config.json", b"{}")):
        for part, alone in (("image_processor", images), ("video_processor", videos)):
            assert single[part] | {"processor_class": single["processor_class"]} == alone
    pixels = "chat_template.json" in files and family == "qwen2_5_vl"
    assert ("min_pixels" in images, "min_pixels" in videos) == (pixels, pixels), "the base's own spelling"
    assert ("size" in images, "size" in videos) == (not pixels, not pixels)

    for forms in {frozenset(of_processor), frozenset(OLD_FORMS), frozenset(of_processor - {*OLD_FORMS})} - {
        frozenset()
    }:
        chosen = {name: content for name, content in files.items() if name not in of_processor - forms}
        folder = written(chosen, tmp_path / f"{len(forms)}-forms")
        image, video = AutoImageProcessor.from_pretrained(folder), AutoVideoProcessor.from_pretrained(folder)
        assert dict(image.size) == {"shortest_edge": 4096, "longest_edge": 9216}
        assert (video.fps, video.num_frames, video.min_frames, video.max_frames) == (1.0, None, 4, 512)
        longest = 50176 * 512 if family != "qwen2_5_vl" else 50176
        assert dict(video.size) == {"shortest_edge": 12544, "longest_edge": longest}
        processor = AutoProcessor.from_pretrained(folder)
        assert dict(processor.video_processor.size) == dict(video.size)
        assert processor.chat_template == AutoProcessor.from_pretrained(base).chat_template


def test_files_in_which_nothing_changes_keep_their_bytes(base: Path, family: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, base, family)
    files = exported_files(AutoProcessor.from_pretrained(base), spec)
    again = written(files, tmp_path / "exported")
    of_again = exported_files(AutoProcessor.from_pretrained(again), make_spec(tmp_path / "again", again, family))
    assert of_again == files


def test_files_of_a_hub_model_come_from_its_cache(
    base: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "hub" / "models--org--model"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "snapshots" / "abc").symlink_to(base.resolve())
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here, hub = find_base_files(str(base), str(base)), find_base_files("org/model", "org/model")
    assert hub.keys() == here.keys()
    assert all(hub[name].read_bytes() == here[name].read_bytes() for name in here)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16", "a": 1}, {"torch_dtype": "float32", "a": 1}),
        ({"text_config": {"dtype": "bfloat16"}, "a": 1}, {"text_config": {"dtype": "float32"}, "a": 1}),
        (
            {"dtype": "bfloat16", "vision_config": {"dtype": "float16"}},
            {"dtype": "float32", "vision_config": {"dtype": "float32"}},
        ),
        ({"transformers_version": "4.41.2"}, {"transformers_version": "4.41.2", "torch_dtype": "float32"}),
        ({"transformers_version": "5.23.0"}, {"transformers_version": "5.23.0", "dtype": "float32"}),
    ],
)
def test_the_type_of_the_weights_is_spelt_as_the_base_does(config: dict[str, Any], expected: dict[str, Any]) -> None:
    text = json.dumps(config).encode()
    assert json.loads(with_dtype(text, torch.float32)) == expected
    exported = with_dtype(text, torch.float32)
    assert with_dtype(exported, torch.float32) is exported


def served_size(processor: Any, values: dict[str, Any], n_frames: int, height: int, width: int) -> tuple[int, int]:
    """Size to which a processor with these values resizes the frames of a clip."""
    told = type(processor)(**values)
    video = torch.empty((1, n_frames, 3, height, width), dtype=torch.uint8, device="meta")
    size = told.resize(
        video,
        SizeDict(**values["size"]),
        resample=told.resample,
        factor=told.patch_size * 2,
        temporal_factor=2,
        cap_pixels_per_frame=values["cap_pixels_per_frame"],
    ).shape[-2:]
    return tuple(size)


@pytest.mark.parametrize("kind", PER_CLIP, ids=["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("strategy", ["fps", "frame_num"])
@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(1, 40).map(lambda half: 2 * half),
    height=st.integers(150, 1200),
    width=st.integers(150, 1200),
    tokens=st.integers(16, 900),
    total=st.integers(10**6, 10**8),
)
def test_the_exported_processor_resizes_clips_as_training_did(
    strategy: str, kind: type, frames: int, height: int, width: int, tokens: int, total: int
) -> None:
    processor = kind()
    factor = processor.patch_size * 2
    sampling = dataclasses.replace(
        SAMPLING,
        video_sampling_strategy=strategy,
        frame_num=frames,
        video_max_frames=80,
        # Below the smallest frame: clips of smaller ones are the processors' own business.
        video_min_pixels=4 * factor**2,
        video_max_pixels=tokens * factor**2,
        # In whole tokens of 90 %, as Qwen2.5-VL's processor counts.
        video_total_pixels=round(total / (factor**2 * 0.9)) * factor**2 * 9 // 10,
    )
    values = video_values(sampling, processor, per_clip=PER_CLIP[kind])
    trained = video_size(
        *(frames, height, width),
        patch_size=processor.patch_size,
        min_pixels=sampling.video_min_pixels,
        max_pixels=sampling.video_max_pixels,
        total_pixels=sampling.video_total_pixels,
    )
    assert served_size(processor, values, frames, height, width) == trained


@pytest.mark.parametrize("kind", PER_CLIP, ids=["qwen3_vl", "qwen2_5_vl"])
@settings(max_examples=100, deadline=None)
@given(total=st.integers(4, 4000), rate=st.sampled_from([10.0, 24.0, 25.0, 30.0, 29.97]))
def test_the_exported_processor_takes_as_many_frames_as_training_did(kind: type, total: int, rate: float) -> None:
    trained = smart_nframes(*(total, rate), strategy="fps", fps=1.0, frame_num=32, min_frames=3, max_frames=513)
    # Qwen2.5-VL's processor of transformers 5.23 counts in floating point, and takes one behind the last of some.
    assume(len(torch.arange(0, total, total / trained)) == trained)
    values = video_values(SAMPLING, kind(), per_clip=PER_CLIP[kind])
    values.pop("size")
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    served = np.asarray(kind(**values).sample_frames(metadata, fps=1.0))
    # Qwen3-VL's processor takes an odd number where there is one, which training makes even.
    assert len(served) in ({trained, trained + 1} if kind is Qwen3VLVideoProcessor else {trained})


def test_families_say_what_their_processors_do() -> None:
    assert {name: family.limits_are_per_clip for name, family in FAMILIES.items()} == {
        "qwen3_vl": PER_CLIP[Qwen3VLVideoProcessor],
        "qwen3_vl_moe": PER_CLIP[Qwen3VLVideoProcessor],
        "qwen3_5": PER_CLIP[Qwen3VLVideoProcessor],
        "qwen3_5_moe": PER_CLIP[Qwen3VLVideoProcessor],
        "qwen2_5_vl": PER_CLIP[Qwen2VLVideoProcessor],
        "qwen2_5_omni": PER_CLIP[Qwen2VLVideoProcessor],
    }
