"""Rows with sound through all data stages, against the model's own processor."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset
from kedro_datasets.text import TextDataset
from PIL import Image
from transformers import AutoModelForImageTextToText

from qvl_pipeline.config import (
    BatchingConfig,
    DataEngineConfig,
    IngestConfig,
    ModelConfig,
    SampleConfig,
    ValidateConfig,
)
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.datasets import FileDataset, FolderDataset, TableDataset
from qvl_pipeline.engine.feed.sounds import SoundReader
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.mrope import mrope_positions
from qvl_pipeline.media.pixels import normalization
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.pipelines.ingest.pipeline import create_pipeline as create_ingest
from qvl_pipeline.pipelines.sample.pipeline import create_pipeline as create_sample
from qvl_pipeline.pipelines.tokenize.pipeline import create_pipeline as create_tokenize
from qvl_pipeline.pipelines.validate.pipeline import create_pipeline as create_validate
from qvl_pipeline.tokens.encoding import placeholder_ids
from tests.engine.model.test_hearing import thinker_loss
from tests.engine.packs import load_packed, make_builder
from tests.media.files import write_image
from tests.media.sounds import tone, write_heard_clip, write_sound, write_wav

MODEL = ModelConfig(processor_type="qwen2_5_omni", image_max_pixels=64 * 64)
SAMPLE = SampleConfig(
    fps=2, video_min_frames=2, video_max_frames=32, video_min_pixels=1024, video_max_pixels=64 * 64,
    use_audio_in_video=True, frame_cache=None, num_workers=1,
)  # fmt: skip
HEARING = FAMILIES["qwen2_5_omni"].hearing
TABLES = {
    **dict.fromkeys(("samples", "valid_samples", "sampled_samples"), "SAMPLES"),
    **dict.fromkeys(("quarantine", "sample_quarantine", "tokenize_quarantine"), "QUARANTINE"),
    "rejects": "REJECTS",
    "validation_warnings": "WARNINGS",
    "media_index": "MEDIA_INDEX",
    "pack_plan": "PACK_PLAN",
}


def _turns(question: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Rows in every form in which there is a sound, and their files: 44 of them, all of other lengths."""
    rows: list[dict[str, Any]] = []
    text = {"type": "text", "text": "What is it?"}
    write_image(folder / "a.png", 60, 40)
    for number in range(12):
        write_wav(folder / f"{number}.wav", tone(0.1 + 0.137 * number, 8000 + 4000 * number), 8000 + 4000 * number)
        item = {"type": "audio_url", "audio_url": {"url": f"{number}.wav"}}
        rows.append({"messages": _turns([item, text], str(number))})
    stereo = np.stack([tone(1.0, 44_100), np.zeros(44_100, np.float32)])
    write_wav(folder / "stereo.wav", stereo, 44_100)
    for number in range(8):  # a part of a sound, and a picture beside it
        part = {"type": "audio", "audio": "stereo.wav", "audio_start": 0.1 * number, "audio_end": 0.1 * number + 0.15}
        rows.append({"messages": _turns([{"type": "image", "image": "a.png"}, part, text], str(number))})
    codecs = {"flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "m4a": "aac"}
    for number, (ending, codec) in enumerate(codecs.items()):
        write_sound(folder / f"s.{ending}", tone(0.7 + number / 5, 48_000), 48_000, codec)
        rows.append({"messages": _turns("<audio>What do you hear?", ending), "audios": [f"s.{ending}"]})
        said = ("<audio>What?", ending, "<audio>And that?", "no")
        turns = [{"from": role, "value": text} for role, text in zip(("human", "gpt") * 2, said, strict=True)]
        rows.append({"conversations": turns, "audios": ["5.wav", f"s.{ending}"]})
    content = base64.b64encode((folder / "7.wav").read_bytes()).decode()
    inline = {"type": "input_audio", "input_audio": {"data": content, "format": "wav"}}
    rows.append({"messages": _turns([inline, text], "inline")})
    rows.append(
        {"messages": _turns([{"type": "audio_url", "audio_url": f"data:audio/wav;base64,{content}"}, text], "u")}
    )
    for number in range(12):  # clips that are heard: of a sound shorter, as long, and longer than the pictures
        seconds, sound = 1 + number % 4, 0.4 + 0.61 * number
        write_heard_clip(folder / f"{number}.mp4", 8 * seconds, 8, tone(sound), late_s=0.25 * (number % 2))
        clip = {"type": "video_url", "video_url": {"url": f"{number}.mp4"}}
        beside = [{"type": "audio", "audio": f"{number}.wav"}] if number % 3 == 0 else []
        rows.append({"messages": _turns([clip, *beside, text], str(number))})
    window = {"type": "video", "video": "11.mp4", "video_start": 1.0, "video_end": 3.5}
    rows.append({"messages": _turns([window, text], "part")})
    rows.append({"messages": _turns("No sound at all.", "none")})
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The four data stages, run by Kedro; the catalog's entries by name."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "media").mkdir()
    rows = _rows(folder / "media")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "name": "s",
        "path": str(folder / "rows.jsonl"),
        "data_folder": str(folder / "media"),
        "data_type": "jsonl",
    }
    parameters = {
        "ingest": IngestConfig(datasets=[source], cache_folder=str(folder / "cache")),
        "validate": ValidateConfig(max_reject_fraction=0, probe_timeout_s=600),
        "data_engine": DataEngineConfig(),
        "sample": SAMPLE,
        "model": MODEL,
        "batching": BatchingConfig(packing_length=2048, dataset_type="vision_audio"),
    }
    entries: dict[str, Any] = {
        name: TableDataset(
            filepath=str(folder / f"{name}.parquet"),
            schema=f"qvl_pipeline.data.tables.{schema}",
            **({"streamed": True} if name == "samples" else {}),
        )
        for name, schema in TABLES.items()
    }
    for name in ("raw_manifest", "validation_report", "plan_summary", "token_statistics", "sample_report"):
        entries[name] = JSONDataset(filepath=str(folder / f"{name}.json"))
    for name in ("validation_page", "label_preview"):
        entries[name] = TextDataset(filepath=str(folder / f"{name}.html"))
    entries |= {name: FolderDataset(filepath=str(folder / name)) for name in ("video_frames", "base_model")}
    for name, file in (("tokenized_samples", "tokenized.arrow"), ("stream_samples", "stream.parquet")):
        entries[name] = FileDataset(filepath=str(folder / file))
    entries |= {f"params:{name}": MemoryDataset(block) for name, block in parameters.items()}
    stages = create_ingest() + create_validate() + create_sample() + create_tokenize()
    SequentialRunner().run(stages, DataCatalog(entries))
    return {name: entries[name].load() for name in entries if not name.startswith("params:")} | {"rows": rows}


