from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.evaluation.generation import generate_answers, load_model
from qvl_pipeline.evaluation.likelihood import sample_losses, supervised_tokens
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.mrope import mrope_positions
from tests.evaluation.world import ANSWERS, World

NEW_TOKENS = 12


def generate(world: World, model: Path, batch_size: int, rows: list[int] | None = None, **evaluate: Any) -> list[str]:
    samples = TokenizedSamples(world.tokenized)
    config = EvaluateConfig(batch_size=batch_size, max_new_tokens=NEW_TOKENS, **evaluate)
    rows = list(range(len(samples))) if rows is None else rows
    return generate_answers(load_model(str(model), "auto"), world.processor, samples, rows, world.video_frames, config)


def plain_answers(world: World) -> list[str]:
    """What plain transformers answers, one prompt at a time."""
    model, tokenizer = world.load_model(), world.processor.tokenizer
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    answers = []
    for reference, media in zip(world.references, world.media, strict=True):
        given = dict(reference)
        if world.family == "qwen2_5_vl" and any(item["type"] == "video" for item in media):
            given["position_ids"] = authors_positions(model.config, given["input_ids"], media)
        output = model.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=ends)
        new = output[0, given["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


def authors_positions(config: object, input_ids: torch.Tensor, media: list[dict]) -> torch.Tensor:
    """Positions of Qwen2.5-VL's authors: transformers' own, from 5.3 on, let text start inside the clip before it."""
    positions = mrope_positions(
        np.asarray(input_ids[0]),
        media,
        placeholder_ids=(config.image_token_id, config.video_token_id),
        tokens_per_second=config.vision_config.tokens_per_second,
    )
    return torch.from_numpy(positions)[:, None]


@pytest.fixture(scope="module")
def one_by_one(world: World) -> list[str]:
    return generate(world, world.model_folder, batch_size=1)


def test_a_batch_answers_as_each_prompt_alone(world: World, one_by_one: list[str]) -> None:
    assert generate(world, world.model_folder, batch_size=7) == one_by_one


def test_answers_are_those_of_the_plain_processor_and_model(world: World, one_by_one: list[str]) -> None:
    assert one_by_one == plain_answers(world)
    assert len(set(one_by_one)) == len(one_by_one)


def test_answers_come_in_the_order_asked_for(world: World, one_by_one: list[str]) -> None:
    rows = [5, 0, 3, 1]
    assert generate(world, world.model_folder, batch_size=3, rows=rows) == [one_by_one[row] for row in rows]


def test_an_answer_ends_with_its_turn(world: World, tmp_path: Path) -> None:
    rows = [0, 1, 3]
    world.teach(tmp_path, rows)
    assert generate(world, tmp_path, batch_size=2, rows=rows) == [ANSWERS[row] for row in rows]


def test_the_sampling_settings_of_a_published_model_do_not_leak_in(
    world: World, one_by_one: list[str], tmp_path: Path
) -> None:
    shutil.copytree(world.model_folder, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    assert generate(world, tmp_path / "model", batch_size=1) == one_by_one


def test_sampled_answers_are_those_of_the_seed(world: World, one_by_one: list[str]) -> None:
    sampling = {"generation": {"do_sample": True, "temperature": 2.0}}
    first, again, other = (
        generate(world, world.model_folder, batch_size=1, seed=seed, **sampling) for seed in (0, 0, 1)
    )
    assert first == again
    assert one_by_one != first != other


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_loss_is_the_plain_models_on_the_answers_alone(world: World, batch_size: int) -> None:
    samples, model = TokenizedSamples(world.tokenized), world.load_model()
    rows = list(range(len(samples)))
    done: list[int] = []
    losses = sample_losses(model, world.processor, samples, rows, world.video_frames, batch_size, on_batch=done.append)
    assert max(done) == batch_size
    for row, media, loss in zip(rows, world.media, losses, strict=True):
        sample = samples.row(row)
        given = dict(world.references[row])
        ids = torch.from_numpy(np.asarray(sample["input_ids"], dtype=np.int64))[None]
        extra = ids.shape[1] - given["input_ids"].shape[1]
        given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, extra))
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if world.family == "qwen2_5_vl" and any(item["type"] == "video" for item in media):
            given["position_ids"] = authors_positions(model.config, ids, media)
        labels = torch.full_like(ids, -100)
        for start, end in sample["label_spans"]:
            labels[0, start:end] = ids[0, start:end]
        with torch.no_grad():
            assert loss == pytest.approx(model(**given, labels=labels).loss.item(), rel=1e-5)
        assert supervised_tokens(sample) == (labels != -100).sum()
