"""Served = evaluated (invariant 17): plain transformers with an export, from raw media, answers as `evaluate` does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from qwen_vl_utils import vision_process
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.video_utils import VideoMetadata

from qvl_pipeline.config import EvaluateConfig, ModelConfig, SampleConfig
from qvl_pipeline.data.frames.clips import list_clips, read_clip
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.data.plan.tokenization import SCHEMA, media_grids, tokenize_samples
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.model.export.folder import exported_files
from qvl_pipeline.evaluation.generation import generate_answers, load_model
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frame_store import FrameStore, FrameStoreWriter
from qvl_pipeline.training.card import sampling_item
from qvl_pipeline.training.spec import _filled
from tests.data.samples import samples_table, write_images
from tests.engine.training import make_training
from tests.layouts import in_old_form
from tests.media.clips import index_clips, write_clip

FRAMES = {"fps": 2.5, "video_min_frames": 3, "video_max_frames": 9, "frame_cache": None}
# Clips of 64 x 64. Qwen2.5-VL's are enlarged to 5 x 5 tokens: transformers 5.23 has other positions than the authors'
# code after a clip that is longer in time than that (docs/evaluation.md).
SAMPLE = {
    "qwen3_vl": SampleConfig(**FRAMES, video_min_pixels=1024, video_max_pixels=64 * 64),
    "qwen3_5": SampleConfig(**FRAMES, video_min_pixels=1024, video_max_pixels=64 * 64),
    "qwen2_5_vl": SampleConfig(**FRAMES, video_min_pixels=128 * 128, video_max_pixels=160 * 160),
}
# Frames and their rate. At 2.5 a second these are 4, 8 and 4 frames; of an odd number Qwen3-VL's processor alone would
# take all (docs/video.md).
CLIPS = {"short.mp4": (16, 10), "long.mp4": (96, 30), "between.mp4": (18, 10)}
EVALUATE = EvaluateConfig(batch_size=4, max_new_tokens=10)
GREEDY = {"do_sample": False, "max_new_tokens": 10}


@dataclasses.dataclass(frozen=True)
class Served:
    """An exported folder, the samples, and what `evaluate` answers."""

    folder: Path
    family: str
    samples: pd.DataFrame
    tokenized: TokenizedSamples
    answers: list[str]


@pytest.fixture(scope="module", params=["qwen3_vl-5", "qwen3_vl-4", "qwen2_5_vl-5", "qwen2_5_vl-4", "qwen3_5-5"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Sampled, tokenised, exported and evaluated, from a base in the form of transformers 5 or 4."""
    family, version = request.param.split("-")
    folder = tmp_path_factory.mktemp("served")
    base = folder / "new"
    build_tiny_model(base, family=family, seed=0, corpus=["What is this?", "And here?"])
    if version == "4":
        base = in_old_form(base, folder / "old", pixels=family == "qwen2_5_vl")
    model = ModelConfig(processor_type=family, load_from_pretrained_path=str(base), image_max_pixels=90 * 90)
    (folder / "manifest.json").write_text(json.dumps({"path": str(base), "family": family}))

    images = write_images(folder, {"a.png": (80, 120), "b.png": (33, 40), "c.png": (200, 150)})
    clips = [
        write_clip(folder / name, [n / rate for n in range(count)], time_base=Fraction(1, rate))
        for name, (count, rate) in CLIPS.items()
    ]
    media_index = pd.concat([images, index_clips(clips)], ignore_index=True)
    samples = samples_table(_questions(folder))
    with FrameStoreWriter(folder / "frames") as writer:
        for clip in list_clips(samples, media_index):
            writer.add(read_clip(clip, sample=SAMPLE[family], patch_size=model.family.patch_size, backend="pyav"))
    processor = load_processor(folder, model)
    grids = media_grids(processor, media_index, FrameStore(folder / "frames"))
    batches = [batch.rows for batch in tokenize_samples(samples, grids, processor)]
    table = pa.Table.from_batches(batches, schema=SCHEMA)
    with pa.ipc.new_file(str(folder / "tokenized.arrow"), SCHEMA) as file:
        file.write_table(table)

    exported = folder / "exported"
    exported.mkdir()
    training = make_training(folder / "training", base, family, kinds=("text",))
    limits = {"image_min_pixels": model.image_min_pixels, "image_max_pixels": model.image_max_pixels}
    spec = dataclasses.replace(
        training,
        model=dataclasses.replace(training.model, **limits),
        sampling=_filled(type(training.sampling), SAMPLE[family]),
    )
    for name, content in exported_files(AutoProcessor.from_pretrained(base), spec).items():
        (exported / name).write_bytes(content)
    shutil.copy(base / "model.safetensors", exported)
    tokenized, rows = TokenizedSamples(folder / "tokenized.arrow"), list(range(len(samples)))
    given = load_model(str(exported), "sdpa"), AutoProcessor.from_pretrained(exported), tokenized, rows
    answers = generate_answers(*given, folder / "frames", EVALUATE)
    return Served(exported, family, samples, tokenized, answers)