def _processor_inputs(processor: Any, sample: pd.Series, row: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What transformers' processor makes of a sample, given the decoded sounds and sampled frames."""
    frames, sounds = FrameStore(run["video_frames"]), SoundStore(run["video_frames"], HEARING)
    text = processor.apply_chat_template(json.loads(sample["messages"]), tokenize=False)
    heard = [item for item in row["media"] if item["spectra"]]
    clips = [item for item in row["media"] if item["type"] == "video"]
    given: dict[str, Any] = {}
    if heard:
        given["audio"] = [sounds.samples(item["type"], item["key"]) for item in heard]
    if clips:
        given["videos"] = [torch.tensor(frames.frames(item["key"])) for item in clips]
        given |= {"load_audio_from_video": True}
        given["audio_from_video_indices"] = [0 if item["type"] == "video" else None for item in heard]
        told = {"fps": 2 / clips[0]["seconds_per_grid"]}
        given["videos_kwargs"] = {"do_sample_frames": False, "do_resize": False, **told}
    images = [Image.open(item["key"]) for item in row["media"] if item["type"] == "image"]
    return dict(processor(text=[text], images=images or None, return_tensors="pt", **given))


def test_every_row_arrives(run: dict[str, Any]) -> None:
    assert len(run["rows"]) >= 44
    assert run["validation_report"]["counts"] == {
        "ingested": len(run["rows"]), "valid": len(run["rows"]), "quarantined": 0, "rejected": 0,
    }  # fmt: skip
    assert len(TokenizedSamples(run["tokenized_samples"])) == len(run["rows"])
    assert set(run["valid_samples"]["kind"]) == {
        "audio",
        "multi_audio",
        "audio_and_image",
        "video",
        "audio_and_video",
        "text",
    }


def test_ids_features_and_positions_are_the_processors(run: dict[str, Any]) -> None:
    processor = load_processor(run["base_model"], MODEL)
    # Of the 300 s that it would fill each sound up to, nine are enough: tests/media/sound/test_log_mel.py has them all.
    processor.feature_extractor.n_samples, processor.feature_extractor.nb_max_frames = 144_000, 900
    model = AutoModelForImageTextToText.from_pretrained(run["base_model"], dtype=torch.float32)
    sounds, tokenized = SoundStore(run["video_frames"], HEARING), TokenizedSamples(run["tokenized_samples"])
    heard_clips = 0
    for index, sample in run["sampled_samples"].iterrows():
        row = tokenized.row(index)
        inputs = _processor_inputs(processor, sample, row, run)
        assert row["input_ids"].tolist() == inputs["input_ids"][0].tolist(), sample["messages"]
        heard = [item for item in row["media"] if item["spectra"]]
        for number, item in enumerate(heard):
            expected = inputs["input_features"][number][:, inputs["feature_attention_mask"][number].bool()]
            found = sounds.log_mel(item["type"], item["key"]).T
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
        in_video = any(item["type"] == "video" for item in heard)
        heard_clips += in_video
        lengths = inputs["feature_attention_mask"].sum(-1) if heard else None
        expected, _ = model.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            torch.ones_like(inputs["input_ids"]),
            use_audio_in_video=in_video,
            audio_seqlens=lengths,
            second_per_grids=inputs.get("video_second_per_grid"),
        )
        positions = mrope_positions(
            row["input_ids"],
            row["media"],
            placeholder_ids=placeholder_ids(processor),
            tokens_per_second=FAMILIES["qwen2_5_omni"].tokens_per_second(model.config),
        )
        assert positions[1:].tolist() == expected[:, 0].tolist(), sample["messages"]
    assert heard_clips == 13


