"""Served = evaluated (invariant 17): plain transformers with an export, from raw media, answers as `evaluate` does."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from qwen_vl_utils import vision_process
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.video_utils import VideoMetadata

from qvl_pipeline.families import FAMILIES
from qvl_pipeline.training.card.model_card import sampling_item
from tests.evaluation.exported import GREEDY, SAMPLE, Served, all_frames, export_and_evaluate


@pytest.fixture(scope="module", params=["qwen3_vl-5", "qwen3_vl-4", "qwen2_5_vl-5", "qwen2_5_vl-4", "qwen3_5-5"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return export_and_evaluate(tmp_path_factory.mktemp("served"), *request.param.split("-"))


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
