"""Packs against the model's own forward on each sample alone (invariants 1, 3 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.media.pixels import normalize_patches
from tests.engine.packs import MEAN, STD, load_packed, make_builder

KINDS = ["text", "image", "two_images", "video", "image_and_video"]


def reference_loss(
    model: PreTrainedModel,
    sample: dict[str, Any],
    builder: BatchBuilder,
    normalization: tuple[list[float], list[float]] = (MEAN, STD),
) -> torch.Tensor:
    """Sum of the sample's supervised losses by transformers' own top-level forward, positions included."""
    inputs = inputs_of(model.config, sample, builder, normalization)
    logits, ids = model(**inputs).logits[0].float(), inputs["input_ids"]
    losses = [
        F.cross_entropy(logits[start - 1 : end - 1], ids[0, start:end], reduction="sum")
        for start, end in sample["label_spans"].tolist()
    ]
    return torch.stack(losses).sum()


def inputs_of(
    config: PreTrainedConfig,
    sample: dict[str, Any],
    builder: BatchBuilder,
    normalization: tuple[list[float], list[float]] = (MEAN, STD),
) -> dict[str, torch.Tensor]:
    """What a processor of transformers would make of the sample."""
    ids = torch.tensor(sample["input_ids"], dtype=torch.long)[None]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int(),
    }
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [item for item in sample["media"] if item["type"] == kind]
        if media:
            inputs[pixels] = normalize_patches(builder.loader.load(media), *normalization)
            inputs[grid] = torch.tensor([[item["grid_t"], item["grid_h"], item["grid_w"]] for item in media])
            if kind == "video" and builder.tokens_per_second:
                inputs["second_per_grid_ts"] = torch.tensor([item["seconds_per_grid"] for item in media])
    return inputs


def gradients(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    scale = max(grad.abs().max() for grad in expected.values())
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        error = (actual[name] - grad).abs().max() / scale
        assert error <= 1e-5, f"{name}: gradient differs by {error:.1e} of the largest gradient"


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS, KINDS[::-1]], ids="+".join)
def test_pack_equals_the_models_own_forward(
    kinds: list[str],
    packed: PackedVLM,
    hf_model: PreTrainedModel,
    builder: BatchBuilder,
    samples: dict[str, dict[str, Any]],
) -> None:
    chosen = [samples[kind] for kind in kinds]
    expected = sum(reference_loss(hf_model, sample, builder) for sample in chosen)
    expected.backward()
    batch = builder.build(chosen, vision=any(sample["media"] for sample in chosen))
    loss = packed(batch).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(packed, "hf."), gradients(hf_model))


def hidden_states(model: PackedVLM, batch: Batch) -> torch.Tensor:
    """Last hidden states `[T, H]` of all tokens, of which the logits are a product."""
    kept: list[torch.Tensor] = []
    hook = model.hf.model.language_model.register_forward_hook(lambda *parts: kept.append(parts[2].last_hidden_state))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return kept[0][0]


@pytest.mark.parametrize("changed", range(3))
def test_no_sample_of_a_pack_moves_another_by_one_bit(
    changed: int, packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict[str, Any]]
) -> None:
    if packed.family.experts:  # products of many tokens round by how many they are, not by what is in the others
        packed.hf.config.text_config._experts_implementation_internal = "batched_mm"
    chosen = [samples[kind] for kind in ("image", "image_and_video", "two_images")]
    before = hidden_states(packed, builder.build(chosen, vision=True))
    ids = chosen[changed]["input_ids"].copy()
    ids[-3:] += 1
    media = [item | {"key": f"other/{item['key']}"} for item in chosen[changed]["media"]]
    chosen[changed] = chosen[changed] | {"input_ids": ids, "media": media}
    after = hidden_states(packed, builder.build(chosen, vision=True))
    bounds = np.cumsum([0, *(len(sample["input_ids"]) for sample in chosen)]).tolist()
    moved = [not torch.equal(before[start:end], after[start:end]) for start, end in pairwise(bounds)]
    assert moved == [number == changed for number in range(3)]


@pytest.mark.parametrize("kinds", [KINDS, ["text", "video", "text"], []], ids="+".join)
def test_padded_rows_have_the_losses_and_gradients_of_packs(
    kinds: list[str], family: str, packed: PackedVLM, tiny_folders: Callable[[str], Path], samples: dict[str, dict]
) -> None:
    chosen = [samples[kind] for kind in kinds]
    expected = packed(make_builder(packed.hf.config, family).build(chosen, vision=True))
    expected.sum().backward()
    padded = load_packed(tiny_folders(family), family, rmpad=False)
    batch = make_builder(packed.hf.config, family, rmpad=False).build(chosen, vision=True)
    lengths = [len(sample["input_ids"]) for sample in chosen] or [1]
    assert batch.input_ids.shape == (len(lengths), max(lengths))
    assert batch.attention_mask.sum(1).tolist() == lengths
    losses = padded(batch)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    if kinds:
        assert_same_gradients(gradients(padded), gradients(packed))


def test_batch_has_no_padding_and_shifts_targets_within_each_sample(
    builder: BatchBuilder, samples: dict[str, dict[str, Any]]
) -> None:
    chosen = [samples["text"], samples["image"]]
    batch = builder.build(chosen, vision=True)
    lengths = [len(sample["input_ids"]) for sample in chosen]
    assert batch.input_ids.shape == (1, sum(lengths))
    assert batch.cu_seqlens.tolist() == [0, lengths[0], sum(lengths)]
    assert batch.max_length == max(lengths)
    (first,), (second,) = (sample["label_spans"].tolist() for sample in chosen)
    expected = [i - 1 for i in range(*first)] + [lengths[0] + i - 1 for i in range(*second)]
    assert batch.target_index.tolist() == expected
    assert batch.targets.tolist() == batch.input_ids[0, batch.target_index + 1].tolist()
    assert batch.target_source.tolist() == [0] * len(range(*first)) + [1] * len(range(*second))


def test_text_beside_a_rank_with_media_runs_the_tower_and_changes_nothing(
    packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict[str, Any]]
) -> None:
    plain = packed(builder.build([samples["text"]], vision=False)).sum()
    accompanied = packed(builder.build([samples["text"]], vision=True)).sum()
    torch.testing.assert_close(accompanied, plain, rtol=0, atol=0)
    accompanied.backward()
    towers = {name: grad for name, grad in gradients(packed, "hf.").items() if name.startswith("model.visual.")}
    tower_parameters = [name for name, _ in packed.hf.named_parameters() if name.startswith("model.visual.")]
    assert sorted(towers) == sorted(tower_parameters), "every vision parameter must take part in the backward pass"
    assert all(grad.abs().max() == 0 for grad in towers.values())


def test_empty_batch_trains_on_nothing(packed: PackedVLM, builder: BatchBuilder) -> None:
    loss = packed(builder.build([], vision=True)).sum()
    loss.backward()
    assert loss.item() == 0
    assert all(grad.abs().max() == 0 for grad in gradients(packed).values())


def test_media_that_do_not_fit_their_placeholders_are_named(
    builder: BatchBuilder, samples: dict[str, dict[str, Any]]
) -> None:
    sample = samples["image"] | {"media": samples["two_images"]["media"]}
    with pytest.raises(ValueError, match=r"sample 'image'.*placeholders"):
        builder.build([sample], vision=True)