def test_the_pack_of_rows_has_the_loss_of_the_plain_thinker(run: dict[str, Any]) -> None:
    """From a row with a sound in a file to the loss, in float32."""
    packed = load_packed(run["base_model"], "qwen2_5_omni")
    plain = AutoModelForImageTextToText.from_pretrained(run["base_model"], dtype=torch.float32)
    mean, std = normalization(load_processor(run["base_model"], MODEL))
    packed = PackedVLM(packed.hf, packed.family, mean, std)
    tokenized = TokenizedSamples(run["tokenized_samples"])
    made = dataclasses.replace(
        make_builder(plain.config, "qwen2_5_omni"),
        loader=PatchLoader(patch_size=14, frame_store=run["video_frames"]),
        sounds=SoundReader(SoundStore(run["video_frames"], HEARING), HEARING, plain.config),
        sources=("s",),
    )
    samples = [tokenized.row(index) for index in range(0, len(tokenized), 3)]
    assert {item["type"] for sample in samples for item in sample["media"]} == {"image", "video", "audio"}
    with torch.no_grad():
        expected = sum(thinker_loss(plain, sample, made, (mean, std)) for sample in samples)
        loss = packed(made.build(samples, vision=False)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    plan = run["pack_plan"]
    assert plan["spectra"].sum() == sum(tokenized.row(index)["spectra"] for index in range(len(tokenized)))
