"""The heaviest micro-batches are tried before the first step, and leave no trace but what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qvl_pipeline.engine.feed.steps import Pack, heaviest_micro_batches
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


def test_the_heaviest_are_found_over_all_ranks() -> None:
    def pack(tokens: int, patches: int) -> Pack:
        return Pack((0,), tokens, patches, 1)

    plan = [[pack(9, 0), pack(5, 0), pack(4, 0), pack(3, 8)], [pack(6, 0), pack(7, 0)]]
    assert heaviest_micro_batches(plan, world_size=1, packs_per_micro_batch=1) == [(0, 0), (0, 3)]
    assert heaviest_micro_batches(plan, world_size=2, packs_per_micro_batch=1) == [(0, 0), (0, 1)]
    assert heaviest_micro_batches(plan, world_size=1, packs_per_micro_batch=2) == [(0, 0), (0, 1)]
    assert heaviest_micro_batches([[pack(9, 9)]], world_size=1, packs_per_micro_batch=1) == [(0, 0)]
