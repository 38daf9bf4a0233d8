from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import build, numerics, padded_inputs
from benchmarks.gpu_models import MODELS, TINY, make_batch, make_samples
from transformers import AutoModelForImageTextToText

from tests.engine.test_imports import FORBIDDEN

BARE_NODE = """
import sys

sys.modules.update(dict.fromkeys({missing}))
from pathlib import Path

from benchmarks import gpu, report

report.RESULTS = Path({results!r})
sys.argv = ["gpu", "--tiny"]
gpu.main()
"""


def test_runs_on_a_bare_node_and_says_what_cannot_run_there(tmp_path: Path) -> None:
    missing = sorted(FORBIDDEN | {"accelerate", "peft", "rich", "polars"})
    program = BARE_NODE.format(missing=missing, results=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in TINY:
        result = json.loads((tmp_path / f"gpu_{name}.json").read_text())
        measured = {(row["stack"], row["attention"]) for row in result["rows"] if row["tokens_per_second"]}
        stacks = ("ours", "transformers", "transformers, linear patches")
        assert measured == {(stack, "sdpa") for stack in stacks}
        assert all(bool(row["note"]) != bool(row["tokens_per_second"]) for row in result["rows"])
        assert result["ratios"]["ours_over_transformers"] > 0
        assert (tmp_path / f"gpu_numerics_{name}.json").exists()


@pytest.mark.parametrize("part", ["ours", "padded"])
def test_what_does_not_fit_is_tried_with_less_in_memory(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(bench: object, step: object) -> dict[str, float]:
        tried.append(step)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no room")
        return {"step_s": 1.0}

    tried: list[object] = []
    monkeypatch.setattr(gpu._Bench, "_time", full)
    bench = gpu._Bench(TINY["tiny_qwen3_vl"], torch.device("cpu"), 256, 1)
    with gpu.one_rank():
        row = bench.ours("sdpa", "eager") if part == "ours" else bench.padded("sdpa", True)
    assert (row["recomputed"], row["note"]) == ("weights" if part == "ours" else "nothing, 4 rows at once", "")


@pytest.mark.parametrize("name", TINY)
def test_comparator_computes_the_loss_that_packs_have(name: str) -> None:
    config = TINY[name]
    samples = make_samples(config, 256)
    model = build(config, torch.device("cpu"), torch.float32, "sdpa", False)
    torch.manual_seed(0)
    theirs = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32)
    torch.manual_seed(1)
    packed = make_batch(config, samples)
    torch.manual_seed(1)
    inputs = padded_inputs(make_batch(config, samples, rmpad=False))
    expected = model(packed).mean()
    assert theirs(**inputs).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_sdpa_agrees_with_eager_attention(name: str) -> None:
    rows = numerics(TINY[name], torch.device("cpu"))
    errors = {(row["attention"], row["dtype"]): row["gradient_error"] for row in rows}
    assert errors["sdpa", "float32"] < 1e-4
    assert errors["sdpa", "float32"] < errors["sdpa", "bfloat16"] < 0.2


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen3_vl_4b", 4.4e9), ("qwen2_5_vl_3b", 3.75e9), ("qwen2_5_vl_7b", 8.29e9)]
)
def test_dimensions_are_those_of_the_published_models(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(MODELS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.02)
