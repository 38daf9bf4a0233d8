"""Liger's kernels: which modules get them, and what is said where they do not run."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
from transformers import PreTrainedModel

from qvl_pipeline.engine.model.kernels import fused_blocks, use_liger_kernels
from qvl_pipeline.engine.model.loading import build_model, load_processor
from qvl_pipeline.families import FAMILIES
from tests.engine.training import changed, make_training

CUDA = torch.device("cuda")  # only named: nothing is computed
# Three decoder layers with two norms each and a final one; Qwen3-VL also norms queries and keys. The two vision blocks
# of Qwen2.5-VL have two norms each, and the merger one.
EXPECTED = {
    "qwen3_vl": {"Qwen3VLTextMLP": 3, "Qwen3VLTextRMSNorm": 13},
    "qwen3_vl_moe": {"Qwen3VLMoeTextRMSNorm": 13},
    "qwen2_5_vl": {"Qwen2MLP": 3, "Qwen2_5_VLMLP": 2, "Qwen2_5_VLRMSNorm": 12},
    # Of its three layers one has softmax attention, with norms of queries and keys.
    "qwen3_5": {"Qwen3_5MLP": 3, "Qwen3_5RMSNorm": 9},
    "qwen3_5_moe": {"Qwen3_5MoeMLP": 3, "Qwen3_5MoeRMSNorm": 9},
}


def test_modules_that_compute_with_liger_are_counted(hf_model: PreTrainedModel, family: str) -> None:
    names = [name for name, _ in hf_model.named_parameters()]
    report = use_liger_kernels(hf_model, FAMILIES[family], CUDA)
    assert report == EXPECTED[family]
    theirs = {LigerRMSNorm.forward, LigerSwiGLUMLP.forward}
    replaced = [module for module in hf_model.modules() if getattr(module.forward, "__func__", None) in theirs]
    assert len(replaced) == sum(report.values())
    assert [name for name, _ in hf_model.named_parameters()] == names


def test_liger_is_told_what_the_norms_of_the_model_do(hf_model: PreTrainedModel, family: str) -> None:
    """By Liger's formula, with what the norm was told."""
    hidden = torch.randn(5, 128)
    norm = hf_model.model.language_model.norm
    torch.nn.init.normal_(norm.weight)
    expected = norm(hidden)
    use_liger_kernels(hf_model, FAMILIES[family], CUDA)
    normed = hidden * (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    torch.testing.assert_close(normed * (norm.offset + norm.weight), expected)
    assert norm.casting_mode == {0.0: "llama", 1.0: "gemma"}[norm.offset]


def test_nothing_of_transformers_is_changed_for_other_models(hf_model: PreTrainedModel, family: str) -> None:
    use_liger_kernels(hf_model, FAMILIES[family], CUDA)
    with torch.device("meta"):
        other = type(hf_model)(hf_model.config)
    assert not any("Liger" in type(module).__name__ for module in other.modules())
    assert all("forward" not in vars(module) for module in other.modules())


def test_cpu_is_told_that_it_is_not_used(hf_model: PreTrainedModel, family: str) -> None:
    report = use_liger_kernels(hf_model, FAMILIES[family], torch.device("cpu"))
    assert report == "not used: Liger's kernels need CUDA, and this is cpu"
    assert all("forward" not in vars(module) for module in hf_model.modules())


def test_class_that_transformers_no_longer_has_is_named(hf_model: PreTrainedModel, family: str) -> None:
    gone = dataclasses.replace(FAMILIES[family], liger_kernels={"OldNorm": "rms_norm"})
    with pytest.raises(ValueError, match=r"has no OldNorm in qwen"):
        use_liger_kernels(hf_model, gone, CUDA)


def test_what_became_of_it_is_logged(
    tmp_path: Path, tiny_folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("text",))
    spec = changed(base, tmp_path, model={"use_liger_kernel": True})
    with caplog.at_level(logging.INFO):
        build_model(spec, load_processor(spec), torch.device("cpu"), None)
    assert "use_liger_kernel: not used: Liger's kernels need CUDA, and this is cpu" in caplog.messages


LIGER, COMPILED, NEITHER = (True, False), (False, True), (False, False)
AUTO = {"use_liger_kernel": "auto", "torch_compile": "auto"}


@pytest.mark.parametrize(
    ("family", "model", "recompute", "device", "chosen"),
    [
        ("qwen2_5_vl", AUTO, "none", "cuda", COMPILED),
        ("qwen2_5_vl", AUTO, "full", "cuda", LIGER),
        ("qwen2_5_vl", AUTO, "none", "cpu", NEITHER),
        ("qwen2_5_vl", AUTO | {"use_liger_kernel": True}, "none", "cuda", LIGER),
        ("qwen2_5_vl", AUTO | {"use_liger_kernel": False}, "none", "cuda", COMPILED),
        ("qwen2_5_vl", AUTO | {"torch_compile": False}, "none", "cuda", LIGER),
        ("qwen3_vl", AUTO, "none", "cuda", LIGER),
        ("qwen3_vl", AUTO | {"torch_compile": True}, "none", "cuda", COMPILED),
        ("qwen3_vl_moe", AUTO, "none", "cuda", LIGER),
        ("qwen3_vl", {"use_liger_kernel": True, "torch_compile": True}, "none", "cpu", (True, True)),
    ],
)
def test_auto_takes_the_fastest_blocks_that_were_measured(
    tmp_path: Path,
    tiny_folders: Callable[[str], Path],
    family: str,
    model: dict[str, object],
    recompute: str,
    device: str,
    chosen: tuple[bool, bool],
) -> None:
    spec = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("text",))
    spec = changed(spec, tmp_path, model=model | {"family": family}, recompute={"llm": recompute, "vit": recompute})
    assert fused_blocks(spec, torch.device(device)) == chosen


@pytest.mark.parametrize("model", ["qwen2_5_vl_3b", "qwen3_vl_4b"])
def test_what_a_family_calls_the_fastest_was_measured_to_be_it(model: str) -> None:
    result = json.loads(Path(f"benchmarks/results/gpu_{model}.json").read_text(encoding="utf-8"))
    speeds = {row["blocks"]: row["tokens_per_second"] for row in result["rows"] if row["stack"] == "ours"}
    assert FAMILIES[model.rpartition("_")[0]].fastest_blocks == max(speeds, key=speeds.__getitem__)
