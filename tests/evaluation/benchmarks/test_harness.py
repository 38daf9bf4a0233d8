"""lmms-eval as the command that it is: what it is told, what is read of its results, and how it may fail.

It is not installed here. In its place is a package of that name which writes results in the form that version 0.5 does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qvl_pipeline.config import EvaluateConfig, ModelConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.benchmarks.harness import check_lmms_eval, run_lmms_eval
from qvl_pipeline.pipelines.evaluate.nodes import measure

STAND_IN = """
import argparse, json, os, pathlib, sys

parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "output_path"):
    parser.add_argument(f"--{name}", required=True)
given = parser.parse_args()
print("loading", given.model)
if os.environ.get("FAILS"):
    sys.exit("no such task: " + given.tasks)
folder = pathlib.Path(given.output_path) / "org__model"
folder.mkdir()
results = {
    task: {
        "alias": task,
        "relaxed_overall,none": len(given.model_args) / 1000,
        "relaxed_overall_stderr,none": "N/A",
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": 0.01,
        "submission,none": None,
        " ": " ",
    }
    for task in given.tasks.split(",")
}
counted = {task: {"original": 2500, "effective": 8} for task in results}
written = {"results": results, "n-samples": counted, "asked": vars(given)}
(folder / "20261130_results.json").write_text(json.dumps(written))
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")


def asked(folder: Path) -> dict[str, Any]:
    (written,) = folder.rglob("*results.json")
    return json.loads(written.read_text())["asked"]


@pytest.mark.usefixtures("installed")
def test_it_measures_the_folder_of_the_model_and_its_numbers_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    given = {"min_pixels": 1024, "fps": 2.0}
    found = run_lmms_eval("/models/mine", "qwen3_vl_moe", ["chartqa", "mmmu_val"], given, folder)
    arguments = "pretrained=/models/mine,min_pixels=1024,fps=2.0"
    same = {"model": "qwen3_vl", "model_args": arguments, "batch_size": "1", "output_path": str(folder)}
    assert asked(folder) == {**same, "tasks": "chartqa,mmmu_val"}
    scores = {"exact_match/flexible-extract": 0.5, "exact_match/flexible-extract_stderr": 0.01, "n": 8}
    row = {"relaxed_overall": len(arguments) / 1000, **scores}
    assert found == {"chartqa": row, "mmmu_val": row}


@pytest.mark.usefixtures("installed")
def test_a_failure_says_what_it_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(
        UserError, match=r"status 1 and no results for x \(loading qwen3_vl / no such task: x\); its log"
    ):
        run_lmms_eval("m", "qwen3_vl", ["x"], {}, tmp_path / "scratch")
    with pytest.raises(UserError, match="takes no path with ',' or '='"):
        run_lmms_eval("a,b", "qwen3_vl", ["x"], {}, tmp_path / "scratch")


def test_without_it_there_is_one_sentence_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    check_lmms_eval([])
    with pytest.raises(UserError, match=r"^evaluate.lmms_eval asks for chartqa, .* is not installed here: install it"):
        check_lmms_eval(["chartqa"])


@pytest.mark.usefixtures("installed")
def test_every_model_that_was_evaluated_is_measured(tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "manifest.json").write_text(json.dumps({"path": ".", "family": "qwen3_vl"}))
    model = ModelConfig(processor_type="qwen3_vl", image_max_pixels=200_704)
    places = (base, tmp_path / "models" / "trained", tmp_path / "none kept")
    assert measure(*places, {"trained": {}}, model, EvaluateConfig()) == {}
    evaluate = EvaluateConfig(lmms_eval=["chartqa"], lmms_eval_model_args={"max_num_frames": 8})
    found = measure(*places, {"base": {}, "trained": {}}, model, evaluate)
    assert {name: list(tasks) for name, tasks in found.items()} == {
        name: ["lmms_eval/chartqa"] for name in ("base", "trained")
    }
    for name in found:
        told = asked(tmp_path / "models" / "scratch" / "lmms_eval" / name)["model_args"]
        assert told.startswith(f"pretrained={tmp_path / 'models' / name},")
        assert told.endswith("max_pixels=200704,max_num_frames=8")
