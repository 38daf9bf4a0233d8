from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import ProcessorMixin

from qvl_pipeline.config import BatchingConfig, DataEngineConfig, IngestConfig, ModelConfig
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.data.tables import QUARANTINE, to_frame
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.pipelines.tokenize.nodes import plan, prepare_base_model, preview, tokenize
from qvl_pipeline.reports.label_preview import LONGEST_TEXT, SAMPLES, choose_samples, pieces, with_pictures
from qvl_pipeline.reports.thumbnail import Thumbnail
from tests.data.samples import samples_table, write_images, write_store
from tests.reports.evaluation.test_report import NASTY, Page

END = "<|im_end|>"


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(processor_type=request.param, image_max_pixels=200 * 200)


@pytest.fixture(scope="module")
def valid_samples(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    image = ("image", str(tmp_path_factory.getbasetemp() / "preview.png"))
    clip = ("video", "clip.mp4")
    chats = {
        "text": [("user", f"What is {NASTY}?\n\n"), ("assistant", f"{NASTY}\n")],
        "chat": [
            ("system", "You are terse."),
            ("user", [image, "the assistant", image]),
            ("assistant", "7"),
            ("user", [clip, image, "?"]),
            ("assistant", "3 \u4f60\u597d"),
        ],
        "drawn": [("user", "Draw."), ("assistant", ["Here: ", image, " done"])],
        "long": [("user", "one two " * 400), ("assistant", "three " * 400)],
    }
    return samples_table([{"kind": kind, "messages": turns} for kind, turns in chats.items()])


@pytest.fixture(scope="module")
def made(model: ModelConfig, valid_samples: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made")
    media_index = write_images(tmp_path_factory.getbasetemp(), {"preview.png": (97, 140)})
    side = 2 * model.family.patch_size
    write_store(folder / "frames", {"clip.mp4": (range(0, 12, 2), 4.0, (2 * side, 3 * side))})
    prepare_base_model(valid_samples, model)(folder / "base")
    tokenize(
        valid_samples, media_index, folder / "frames", folder / "base", model, BatchingConfig(), DataEngineConfig()
    )[0](folder / "tokenized.arrow")
    ingest = IngestConfig(datasets=[{"name": "source", "path": "x", "data_type": "json"}])
    nothing = to_frame(QUARANTINE.empty_table())
    summary = plan(folder / "tokenized.arrow", folder / "stream.parquet", nothing, BatchingConfig(), ingest)[1]
    tokenized, base = folder / "tokenized.arrow", folder / "base"
    return {"samples": TokenizedSamples(tokenized), "processor": load_processor(base, model)} | {
        "pages": [preview(tokenized, summary, base, folder / "frames", model)[1] for _ in range(2)]
    }


def test_pieces_stand_for_all_tokens_in_order(made: dict[str, Any]) -> None:
    processor: ProcessorMixin = made["processor"]
    for row in range(len(made["samples"])):
        sample = made["samples"].row(row)
        found = list(pieces(sample, processor))
        is_medium = np.isin(sample["input_ids"], [processor.image_token_id, processor.video_token_id])
        chips = [piece.text for piece in found if piece.kind == "medium"]
        assert sum(int(re.search(r"(\d+) tokens$", chip)[1]) for chip in chips) == is_medium.sum()
        if sample["kind"] != "long":
            text = "".join(piece.text for piece in found if piece.kind != "medium")
            assert text == processor.tokenizer.decode(sample["input_ids"][~is_medium])


def test_what_is_marked_is_what_is_trained_on(made: dict[str, Any], valid_samples: pd.DataFrame) -> None:
    marked = {
        kind: "".join(piece.text for piece in pieces(made["samples"].row(row), made["processor"]) if piece.trained)
        for row, kind in enumerate(valid_samples["kind"])
    }
    assert marked["text"] == f"{NASTY}\n{END}"
    assert marked["chat"] == f"7{END}3 \u4f60\u597d{END}"
    assert marked["drawn"] == f"Here: <|vision_start|><|vision_end|> done{END}"


def test_a_chip_says_kind_grid_and_tokens(made: dict[str, Any], model: ModelConfig) -> None:
    chips = [piece.text for piece in pieces(made["samples"].row(1), made["processor"]) if piece.kind == "medium"]
    images = [medium for medium in made["samples"].row(1)["media"] if medium["type"] == "image"]
    high, wide = images[0]["grid_h"], images[0]["grid_w"]
    image = f"image · {high} by {wide} patches · {high * wide // 4} tokens"
    clip = {
        "qwen3_vl": [f"clip, {number} of 3 · 4 by 6 patches · 6 tokens" for number in (1, 2, 3)],
        "qwen2_5_vl": ["clip · 3 by 4 by 6 patches · 18 tokens"],
    }
    assert chips == [image, image, *clip[model.processor_type], image]


def test_the_middle_of_a_long_text_is_collapsed(made: dict[str, Any]) -> None:
    sample = made["samples"].row(3)
    found = list(pieces(sample, made["processor"]))
    [question, answer] = [piece for piece in found if piece.kind == "gap"]
    assert (question.trained, answer.trained) == (False, True)
    hidden = [int(gap.text.split()[0].replace(",", "")) for gap in (question, answer)]
    assert hidden[1] == sample["supervised_tokens"] - 1 - LONGEST_TEXT


def test_the_page_is_self_contained_escaped_and_the_same_each_time(made: dict[str, Any]) -> None:
    first, second = made["pages"]
    assert first == second
    page = Page(first)
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert NASTY in page.text
    assert f'<span class="special said">{END.replace("<", "&lt;").replace(">", "&gt;")}</span>' in first
    assert "4 samples, of as many kinds and sources as there are" in page.text


def test_pictures_and_frames_stand_beside_their_chips(made: dict[str, Any], model: ModelConfig) -> None:
    chat = made["pages"][0].split('<span class="medium">')
    chips = [re.sub(r"<[^>]*>", "", chip).partition(" patches")[0] for chip in chat]
    pictures = {
        kind: [chip.count("<img ") for chip, text in zip(chat, chips, strict=True) if text.startswith(kind)]
        for kind in ("image", "clip")
    }
    assert pictures["image"] == [1, 1, 1, 1]  # three of the chat, one that is drawn
    # The frames of a clip stand beside the seconds that the model is told, or together where it is told none.
    assert pictures["clip"] == {"qwen3_vl": [1, 1, 1], "qwen2_5_vl": [4]}[model.processor_type]


def test_of_a_long_clip_some_temporal_patches_have_pictures(made: dict[str, Any], model: ModelConfig) -> None:
    processor = made["processor"]
    clip = {"type": "video", "grid_t": 30, "grid_h": 2, "grid_w": 2, "spectra": 0, "key": "long.mp4"}
    between = {"qwen3_vl": [5], "qwen2_5_vl": []}[model.processor_type]  # the seconds, of whose text 5 stands for one
    ids = np.array([processor.video_token_id, *between] * 30)
    sample = {"input_ids": ids, "label_spans": [], "media": [clip]}
    shown = with_pictures(sample, processor, lambda medium, step: [Thumbnail("data:,", str(step))])
    steps = [pictures[0].caption for _, pictures in shown if pictures]
    assert steps == {"qwen3_vl": "0 4 8 12 17 21 25 29", "qwen2_5_vl": "None"}[model.processor_type].split()


def test_of_a_sample_of_many_images_the_first_have_pictures(made: dict[str, Any]) -> None:
    processor = made["processor"]
    image = {"type": "image", "grid_t": 1, "grid_h": 2, "grid_w": 2, "spectra": 0, "key": "page.png"}
    ids = np.array([processor.image_token_id, 5] * 100)
    sample = {"input_ids": ids, "label_spans": [], "media": [image] * 100}
    shown = with_pictures(sample, processor, lambda medium, step: [Thumbnail("data:,", "")])
    assert [bool(pictures) for piece, pictures in shown if piece.kind == "medium"] == [True] * 16 + [False] * 84


def test_frames_of_a_clip_that_is_heard_too_stand_at_its_first_chip(made: dict[str, Any]) -> None:
    token = made["processor"].video_token_id
    clip = {"type": "video", "grid_t": 1, "grid_h": 2, "grid_w": 2, "spectra": 100, "key": "heard.mp4"}
    ids = np.array([token, 5, *[token] * audio_tokens(100)])  # one of its picture, then its sound
    sample = {"input_ids": ids, "label_spans": [], "media": [clip]}
    shown = with_pictures(sample, made["processor"], lambda medium, step: [Thumbnail("data:,", str(step))])
    assert [len(pictures) for piece, pictures in shown if piece.kind == "medium"] == [1, 0]


def table(*groups: tuple[str, str, int]) -> pd.DataFrame:
    rows = [(kind, source) for kind, source, count in groups for _ in range(count)]
    frame = pd.DataFrame(rows, columns=["kind", "source"])
    return frame.assign(split="train", sample_id=[str(number) for number in range(len(frame))])


def test_samples_are_chosen_over_all_kinds_and_sources() -> None:
    many = table(("text", "a", 500), ("image", "a", 300), ("video", "a", 1), ("text", "b", 2), ("image", "c", 90))
    chosen = choose_samples(many, [])
    counts = many.loc[chosen].groupby(["kind", "source"]).size()
    assert len(set(chosen)) == SAMPLES
    assert chosen == sorted(chosen) == choose_samples(many, [])
    assert len(counts) == 5
    assert counts["video", "a"] == 1


def test_each_of_many_kinds_is_shown_once() -> None:
    kinds = table(*((f"kind {number}", "abc"[number % 3], 4) for number in range(12)))
    chosen = kinds.loc[choose_samples(kinds, [])]
    assert chosen["kind"].is_unique
    assert set(chosen["source"]) == set("abc")


def test_only_what_is_trained_on_is_shown() -> None:
    few = table(("text", "a", 6))
    few.loc[:2, "split"] = "eval"
    assert choose_samples(few, ["4"]) == [3, 5]
