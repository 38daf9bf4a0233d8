"""The embedded example of an adapter: a trained tiny model is taught what it was never asked, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dvc_repository import command
from tests.kedro_project import make_project

BASE, ADAPTED = "tiny_qwen3_vl", "tiny_qwen3_vl_lora"
QUICK = {"sample": {"num_workers": 1}, "batching": {"data_parallel_size": 1}}
# Pictures alone, and fewer of them: of what the base model knows, the adapter needs digits.
SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    BASE: QUICK | {"ingest": {"demo": {"train_samples": 800, "eval_samples": 7, "kinds": {"single_image": 1}}}},
    ADAPTED: QUICK | {"ingest": {"demo": {"train_samples": 600, "eval_samples": 100}}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> Path:
    folder = make_project(tmp_path_factory.mktemp("example") / "project")
    (folder / "src" / "qvl_pipeline").symlink_to(Path(__file__).parents[1] / "src" / "qvl_pipeline")
    for profile, changes in SMALLER.items():
        path = folder / "conf" / profile / "parameters.yml"
        blocks = yaml.safe_load(path.read_text())
        for block, values in changes.items():
            for key, value in values.items():
                blocks[block][key] = blocks[block][key] | value if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(blocks))
    return folder


def test_the_adapter_knows_what_the_base_model_did_not(
    project: Path, tracking_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_database)
    command(project, f"kedro run --env {BASE} --pipelines ingest,validate,sample,tokenize,train")
    command(project, f"kedro run --env {ADAPTED}")
    reporting = project / "data" / "08_reporting" / ADAPTED
    scores = json.loads((reporting / "metrics.json").read_text())
    base, adapted = (scores[which]["next_digit"] for which in ("base", "trained"))
    assert base["n"] == adapted["n"] == 100
    assert base["exact_match"] <= 0.2  # one in ten by chance
    assert adapted["exact_match"] >= 0.6
    result = json.loads((reporting / "train_result.json").read_text())
    assert result["trained_parameters"] < 0.05 * result["parameters"]
    trained = project / "data" / "06_models" / ADAPTED / "trained"
    assert (trained / "adapter" / "adapter_model.safetensors").exists()
