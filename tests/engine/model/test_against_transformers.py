"""Twenty steps on packs against twenty steps of the plain transformers model, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from tests.engine.model.test_packed_vlm import KINDS, reference_loss

STEPS = 20


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    # Without a floor, Adam would blow rounding of gradients near zero up to full steps.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.1)


def test_twenty_steps_on_packs_are_those_of_plain_transformers(
    packed: PackedVLM, hf_model: PreTrainedModel, builder: BatchBuilder, samples: dict[str, dict[str, Any]]
) -> None:
    ours, theirs = optimizer_of(packed), optimizer_of(hf_model)
    first = None
    for step in range(STEPS):
        chosen = [samples[kind] for kind in (KINDS[step % 5], KINDS[(step + 2) % 5], KINDS[(step + 3) % 5])]
        tokens = sum(end - start for sample in chosen for start, end in sample["label_spans"].tolist())
        loss = packed(builder.build(chosen, vision=any(sample["media"] for sample in chosen))).sum() / tokens
        expected = sum(reference_loss(hf_model, sample, builder) for sample in chosen) / tokens
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), f"step {step + 1}"
        for value, optimizer in ((loss, ours), (expected, theirs)):
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        first = first or expected.item()
    assert expected.item() < 0.9 * first, "it must have learned something, or the steps compare nothing"
