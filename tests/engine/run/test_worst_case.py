"""The heaviest micro-batches are tried before the first step, and leave no trace but what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qvl_pipeline.engine.feed.steps import PackPlan, SharedSteps
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.training import changed, make_training, trained


def result(training: TrainSpec) -> dict[str, Any]:
    return json.loads((Path(training.run.output_dir) / "result.json").read_text())


def test_losses_and_weights_are_those_of_a_run_without_it(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl")
    # Dropout draws from the generators that must go on where they were.
    adapter = {"type": "lora", "dropout": 0.2, "targets": {"llm": "all", "vit": "all"}}
    plain = changed(base, tmp_path / "plain", adapter=adapter)
    run = {"worst_case_first": True, "expected_peak_bytes": 10_000_000}
    tried = changed(base, tmp_path / "tried", adapter=adapter, run=run)
    losses = [[row["loss"] for row in trained(training, nproc=2)] for training in (plain, tried)]
    assert losses[0] == losses[1]
    one, other = (load_file(Path(of.export.output_dir) / "model.safetensors") for of in (plain, tried))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    measured = result(tried)["worst_case"]
    assert measured["measured_bytes"] > 1_000_000
    assert measured["ratio"] == measured["measured_bytes"] / 10_000_000
    assert "worst_case" not in result(plain)


@pytest.mark.parametrize(
    ("world_size", "packs_per_micro_batch", "heaviest"),
    [(1, 1, [(0, 0), (0, 3)]), (2, 1, [(0, 0), (0, 1)]), (1, 2, [(0, 0), (0, 1)])],
)
def test_the_heaviest_are_found_over_all_ranks(
    world_size: int, packs_per_micro_batch: int, heaviest: list[tuple[int, int]]
) -> None:
    tokens, patches = np.array([9, 5, 4, 3, 6, 7]), np.array([0, 0, 0, 8, 0, 0])
    plan = PackPlan(np.array([0, 4, 6]), np.arange(7), np.arange(6), tokens, patches, np.ones(6), np.zeros(6))
    steps = SharedSteps(plan, 0, world_size, packs_per_micro_batch)
    assert steps.heaviest() == heaviest
    assert (
        SharedSteps(replace(plan, vit_patches=tokens), 0, world_size, packs_per_micro_batch).heaviest() == heaviest[:1]
    )


def test_the_heaviest_of_a_later_step() -> None:
    plan = PackPlan(
        np.array([0, 1, 4]), np.arange(5), np.arange(4), np.array([1, 1, 1, 5]), np.zeros(4), np.ones(4), np.zeros(4)
    )
    assert SharedSteps(plan, 0, 2, 1).heaviest() == [(1, 1), (0, 0)]
