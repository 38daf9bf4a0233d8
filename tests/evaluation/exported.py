"""An export with samples of raw media, as a user would serve it, and the answers of `evaluate` to them."""

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
import torch
from transformers import AutoProcessor

from qvl_pipeline.config import EvaluateConfig, ModelConfig, SampleConfig
from qvl_pipeline.data.frames.clips import list_clips, read_clip
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.data.plan.tokenization import SCHEMA, media_grids, tokenize_samples
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.model.export.folder import exported_files
from qvl_pipeline.evaluation.generation import generate_answers, load_model
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStore, FrameStoreWriter
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
    """An exported folder, the samples, what `evaluate` answers, and the folder of tokens and frames."""

    folder: Path
    family: str
    samples: pd.DataFrame
    tokenized: TokenizedSamples
    answers: list[str]
    work: Path


def export_and_evaluate(folder: Path, family: str, version: str = "5") -> Served:
    """Sample, tokenise, export and evaluate, from a base in the form of transformers 5 or 4."""
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
    return Served(exported, family, samples, tokenized, answers, folder)


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
