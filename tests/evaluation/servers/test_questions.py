"""What is sent to a server, byte by byte, and what of it each kind of server understands."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers.video_utils import VideoMetadata

from qvl_pipeline.config import EvaluateConfig, ServerConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.servers.media import MediaParts, NotAskableError
from qvl_pipeline.evaluation.servers.questions import Questions
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStore
from tests.evaluation.world import KINDS, World, build_world

ROWS = {kind: row for row, kind in enumerate(KINDS)}
PLANNED = {"spectra": 0, "content_hash": None, "key": ""}


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), request.param, list(KINDS))


def questions(world: World, evaluate: dict[str, Any] | None = None, **server: Any) -> Questions:
    config = ServerConfig(url="http://localhost:8000/v1", **server)
    where = (world.tokenized, world.sampled, world.video_frames, world.processor)
    return Questions.create(*where, EvaluateConfig(**evaluate or {}), config, "tiny", world.family)


def request(world: World, kind: str, evaluate: dict[str, Any] | None = None, **server: Any) -> dict[str, Any]:
    return json.loads(questions(world, evaluate, **server).body(ROWS[kind]))


def content_of(world: World, kind: str, **server: Any) -> list[dict[str, Any]]:
    return request(world, kind, **server)["messages"][0]["content"]


def picture(url: str) -> np.ndarray:
    """The picture `[3, H, W]` in a data URL."""
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.asarray(image).transpose(2, 0, 1)


def test_the_bytes_of_a_request(world: World) -> None:
    file = Path(world.media[ROWS["single_image"]][0]["key"]).read_bytes()
    wanted = (
        '{"model":"tiny","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":'
        f'"data:image/png;base64,{base64.b64encode(file).decode()}"}}}},'
        '{"type":"text","text":"Which digit is this?"}]}],'
        '"max_tokens":9,"temperature":0.0,"repetition_penalty":1.0}'
    )
    asked = questions(world, {"max_new_tokens": 9})
    assert asked.body(ROWS["single_image"]) == wanted.encode()
    assert asked.body(ROWS["text"]) == (
        b'{"model":"tiny","messages":[{"role":"user","content":"What is the first digit of 3895?"}],'
        b'"max_tokens":9,"temperature":0.0,"repetition_penalty":1.0}'
    )


def test_turns_before_the_answer_are_sent_and_the_answer_is_not(world: World) -> None:
    messages = request(world, "multi_turn")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "7"
    assert [part["type"] for part in messages[2]["content"]] == ["image_url", "text"]


def test_how_tokens_are_chosen(world: World) -> None:
    sampled = {"generation": {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, "seed": 5, "max_new_tokens": 9}

    def fields(**server: Any) -> dict[str, Any]:
        found = request(world, "text", sampled, **server)
        return {key: value for key, value in found.items() if key not in ("model", "messages")}

    openai = {"max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert fields(engine="openai") == openai
    assert fields(engine="vllm") == fields(engine="sglang") == openai | {"repetition_penalty": 1.0, "top_k": 50}
    of_transformers = fields(engine="transformers")
    assert json.loads(of_transformers.pop("generation_config")) == {**sampled["generation"], "repetition_penalty": 1.0}
    assert of_transformers == {"max_tokens": 9, "seed": 5}
    assert fields(engine="openai", extra={"max_tokens": None, "max_completion_tokens": 9}) == {
        **{key: value for key, value in openai.items() if key != "max_tokens"},
        "max_completion_tokens": 9,
    }
    for engine, key in (("vllm", "num_beams"), ("openai", "top_k")):
        with pytest.raises(
            UserError, match=rf"evaluate.generation.{key} is nothing that a server of the kind {engine}"
        ):
            questions(world, {"generation": {key: 4}}, engine=engine)


def test_clips_are_files_that_the_server_samples_as_training_did(world: World, tmp_path: Path) -> None:
    clip = Path(world.media[ROWS["video"]][0]["key"])
    clip.write_bytes(b"no clip, and nobody looks")
    video = world.processor.video_processor
    [part, _] = content_of(world, "video")
    assert part == {
        "type": "video_url",
        "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"},
    }
    of_file = content_of(world, "video", media="file")[0]["video_url"]["url"]
    assert of_file == clip.resolve().as_uri()
    assert content_of(world, "video", engine="transformers")[0]["video_url"]["url"] == str(clip.resolve())
    told = request(world, "video")
    loader = {"num_frames": -1} if world.family == "qwen3_vl" else {"num_frames": video.max_frames, "fps": video.fps}
    assert told["media_io_kwargs"] == {"video": loader}
    assert told["mm_processor_kwargs"] == {"fps": video.fps}
    of_transformers = request(world, "video", engine="transformers")["chat_template_kwargs"]
    assert of_transformers == {
        "num_frames": None,
        "fps": video.fps,
        "min_frames": video.min_frames,
        "max_frames": video.max_frames,
    }
    for engine in ("openai", "sglang"):
        assert request(world, "video", engine=engine).keys().isdisjoint({"media_io_kwargs", "mm_processor_kwargs"})
    clip.unlink()


def test_frames_are_those_of_training_with_their_times(world: World) -> None:
    """The processor that is told what vLLM is told makes the tokens that training saw."""
    [part, _] = content_of(world, "video", clips="frames")
    head, _, frames = part["video_url"]["url"].partition(",")
    assert head == "data:video/jpeg;base64"
    store = FrameStore(world.video_frames)
    sent = np.stack([picture(f",{frame}") for frame in frames.split(",")])
    assert np.array_equal(sent, store.frames(world.media[ROWS["video"]][0]["key"]))

    told = request(world, "video", clips="frames")
    facts = told["media_io_kwargs"]["video"]
    metadata = VideoMetadata(
        total_num_frames=facts["total_num_frames"], fps=facts["fps"], frames_indices=facts["frames_indices"]
    )
    text = world.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": KINDS["video"][0][1][1]}]}],
        add_generation_prompt=True,
    )
    options = {"video_metadata": [metadata], "do_sample_frames": False} | told.get("mm_processor_kwargs", {})
    inputs = world.processor(text=[text], videos=[sent], return_tensors="pt", **options)
    planned = TokenizedSamples(world.tokenized).row(ROWS["video"])
    assert inputs["input_ids"][0].tolist() == planned["input_ids"][: planned["prompt_length"]].tolist()
    if world.family == "qwen2_5_vl":
        assert told["mm_processor_kwargs"] == {"fps": 2.0}
        assert inputs["second_per_grid_ts"].tolist() == [planned["media"][0]["seconds_per_grid"]]


def test_frames_as_images_each_behind_its_time(world: World) -> None:
    parts = content_of(world, "image_and_video", clips="images", engine="openai")
    frames = FrameStore(world.video_frames).frames(world.media[ROWS["image_and_video"]][1]["key"])
    image, *clip, question = parts
    assert (image["type"], question["text"]) == ("image_url", "Which digit is only in the video?")
    assert [part["text"] for part in clip[::2]] == [f"<{number / 2:.1f} seconds>" for number in range(len(frames))]
    assert all(
        np.array_equal(picture(part["image_url"]["url"]), frame) for part, frame in zip(clip[1::2], frames, strict=True)
    )


def test_several_clips_with_other_times_are_not_sent_as_frames(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(world, clips="frames")
    assert b"frames_indices" in asked.body(ROWS["two_videos"])  # of the same times
    late = world.media[ROWS["two_videos"]][1]["key"]
    info = FrameStore.info
    monkeypatch.setattr(
        FrameStore,
        "info",
        lambda store, key: info(store, key) | ({"seconds": [second + 1 for second in range(8)]} if key == late else {}),
    )
    with pytest.raises(NotAskableError, match="several clips with other times"):
        asked.body(ROWS["two_videos"])


@pytest.fixture
def parts(world: World) -> MediaParts:
    return MediaParts(ServerConfig(url="http://localhost/v1", media="file"), world.video_frames, 2)


def test_images_that_servers_show_in_different_ways_are_sent_as_the_model_sees_them(
    parts: MediaParts, tmp_path: Path
) -> None:
    plain, turned, clear = (tmp_path / f"{name}.png" for name in ("plain", "turned", "clear"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image, header = Image.fromarray(pixels), Image.Exif()
    header[0x0112] = 6  # to be turned by 90 degrees
    image.save(plain)
    image.save(turned, exif=header)
    image.putalpha(0)
    image.save(clear)
    Image.fromarray(pixels).save(tmp_path / "rare.bmp")

    def url(name: Path) -> str:
        item = {"type": "image", "path": str(name), "start": None, "end": None}
        return parts.parts(item, PLANNED)[0]["image_url"]["url"]

    assert url(plain) == plain.resolve().as_uri()
    assert np.array_equal(picture(url(turned)), np.rot90(pixels, -1).transpose(2, 0, 1))
    assert (picture(url(clear)) == 255).all()
    assert np.array_equal(picture(url(tmp_path / "rare.bmp")), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("medium", "planned", "reason"),
    [
        ({"type": "audio"}, PLANNED, "it has sound"),
        ({"type": "video"}, {**PLANNED, "spectra": 4}, "it has sound"),
        ({"type": "video", "start": 1.0, "end": None}, PLANNED, "a part of a file"),
    ],
)
def test_what_cannot_be_said_is_not_sent(
    parts: MediaParts, medium: dict[str, Any], planned: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotAskableError, match=reason):
        parts.parts({"path": "a.mp4", "start": None, "end": None} | medium, planned)


def test_a_file_that_has_changed_is_not_sent(parts: MediaParts, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    item = {"type": "image", "path": str(tmp_path / "a.png"), "start": None, "end": None}
    with pytest.raises(UserError, match="has changed since 'validate' ran"):
        parts.parts(item, {**PLANNED, "content_hash": "0" * 64})


def test_tools_and_calls_are_in_the_form_of_openai(world: World) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    text = [{"type": "text", "text": "5"}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}], "tools": tools},
        {"role": "assistant", "content": [], "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"role": "tool", "content": text, "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": text, "trained": False},
    ]
    sampled = pd.DataFrame([{"sample_id": "made/0", "messages": json.dumps(turns), "media": []}])
    where = (world.tokenized, sampled, world.video_frames, world.processor)
    config = ServerConfig(url="http://localhost/v1")
    made = json.loads(Questions.create(*where, EvaluateConfig(), config, "tiny", world.family).body(0))
    assert made["tools"] == tools
    assert made["messages"] == [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"role": "tool", "content": "5", "tool_call_id": "1", "name": "add"},
    ]
    with pytest.raises(UserError, match="sampled_samples has no sample 'made/1'"):
        Questions.create(*where, EvaluateConfig(), config, "tiny", world.family).body(1)
