"""A server's answers are those of `evaluate`: over HTTP, from raw media, by plain transformers with the export."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.video_utils import VideoMetadata

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.evaluation.servers.models import Asked, ask_servers
from tests.evaluation.exported import GREEDY, Served, all_frames, export_and_evaluate
from tests.evaluation.servers.http_server import chat_server, completion


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return export_and_evaluate(tmp_path_factory.mktemp("served"), "qwen3_vl")


def engine(served: Served, scratch: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What vLLM does of a request: media are opened, the exported processor samples and resizes, the model answers."""
    processor = AutoProcessor.from_pretrained(served.folder)
    model = AutoModelForImageTextToText.from_pretrained(served.folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(**GREEDY)
    stops = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])

    def opened(url: str, told: dict[str, Any]) -> tuple[Any, VideoMetadata]:
        head, _, content = url.partition(",")
        if head == "data:video/jpeg;base64":
            frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(frame)))) for frame in content.split(",")]
            facts = {key: told[key] for key in ("fps", "total_num_frames", "frames_indices")}
            return np.stack(frames).transpose(0, 3, 1, 2), VideoMetadata(**facts)
        clip = scratch / "clip.mp4"
        clip.write_bytes(base64.b64decode(content))
        frames, rate = all_frames(str(clip))
        return frames, VideoMetadata(total_num_frames=len(frames), fps=rate, frames_indices=list(range(len(frames))))

    def says(request: dict[str, Any]) -> dict[str, Any]:
        assert (request["temperature"], request["max_tokens"]) == (0.0, GREEDY["max_new_tokens"])
        told = request.get("media_io_kwargs", {}).get("video", {})
        images, clips, turns = [], [], []
        for message in request["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] == "image_url":
                    images.append(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))
                elif part["type"] == "video_url":
                    clips.append(opened(part["video_url"]["url"], told))
            kinds = [{"type": part["type"].removesuffix("_url"), "text": part.get("text")} for part in parts]
            turns.append({"role": message["role"], "content": kinds})
        sample = told.get("do_sample_frames", True)
        facts = {"video_metadata": [fact for _, fact in clips], "do_sample_frames": sample, "do_resize": sample}
        inputs = processor(
            text=[processor.apply_chat_template(turns, add_generation_prompt=True)],
            images=images or None,
            videos=[frames for frames, _ in clips] or None,
            videos_kwargs=facts if clips else {},
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**inputs, eos_token_id=stops, pad_token_id=processor.tokenizer.pad_token_id)
        length = inputs["input_ids"].shape[1]
        return completion(processor.tokenizer.decode(output[0, length:], skip_special_tokens=True), length)

    return says


@pytest.mark.parametrize("clips", ["file", "frames"])
def test_a_server_answers_as_evaluate_does(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture, clips: str
) -> None:
    with chat_server(engine(served, tmp_path)) as server:
        # One at a time: the model is one.
        trained = {"url": server.url, "clips": clips, "concurrency": 1, "max_failures": 0.2}
        asked = Asked(
            evaluate=EvaluateConfig(
                backend="openai", compare_base=False, servers={"trained": trained}, max_new_tokens=10
            ),
            family=served.family,
            processor=AutoProcessor.from_pretrained(served.folder),
            trained=served.folder,
            base="",
            tokenized=served.work / "tokenized.arrow",
            sampled=served.samples,
            video_frames=served.work / "frames",
            rows=tuple(range(len(served.samples))),
            scratch=tmp_path / "served",
        )
        with caplog.at_level(logging.WARNING):
            found = ask_servers(asked, lambda n: None)["trained"]
    several = [sum(item["type"] == "video" for item in media) > 1 for media in served.samples["media"]]
    unasked = {row for row, clips_differ in enumerate(several) if clips_differ and clips == "frames"}
    assert found.failures.keys() == unasked
    assert {row: found.text(row) for row in found.answers} == {
        row: answer for row, answer in enumerate(served.answers) if row not in unasked
    }
    assert "counts other tokens" not in caplog.text
