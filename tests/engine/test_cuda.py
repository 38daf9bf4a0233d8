"""Training on a GPU gives what it gives on a CPU, whatever is switched on.

`python -m pytest --confcutdir=tests/engine tests/engine/test_cuda.py` also runs on a machine that has only what the
engine needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16: dict[str, Any] = {"parallel": {"bf16": True}}


def _attention(kernel: str) -> dict[str, Any]:
    return BF16 | {"model": {"attn_implementation": kernel, "vit_attn_implementation": kernel}}


COMPILED = {"torch_compile": True, "torch_compile_backend": "inductor"}
RECOMPUTED = {"llm": "full", "vit": "full"}
SELECTIVE = {"llm": "selective", "vit": "selective"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": BF16,
    "fp16": {"parallel": {"fp16": True}},
    **{kernel: _attention(kernel) for kernel in ("torch_varlen", "sdpa", "eager")},
    "liger": BF16 | {"model": {"use_liger_kernel": True}},
    "recomputed": BF16 | {"recompute": RECOMPUTED},
    "recomputed, selective": BF16 | {"recompute": SELECTIVE},
    "recomputed, offloaded": BF16 | {"recompute": RECOMPUTED | {"offload": True}},
    "compiled": BF16 | {"model": COMPILED},
    "compiled, recomputed": BF16 | {"model": COMPILED, "recompute": RECOMPUTED},
    "compiled, selective": BF16 | {"model": COMPILED, "recompute": SELECTIVE},
    "cpu_offload": {"parallel": {"bf16": True, "cpu_offload": True}},
    "padded": BF16 | {"data": {"use_rmpad": False}},
    "loader processes": BF16 | {"data": {"dataloader_num_workers": 2}},
    "ema": BF16 | {"optim": {"ema_decay": 0.9}},
    "muon": BF16 | {"optim": {"optim": "muon"}},
}


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def training(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]
) -> TrainSpec:
    return make_training(tmp_path_factory.mktemp("cuda"), tiny_folders(request.param), request.param)


@pytest.fixture(scope="module")
def on_a_cpu(training: TrainSpec) -> list[dict[str, Any]]:
    return trained_on_a_cpu(training)


def main_without_gpu(spec_path: Path) -> int:
    torch.cuda.is_available = lambda: False
    return main(spec_path)


def trained_on_a_cpu(training: TrainSpec) -> list[dict[str, Any]]:
    folder = Path(training.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    training.save(folder / "train_spec.json")
    run_ranks(main_without_gpu, 1, folder / "train_spec.json", log_dir=folder / "logs")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_float32_on_a_gpu_is_float32_on_a_cpu(
    training: TrainSpec, on_a_cpu: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = trained(changed(training, tmp_path), 1)
    assert losses(rows) == pytest.approx(losses(on_a_cpu), rel=1e-3)
    first, reference = rows[0], on_a_cpu[0]
    assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
    assert first["peak_memory_gib"] > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_is_switched_on_trains_the_same(
    variant: str, training: TrainSpec, on_a_cpu: list[dict[str, Any]], tmp_path: Path
) -> None:
    if variant == "muon":
        on_a_cpu = trained_on_a_cpu(changed(training, tmp_path / "cpu", optim={"optim": "muon"}))
    rows = trained(changed(training, tmp_path / "gpu", **VARIANTS[variant]), 1, timeout_s=240)
    # What 8 bits of mantissa leave of three steps.
    assert losses(rows) == pytest.approx(losses(on_a_cpu), rel=0.02)


@pytest.mark.parametrize(
    "groups",
    [
        {"parallel": {"bf16": True}},
        {"parallel": {"bf16": True, "cpu_offload": True}, "model": RECOMPUTED},
        {"parallel": {"fp16": True}},
        {"parallel": {"bf16": True}, "model": COMPILED},
    ],
    ids=["bf16", "cpu_offload", "fp16", "compiled"],
)
def test_a_quantised_base_trains_the_same(groups: dict[str, Any], training: TrainSpec, tmp_path: Path) -> None:
    quantized = changed(training, tmp_path / "cpu", adapter={"type": "dora", "quantize_base": "nf4"})
    expected = trained_on_a_cpu(quantized)
    rows = trained(changed(quantized, tmp_path / "gpu", **groups), 1, timeout_s=240)
    assert losses(rows) == pytest.approx(losses(expected), rel=0.02)


def test_resuming_continues_the_same_curve(training: TrainSpec, tmp_path: Path) -> None:
    whole = trained(changed(training, tmp_path / "whole", run={"save_steps": 1}, **BF16), 1)
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "checkpoint-2")
    resumed = trained(changed(training, tmp_path / "resumed", run={"resume_from": checkpoint}, **BF16), 1)
    assert losses(resumed) == pytest.approx(losses(whole)[2:], rel=1e-5)
