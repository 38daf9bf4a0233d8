"""Packs with sound in them against the thinker's own forward on each sample alone (invariants 1, 3 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, PreTrainedModel

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.model.flops import flops_of
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.media.pixels import normalize_patches
from tests.engine.model.test_flops import TOLERANCE, counted, masked_pairs
from tests.engine.model.test_packed_vlm import assert_same_gradients, gradients
from tests.engine.packs import MEAN, STD, load_packed, make_builder, make_samples

FAMILY = "qwen2_5_omni"
HEARD = ["audio", "two_sounds", "audio_and_image", "heard_clip", "everything"]


@pytest.fixture
def thinker(tiny_folders: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(tiny_folders(FAMILY), dtype=torch.float32)


@pytest.fixture
def hearing(tiny_folders: Callable[[str], Path]) -> PackedVLM:
    return load_packed(tiny_folders(FAMILY), FAMILY)


@pytest.fixture
def builder(thinker: PreTrainedModel) -> BatchBuilder:
    return make_builder(thinker.config, FAMILY)


@pytest.fixture
def samples(thinker: PreTrainedModel) -> dict[str, dict[str, Any]]:
    return make_samples(thinker.config, FAMILY)


def thinker_loss(
    model: PreTrainedModel,
    sample: dict[str, Any],
    builder: BatchBuilder,
    normalization: tuple[list[float], list[float]] = (MEAN, STD),
) -> torch.Tensor:
    """Sum of the sample's supervised losses by the thinker's own forward, padded sounds and positions included."""
    ids = torch.tensor(sample["input_ids"], dtype=torch.long)[None]
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [item for item in sample["media"] if item["type"] == kind]
        if media:
            inputs[pixels] = normalize_patches(builder.loader.load(media), *normalization)
            inputs[grid] = torch.tensor([[item["grid_t"], item["grid_h"], item["grid_w"]] for item in media])
            if kind == "video":
                inputs["video_second_per_grid"] = torch.tensor([item["seconds_per_grid"] for item in media])
                inputs["use_audio_in_video"] = any(item["spectra"] for item in media)
    if sounds := [item for item in sample["media"] if item["spectra"]]:
        longest = max(item["spectra"] for item in sounds) + 5
        inputs["input_features"] = torch.zeros(len(sounds), builder.sounds.hearing.mel_bins, longest)
        inputs["feature_attention_mask"] = torch.zeros(len(sounds), longest, dtype=torch.long)
        for number, item in enumerate(sounds):
            log_mel = torch.from_numpy(builder.sounds.store.log_mel(item["type"], item["key"]).T.copy())
            inputs["input_features"][number, :, : item["spectra"]] = log_mel
            inputs["feature_attention_mask"][number, : item["spectra"]] = 1
    logits = model(input_ids=ids, **inputs).logits[0].float()
    losses = [
        F.cross_entropy(logits[start - 1 : end - 1], ids[0, start:end], reduction="sum")
        for start, end in sample["label_spans"].tolist()
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize(
    "kinds", [[kind] for kind in HEARD] + [["image", "text", *HEARD, "video"], [*HEARD[::-1], "text"]], ids="+".join
)
def test_pack_equals_the_thinkers_own_forward(
    kinds: list[str], thinker: PreTrainedModel, hearing: PackedVLM, builder: BatchBuilder, samples: dict[str, Any]
) -> None:
    chosen = [samples[kind] for kind in kinds]
    expected = sum(thinker_loss(thinker, sample, builder) for sample in chosen)
    expected.backward()
    loss = hearing(builder.build(chosen, vision=False, sound=False)).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(hearing, "hf."), gradients(thinker))


def test_a_rank_without_sound_runs_the_tower_and_changes_nothing(
    hearing: PackedVLM, builder: BatchBuilder, samples: dict[str, Any]
) -> None:
    plain = hearing(builder.build([samples["image"]], vision=True)).sum()
    accompanied = hearing(builder.build([samples["image"]], vision=True, sound=True)).sum()
    torch.testing.assert_close(accompanied, plain, rtol=0, atol=0)
    accompanied.backward()
    tower = {name: grad for name, grad in gradients(hearing, "hf.").items() if name.startswith("model.audio_tower.")}
    # What marks the ends of a sound for the talker is no part of what the thinker computes.
    parameters = {name for name, _ in hearing.hf.named_parameters() if name.startswith("model.audio_tower.")}
    assert parameters - set(tower) == {"model.audio_tower.audio_bos_eos_token.weight"}
    assert all(grad.abs().max() == 0 for grad in tower.values())


def test_twenty_steps_are_those_of_the_plain_thinker(
    thinker: PreTrainedModel, hearing: PackedVLM, builder: BatchBuilder, samples: dict[str, Any]
) -> None:
    """Packed against unpacked, in float32: text, images, clips and sounds, by the same optimizer."""
    kinds = [*HEARD, "text", "image", "video"]
    models = {model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4) for model in (thinker, hearing)}
    for step in range(20):
        chosen = [samples[kinds[(step + number) % len(kinds)]] for number in range(3)]
        tokens = sum(int(end - start) for sample in chosen for start, end in sample["label_spans"])
        losses = []
        for model, optimizer in models.items():
            optimizer.zero_grad()
            if model is thinker:
                loss = sum(thinker_loss(thinker, sample, builder) for sample in chosen) / tokens
            else:
                loss = hearing(builder.build(chosen, vision=False)).sum() / tokens
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), f"step {step}"


def test_flops_are_those_that_torch_counts(hearing: PackedVLM, builder: BatchBuilder, samples: dict[str, Any]) -> None:
    """Of whole chunks: what fills up a part of one is computed as well, and no work."""
    audio, ends = hearing.hf.config.audio_token_id, (hearing.hf.config.audio_start_token_id,)
    ids = [*ends, *[audio] * 30, 41, 42, 43]
    sample = samples["audio"] | {
        "input_ids": np.array(ids, dtype=np.int32),
        "label_spans": np.array([[len(ids) - 2, len(ids)]], dtype=np.int32),
        "media": [samples["audio"]["media"][0] | {"key": f"x:{spectra}", "spectra": spectra} for spectra in (40, 80)],
    }
    flops = flops_of(hearing)
    batch = builder.build([sample], vision=False)
    masked = masked_pairs(batch) * flops.per_text_pair
    assert flops.count(batch) + masked == pytest.approx(counted(hearing, batch), rel=TOLERANCE)
