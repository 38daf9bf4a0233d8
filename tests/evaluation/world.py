"""A small world to evaluate in: a tiny model, samples of every kind on disk, and the plain processor's view of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from qvl_pipeline.data.plan.tokenization import SCHEMA
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip

FRAMES, FPS = 8, 2.0  # every clip: 8 frames at 2 a second
KINDS = {
    "text": [("user", ["What is the first digit of 3895?"])],
    "single_image": [("user", ["image", "Which digit is this?"])],
    "two_images": [("user", ["image", "and", "image", "What is the sum?"])],
    "video": [("user", ["video", "Which digit came second?"])],
    "image_and_video": [("user", ["image", "video", "Which digit is only in the video?"])],
    "two_videos": [("user", ["video", "video", "Which came second?"])],
    "multi_turn": [("user", ["image", "Which?"]), ("assistant", ["7"]), ("user", ["image", "And this?"])],
}
CORPUS = [part for turns in KINDS.values() for _, parts in turns for part in parts]
ANSWERS = "3714058"  # one digit a sample


@dataclass(frozen=True)
class World:
    """Model, samples and the reference inputs of each sample."""

    family: str
    model_folder: Path
    processor: ProcessorMixin
    tokenized: Path
    video_frames: Path
    references: list[BatchFeature]
    media: list[list[dict[str, Any]]]
    sampled: pd.DataFrame

    def load_model(self) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.model_folder, dtype=torch.float32).eval()

    def teach(self, folder: Path, rows: Sequence[int]) -> None:
        """Overfit the model to the answers of some samples, each ended by `<|im_end|>`, and write it to `folder`."""
        model, tokenizer = self.load_model().train(), self.processor.tokenizer
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(16):
            optimizer.zero_grad()
            for row in rows:
                answer = tokenizer(ANSWERS[row] + "<|im_end|>", return_tensors="pt").input_ids
                inputs = dict(self.references[row])
                prompt = inputs.pop("input_ids")
                inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, answer.shape[1]))
                inputs["attention_mask"] = pad(inputs["attention_mask"], (0, answer.shape[1]), value=1)
                labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
                model(input_ids=torch.cat([prompt, answer], dim=1), labels=labels, **inputs).loss.backward()
            optimizer.step()
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def build_world(folder: Path, family: str, kinds: list[str]) -> World:
    """Write a model and one sample of each of `kinds`, all in the eval split."""
    model_folder = folder / "model"
    build_tiny_model(model_folder, family=family, seed=0, corpus=CORPUS)
    processor = AutoProcessor.from_pretrained(model_folder)
    rng = np.random.default_rng(0)
    rows, references, all_media = [], [], []
    with FrameStoreWriter(folder / "frames") as store:
        for number, kind in enumerate(kinds):
            pictures = _draw(folder, store, f"{number}-{kind}", kind, processor.image_processor.patch_size, rng)
            reference = _reference(processor, kind, pictures)
            media = [_planned(picture, processor.image_processor.patch_size) for picture in pictures]
            rows.append(_row(processor, number, kind, reference, media))
            references.append(reference)
            all_media.append(media)
    tokenized = folder / "tokenized.arrow"
    write_tokenized(tokenized, rows)
    sampled = pd.DataFrame([_sampled(row, kind) for row, kind in zip(rows, kinds, strict=True)])
    return World(family, model_folder, processor, tokenized, folder / "frames", references, all_media, sampled)


def _sampled(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """The sample as `sampled_samples` has it, with its answer."""
    turns = [*KINDS[kind], ("assistant", [row["answer"]])]
    messages = [{"role": role, "content": _content(parts)} for role, parts in turns]
    media = [{"type": item["type"], "path": item["key"], "start": None, "end": None} for item in row["media"]]
    return {"sample_id": row["sample_id"], "messages": json.dumps(messages), "media": media}


def write_tokenized(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def _draw(
    folder: Path, store: FrameStoreWriter, name: str, kind: str, patch: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Write the media of one sample: images as PNG of 4 x 6 patches, clips of 4 x 4 into the store."""
    pictures = []
    for part in (part for _, parts in KINDS[kind] for part in parts if part in ("image", "video")):
        key = str(folder / f"{name}-{len(pictures)}.{'png' if part == 'image' else 'mp4'}")
        shape = (3, 4 * patch, 6 * patch) if part == "image" else (FRAMES, 3, 4 * patch, 4 * patch)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        if part == "image":
            Image.fromarray(pixels.transpose(1, 2, 0)).save(key)
        else:
            seconds = [number / FPS for number in range(FRAMES)]
            frames = [np.ascontiguousarray(frame).tobytes() for frame in pixels]
            size = {"height": 4 * patch, "width": 4 * patch}
            clip = {"path": key, "start": None, "end": None, "source_fps": FPS, "encoding": "raw", **size}
            store.add(StoredClip(frame_indices=list(range(FRAMES)), seconds=seconds, frames=frames, **clip))
        pictures.append({"type": part, "key": key, "pixels": pixels})
    return pictures


def _reference(processor: ProcessorMixin, kind: str, pictures: list[dict[str, Any]]) -> BatchFeature:
    """Process one prompt alone, as a user of plain transformers would."""
    messages = [{"role": role, "content": _content(parts)} for role, parts in KINDS[kind]]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [picture["pixels"] for picture in pictures if picture["type"] == "image"]
    videos = [picture["pixels"] for picture in pictures if picture["type"] == "video"]
    metadata = {"total_num_frames": FRAMES, "fps": FPS, "frames_indices": list(range(FRAMES))}
    given = {"images": images} if images else {}
    if videos:
        given |= {"videos": videos, "video_metadata": [dict(metadata) for _ in videos], "fps": FPS}
    return processor(text=[text], **given, do_sample_frames=False, return_tensors="pt")


def _content(parts: list[str]) -> list[dict[str, Any]]:
    return [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]


def _planned(picture: dict[str, Any], patch: int) -> dict[str, Any]:
    height, width = picture["pixels"].shape[-2:]
    times = (1, 0.0) if picture["type"] == "image" else (FRAMES // 2, 2 / FPS)
    return {
        "type": picture["type"],
        "key": picture["key"],
        "grid_t": times[0],
        "grid_h": height // patch,
        "grid_w": width // patch,
        "seconds_per_grid": times[1],
        "spectra": 0,
    }


def _row(
    processor: ProcessorMixin, number: int, kind: str, reference: BatchFeature, media: list[dict[str, Any]]
) -> dict[str, Any]:
    prompt = reference["input_ids"][0].tolist()
    ids = prompt + processor.tokenizer.encode(ANSWERS[number] + "<|im_end|>\n")
    return {
        "sample_id": f"made/{number}",
        "source": "made",
        "split": "eval",
        "kind": kind,
        "task": "exact_match",
        "answer": ANSWERS[number],
        "input_ids": ids,
        "label_spans": [{"start": len(prompt), "end": len(ids) - 1}],
        "length": len(ids),
        "supervised_tokens": 2,
        "vit_patches": sum(item["grid_t"] * item["grid_h"] * item["grid_w"] for item in media),
        "spectra": sum(item["spectra"] for item in media),
        "prompt_length": len(prompt),
        "media": media,
    }
