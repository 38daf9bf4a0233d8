from __future__ import annotations

import numpy as np
import pytest
import torch

from qvl_pipeline.evaluation.prompts import PromptCollator
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from tests.evaluation.world import World


@pytest.fixture(scope="module")
def collate(world: World) -> PromptCollator:
    return PromptCollator.create(world.processor, world.load_model().config, world.video_frames)


def test_prompts_are_padded_on_the_left_and_hold_no_answer(world: World, collate: PromptCollator) -> None:
    samples = TokenizedSamples(world.tokenized)
    inputs = collate([samples.row(0), samples.row(4)])
    width = max(samples.row(row)["prompt_length"] for row in (0, 4))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, width)
    for position, row in enumerate((0, 4)):
        prompt = world.references[row]["input_ids"][0]
        kept = inputs["attention_mask"][position].bool()
        assert torch.equal(inputs["input_ids"][position][kept], prompt)
        assert kept[-len(prompt) :].all()
        assert kept.sum() == len(prompt)
        assert (inputs["position_ids"][:, position, : width - len(prompt)] == 0).all()


def test_pixels_and_grids_are_those_of_the_processor(world: World, collate: PromptCollator) -> None:
    samples = TokenizedSamples(world.tokenized)
    inputs = collate([samples.row(row) for row in range(len(samples))])
    for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        references = [reference for reference in world.references if pixels in reference]
        assert torch.equal(inputs[grid], torch.cat([reference[grid] for reference in references]))
        torch.testing.assert_close(inputs[pixels], torch.cat([reference[pixels] for reference in references]))


def test_text_alone_brings_no_vision_inputs(world: World, collate: PromptCollator) -> None:
    inputs = collate([TokenizedSamples(world.tokenized).row(0)])
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids"}


def test_media_after_the_last_answer_are_left_out(world: World, collate: PromptCollator) -> None:
    samples = TokenizedSamples(world.tokenized)
    first, second = samples.row(1), samples.row(2)
    later_turn = {
        **first,
        "input_ids": np.concatenate([first["input_ids"], second["input_ids"]]),
        "media": first["media"] + second["media"],
    }
    for name, tensor in collate([first]).items():
        assert torch.equal(collate([later_turn])[name], tensor)


def test_images_and_clips_are_normalised_each_as_its_processor_says(
    world: World, collate: PromptCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = TokenizedSamples(world.tokenized).row(4)
    before = collate([sample])
    monkeypatch.setattr(world.processor.video_processor, "image_mean", [0.1, 0.2, 0.3])
    after = collate([sample])
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert not torch.equal(before["pixel_values_videos"], after["pixel_values_videos"])