def _questions(folder: Path) -> list[dict[str, Any]]:
    images = [("image", str(folder / name)) for name in ("a.png", "b.png", "c.png")]
    clips = [("video", str(folder / name)) for name in CLIPS]
    asked = [[medium, "What is this?"] for medium in images + clips]
    asked += [[images[0], images[2], "And here?"], [images[1], clips[0], "And here?"], [clips[2], clips[1], "?"], ["?"]]
    return [{"messages": [("user", parts), ("assistant", "7")]} for parts in asked]


def all_frames(path: str) -> tuple[torch.Tensor, float]:
    """Every frame of a clip `[T, 3, H, W]`, and their rate."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return torch.tensor(np.stack(frames)).permute(0, 3, 1, 2), float(container.streams.video[0].average_rate)


def chosen_by_qwen_vl_utils(path: str, served: Served) -> tuple[torch.Tensor, VideoMetadata]:
    """What `fetch_video` makes of a clip, with PyAV as its reader."""

    def read(element: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
        frames, rate = all_frames(path)
        count = vision_process.smart_nframes(element, len(frames), rate)
        indices = torch.linspace(0, len(frames) - 1, count).round().long()
        facts = {"fps": rate, "frames_indices": indices.tolist(), "total_num_frames": len(frames)}
        return frames[indices], facts, count / len(frames) * rate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_process, "get_video_reader_backend", lambda: "pyav")
        patch.setitem(vision_process.VIDEO_READER_BACKENDS, "pyav", read)
        element = {"video": path} | sampling_item(SAMPLE[served.family])
        size = {"image_patch_size": FAMILIES[served.family].patch_size}
        frames, facts = vision_process.fetch_video(element, **size, return_video_metadata=True)
    return frames, VideoMetadata(**facts)


def inputs_of(served: Served, processor: Any, sample: pd.Series, *, alone: bool) -> dict[str, Any]:
    """Inputs from the raw media of a sample: by the processor alone, or with the frames that qwen_vl_utils gives it."""
    images = [Image.open(item["path"]) for item in sample["media"] if item["type"] == "image"]
    videos, facts = [], []
    for path in (item["path"] for item in sample["media"] if item["type"] == "video"):
        if alone:
            frames, rate = all_frames(path)
            every = list(range(len(frames)))
            videos.append(frames)
            facts.append(VideoMetadata(total_num_frames=len(frames), fps=rate, frames_indices=every))
            continue
        frames, of_frames = chosen_by_qwen_vl_utils(path, served)
        videos.append(frames)
        facts.append(of_frames)
    question = json.loads(sample["messages"])[:-1]
    return processor(
        text=[processor.apply_chat_template(question, add_generation_prompt=True)],
        images=images or None,
        videos=videos or None,
        videos_kwargs={"video_metadata": facts, "do_sample_frames": alone, "do_resize": alone} if videos else {},
        return_tensors="pt",
    )


@pytest.mark.parametrize("alone", [False, True], ids=["qwen_vl_utils", "processor alone"])
def test_plain_transformers_answers_raw_media_as_evaluate_does(served: Served, alone: bool) -> None:
    processor = AutoProcessor.from_pretrained(served.folder)
    model = AutoModelForImageTextToText.from_pretrained(served.folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(**GREEDY)
    stops = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    answers = []
    for row, sample in served.samples.iterrows():
        inputs, planned = inputs_of(served, processor, sample, alone=alone), served.tokenized.row(row)
        # As many tokens, frames of the same size, and the same times.
        assert inputs["input_ids"][0].tolist() == planned["input_ids"][: planned["prompt_length"]].tolist()
        for kind in ("image", "video"):
            grids = [[item[f"grid_{axis}"] for axis in "thw"] for item in planned["media"] if item["type"] == kind]
            assert inputs.get(f"{kind}_grid_thw", torch.empty(0)).tolist() == grids
        if "second_per_grid_ts" in inputs:
            told = [item["seconds_per_grid"] for item in planned["media"] if item["type"] == "video"]
            assert inputs["second_per_grid_ts"].tolist() == torch.tensor(told).tolist()
        with torch.inference_mode():
            output = model.generate(**inputs, eos_token_id=stops, pad_token_id=processor.tokenizer.pad_token_id)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers.extend(processor.tokenizer.batch_decode(new, skip_special_tokens=True))
    assert len(set(answers)) > len(answers) // 2, "answers depend on what is asked"
    same = [one == other for one, other in zip(answers, served.answers, strict=True)]
    clips = [any(item["type"] == "video" for item in media) for media in served.samples["media"]]
    if alone and served.family == "qwen2_5_vl":
        # As many frames as in training, but not the same ones: docs/video.md.
        assert all(same[row] for row, has_clip in enumerate(clips) if not has_clip)
    else:
        assert same == [True] * len(same)
