"""Frozen weights may lie on every rank whole: the same training, and nothing of them is gathered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.model.test_weights import load_sharded
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained

DORA = {"adapter": {"type": "dora", "targets": {"llm": "all", "vit": ["attention"]}}}
QLORA = {"adapter": {"type": "lora", "quantize_base": "nf4"}}
VISION = {"model": {"freeze_modules": ("visual",)}}


@pytest.mark.parametrize(
    ("frozen", "parallel", "nproc"),
    [
        (DORA, {}, 2),
        (DORA, {"bf16": True, "accumulate_sharded": True}, 2),
        (QLORA, {"bf16": True}, 2),
        (VISION, {"bf16": True, "forward_prefetch": 2, "backward_prefetch": 2}, 2),
        (VISION, {"hsdp_shard_size": 2}, 4),
    ],
    ids=["dora", "dora, bf16", "qlora, bf16", "frozen vision, bf16", "frozen vision, hsdp"],
)
def test_the_training_is_that_of_sharded_frozen_weights(
    frozen: dict[str, Any], parallel: dict[str, Any], nproc: int, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    kinds = ("text", "image", "text", "video")
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds, packs_per_step=4)
    rows, weights = {}, {}
    for how in ("sharded", "replicated"):
        spec = changed(base, tmp_path / how, parallel={**parallel, "frozen_sharding": how}, **frozen)
        rows[how] = [(row["loss"], row["grad_norm"]) for row in trained(spec, nproc)]
        weights[how] = load_file(Path(spec.export.output_dir) / "model.safetensors")
    assert rows["replicated"] == rows["sharded"]
    assert all(torch.equal(weight, weights["sharded"][name]) for name, weight in weights["replicated"].items())
    results = {how: json.loads((tmp_path / how / "result.json").read_text()) for how in rows}
    assert results["replicated"]["replicated_bytes"] > results["sharded"]["replicated_bytes"] == 0


def frozen_are_whole(spec: TrainSpec) -> None:
    model = load_sharded(spec)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == parameter.requires_grad, name


def test_what_is_frozen_is_whole_and_what_is_trained_is_sharded(
    tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders("qwen2_5_vl"), "qwen2_5_vl", kinds=("text",))
    spec = changed(base, tmp_path / "run", parallel={"frozen_sharding": "replicated"}, **VISION)
    run_ranks(frozen_are_whole, 2, spec, log_dir=tmp_path / "logs")
