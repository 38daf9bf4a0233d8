from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file, save_file

from qvl_pipeline.config import EvaluateConfig, ModelConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.checkpoints import averaged
from qvl_pipeline.pipelines.evaluate.nodes import (
    _score_table,
    complete_card,
    generate,
    refuse_regressions,
    write_report,
)
from qvl_pipeline.pipelines.evaluate.pipeline import create_pipeline
from qvl_pipeline.tracking.lineage.base_model import base_model_digest
from tests.evaluation.servers.http_server import Fault, chat_server
from tests.evaluation.world import ANSWERS, World, build_world, write_tokenized

KINDS = ["text", "single_image", "video"]
CATALOG = Path(__file__).parents[2] / "conf" / "base" / "catalog.yml"

MODEL = ModelConfig(processor_type="qwen3_vl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    world = build_world(folder, "qwen3_vl", KINDS)
    manifest = {"path": ".", "family": "qwen3_vl", "parameters": MODEL.decisive("tokens")}
    (world.model_folder / "manifest.json").write_text(json.dumps(manifest))
    world.teach(folder / "trained", [0, 1])
    world.teach(folder / "checkpoints" / "step-1", [2])
    shutil.copytree(folder / "trained", folder / "checkpoints" / "step-20")
    return world


@pytest.fixture(scope="module")
def inputs(world: World) -> dict[str, Any]:
    step = {"step": 1, "loss": 3.5, "learning_rate": 1e-3, "data_wait_share": 0.01, "peak_memory_gib": 0.5}
    return {
        "base_model": world.model_folder,
        "trained_model": world.model_folder.parent / "trained",
        "kept_checkpoints": world.model_folder.parent / "checkpoints",
        "tokenized_samples": world.tokenized,
        "sampled_samples": world.sampled,
        "video_frames": world.video_frames,
        "training_metrics": pd.DataFrame([step, {**step, "step": 2, "loss": 1.5}]),
        "train_result": {
            "steps": 2,
            "tokens": 1000,
            "supervised_tokens": 20,
            "train_time_s": 3.0,
            "tokens_per_second": 333.3,
            "final_loss": 1.5,
            "world_size": 2,
            "device": "cpu",
            "plan_fingerprint": "f1nger",
            "base_model": base_model_digest(world.model_folder),
            "git_commit": "c0mmit",
            "mlflow_run_id": "r0n",
        },
        "plan_summary": {
            "steps": 2,
            "packs": 4,
            "samples": 8,
            "tokens": 1000,
            "supervised_tokens": 20,
            "fill": 0.9,
            "epochs": 1,
            "packing_length": 256,
            "fingerprint": "f1nger",
            "overlong": [],
        },
        "validation_report": {
            "counts": {"ingested": 12, "valid": 10, "quarantined": 1, "rejected": 1},
            "rules": {"missing_media": 1, "not_json": 1},
        },
        "params:model": MODEL,
        "params:evaluate": EvaluateConfig(
            batch_size=2, max_new_tokens=4, report_title="tiny & <new>", dataset="digits"
        ),
    }


def test_more_processes_than_gpus_are_refused(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    asked = inputs | {"params:evaluate": EvaluateConfig(nproc_per_node=2)}
    with pytest.raises(UserError, match=r"^evaluate.nproc_per_node is 2, but this node has 1 GPU and each"):
        generate(*(asked[name] for name in create_pipeline().nodes[0].inputs))


def test_a_base_model_that_was_replaced_since_is_not_compared_with(inputs: dict[str, Any]) -> None:
    replaced = inputs | {"train_result": inputs["train_result"] | {"base_model": "sha:of another"}}
    with pytest.raises(UserError, match=r"replaced since the model was trained .*--pipelines train.*compare_base"):
        generate(*(replaced[name] for name in create_pipeline().nodes[0].inputs))


def test_both_models_are_scored_and_reported(inputs: dict[str, Any]) -> None:
    predictions, metrics, slices = generate(*(inputs[name] for name in create_pipeline().nodes[0].inputs))
    assert predictions["expected"].tolist() == list(ANSWERS[:3])
    assert predictions["trained_answer"].tolist()[:2] == list(ANSWERS[:2])
    assert metrics["trained"]["text"].items() >= {"exact_match": 1.0, "n": 1}.items()
    assert metrics["trained"]["text"]["loss"] < 0.5 < metrics["base"]["text"]["loss"]
    assert slices["trained"]["source"]["made"] == metrics["trained"]["overall"]
    assert metrics["trained"]["overall"]["n"] == metrics["base"]["overall"]["n"] == 3
    assert metrics["trained"]["overall"]["exact_match"] > metrics["base"]["overall"]["exact_match"]
    assert json.loads(json.dumps(metrics)) == metrics


def test_a_kept_checkpoint_is_evaluated_instead(inputs: dict[str, Any]) -> None:
    def scores(**chosen: Any) -> dict[str, float]:
        given = inputs | {"params:evaluate": inputs["params:evaluate"].model_copy(update=chosen)}
        metrics = generate(*(given[name] for name in create_pipeline().nodes[0].inputs))[1]["trained"]
        return {kind: metrics[kind]["loss"] for kind in KINDS}

    trained = scores()
    early, late = scores(checkpoint="step-1"), scores(checkpoint="step-20")
    assert late == trained
    assert early["video"] < trained["video"]
    assert early["text"] > trained["text"]
    both = scores(average=["step-1", "step-20"])
    assert trained["text"] < both["text"] < early["text"]
    assert scores(average=["step-20", "step-1"]) == both
    with pytest.raises(UserError, match=r"evaluate.checkpoint: there is no checkpoint 'step-2': .*step-20"):
        scores(checkpoint="step-2")


def test_an_average_is_the_mean_of_the_weights(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        weights = {"w": torch.full((2,), value, dtype=torch.bfloat16), "v": torch.tensor([value * 3])}
        save_file(weights, tmp_path / name / "model.safetensors")
    mean = load_file(averaged([tmp_path / "a", tmp_path / "b"], tmp_path / "mean") / "model.safetensors")
    assert (mean["w"].tolist(), mean["w"].dtype, mean["v"].tolist()) == ([1.5, 1.5], torch.bfloat16, [4.5])
    (tmp_path / "b" / "adapter").mkdir()
    with pytest.raises(UserError, match=r"evaluate.average: b is an adapter, .*'merged'"):
        averaged([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")


def test_the_pipeline_runs_on_the_entries_of_the_catalog(inputs: dict[str, Any]) -> None:
    pipeline = create_pipeline()
    entries = set(yaml.safe_load(CATALOG.read_text()))
    named = {name for name in pipeline.datasets() if not name.startswith("params:")}
    assert named <= entries
    assert pipeline.inputs() == set(inputs)
    made = {"predictions", "metrics", "evaluation_slices", "lmms_eval_results", "report", "samples_page", "model_card"}
    assert pipeline.all_outputs() == made


def test_the_report_of_a_run_shows_its_facts(inputs: dict[str, Any]) -> None:
    catalog = DataCatalog({name: MemoryDataset(value, copy_mode="assign") for name, value in inputs.items()})
    report = SequentialRunner().run(create_pipeline().to_outputs("report"), catalog)["report"].load()
    assert "tiny &amp; &lt;new&gt;" in report
    for fact in ("c0mmit", "f1nger", "r0n", "missing_media", "single_image", "[video] Which digit came second?"):
        assert fact in report
    assert 'href="../digits/validation.html"' in report
    assert report.count("<img") == 1 + 4  # the image, and four frames of the clip
    assert 'href="samples/index.html"' in report


def test_the_samples_of_a_run_can_be_browsed(inputs: dict[str, Any], tmp_path: Path) -> None:
    def samples(**evaluate: Any) -> Callable[[Path], None]:
        given = inputs | {"params:evaluate": inputs["params:evaluate"].model_copy(update=evaluate)}
        catalog = DataCatalog({name: MemoryDataset(value, copy_mode="assign") for name, value in given.items()})
        return SequentialRunner().run(create_pipeline().to_outputs("samples_page"), catalog)["samples_page"].load()

    samples()(tmp_path / "samples")
    assert "tiny &amp; &lt;new&gt;" in (tmp_path / "samples" / "index.html").read_text()
    part = (tmp_path / "samples" / "part-00000.js").read_text()
    assert part.count("<article") == 3
    assert part.count("<img") == 1 + 4


def test_the_scores_go_into_a_card_and_the_trained_model_stays_as_it_is(tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "README.md").write_text("# a card\n")
    scores = {"trained": {"overall": {"exact_match": 0.25, "n": 4}}}
    assert complete_card(trained, scores).startswith("# a card\n\n## Scores\n")
    assert "| overall | exact_match | 4 | 0.2500 |" in complete_card(trained, scores)
    assert [(path.name, path.read_text()) for path in trained.iterdir()] == [("README.md", "# a card\n")]


def test_the_base_model_can_be_left_out(inputs: dict[str, Any]) -> None:
    evaluate = inputs["params:evaluate"].model_copy(update={"compare_base": False, "max_samples": 1})
    catalog_inputs = {**inputs, "params:evaluate": evaluate}
    predictions, metrics, _ = generate(*(catalog_inputs[name] for name in create_pipeline().nodes[0].inputs))
    assert set(metrics) == {"trained"}
    assert predictions["base_answer"].isna().all()
    assert len(predictions) == 1


def test_a_model_of_another_plan_is_refused(inputs: dict[str, Any]) -> None:
    given = {**inputs, "plan_summary": inputs["plan_summary"] | {"fingerprint": "0ther"}}
    with pytest.raises(UserError, match=r"another pack plan.*--pipelines train"):
        generate(*(given[name] for name in create_pipeline().nodes[0].inputs))


def test_other_parameters_of_the_model_than_the_tokens_were_made_with_are_refused(inputs: dict[str, Any]) -> None:
    given = {**inputs, "params:model": MODEL.model_copy(update={"image_max_pixels": 3136})}
    with pytest.raises(UserError, match=r"model.image_max_pixels = 1310720, but this run has 3136: run `kedro run"):
        generate(*(given[name] for name in create_pipeline().nodes[0].inputs))


def test_an_empty_eval_split_is_said_before_any_model_is_loaded(inputs: dict[str, Any], tmp_path: Path) -> None:
    write_tokenized(tmp_path / "tokenized.arrow", [])
    given = {**inputs, "tokenized_samples": tmp_path / "tokenized.arrow", "trained_model": tmp_path / "nothing"}
    with pytest.raises(UserError, match="eval split is empty"):
        generate(*(given[name] for name in create_pipeline().nodes[0].inputs))


def test_the_table_of_scores_fits_80_columns() -> None:
    scores = {"relaxed_accuracy": 1.0, "rouge_l": 0.5, "loss": 6.6494, "perplexity": 772.3, "n": 280}
    table = _score_table({model: {"image_and_video": scores} for model in ("base", "trained")})
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    rows = [re.findall(r"[\w.%]+", line) for line in console.file.getvalue().splitlines() if "%" in line]
    assert rows == [
        ["image_and_video", "relaxed_accuracy", "280", "100.0%", "6.649", "100.0%", "6.649"],
        ["image_and_video", "rouge_l", "280", "50.0%", "6.649", "50.0%", "6.649"],
    ]


def test_a_regression_fails_the_pipeline_after_the_report_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = {
        "base": {"video": {"exact_match": 0.5, "loss": 1.0, "perplexity": 2.7, "n": 4}},
        "trained": {"video": {"exact_match": 0.4, "loss": 9.0, "perplexity": 8103.0, "n": 4}},
    }
    table = pd.DataFrame({"kind": "video", "task": "exact_match", "base_score": [0.5] * 4, "trained_score": [0.4] * 4})
    refuse_regressions(metrics, table, "<html>", EvaluateConfig(must_not_regress={"video": 0.2}))
    with pytest.raises(UserError, match=r"exact_match of video.*must_not_regress"):
        refuse_regressions(metrics, table, "<html>", EvaluateConfig(must_not_regress={"video": 0.0}))
    assert "40.0%" in capsys.readouterr().out
    gate = next(node for node in create_pipeline().nodes if node.name == "refuse_regressions")
    assert "report" in gate.inputs
    with pytest.raises(ValidationError, match="set compare_base to true"):
        EvaluateConfig(must_not_regress={"video": 0.0}, compare_base=False)


def test_servers_answer_instead_and_beside(inputs: dict[str, Any]) -> None:
    """One as the trained model, which cannot answer the clip at first, and one more model, over HTTP."""
    fails = [True]

    def says(request: dict[str, Any]) -> str | Fault:
        content = request["messages"][0]["content"]
        if request["model"] == "big" or isinstance(content, str):
            return ANSWERS[0]
        is_clip = len(content) > 2
        return Fault(400) if is_clip and fails[0] else ANSWERS[2 if is_clip else 1]

    with chat_server(says) as server:
        shared = {"url": server.url, "retries": 0, "clips": "images"}
        servers = {
            "trained": {**shared, "model": "tiny", "max_failures": 0.4},
            "big-model": {**shared, "model": "big", "engine": "openai"},
        }
        evaluate = EvaluateConfig(backend="openai", compare_base=False, servers=servers, max_new_tokens=4)
        given = {**inputs, "params:evaluate": evaluate}
        with pytest.raises(UserError, match="'trained' has answered none of the samples of kind 'video'"):
            generate(*(given[name] for name in create_pipeline().nodes[0].inputs))
        kept = inputs["base_model"].parent / "scratch" / "served" / "trained.jsonl"
        assert len(kept.read_text().splitlines()) == 2
        fails[0], asked = False, len(server.bodies)
        predictions, metrics, slices = generate(*(given[name] for name in create_pipeline().nodes[0].inputs))
        assert len(server.bodies) == asked + 1, "the others were kept"
        assert not kept.exists(), "all is answered"
    assert metrics.keys() == {"trained", "big-model"}
    assert metrics["trained"]["overall"] == {"exact_match": 1.0, "n": 3}, "no losses"
    assert metrics["big-model"]["overall"] == {"exact_match": pytest.approx(1 / 3), "n": 3}
    assert predictions["trained_loss"].isna().all()
    assert predictions["trained_failure"].isna().all()
    assert predictions["big-model_answer"].tolist() == [ANSWERS[0]] * 3
    made = {"metrics": metrics, "predictions": predictions, "evaluation_slices": slices, "lmms_eval_results": {}}
    node = next(node for node in create_pipeline().nodes if node.name == "write_report")
    assert ">big-model<" in write_report(*((given | made)[name] for name in node.inputs))
    assert "33.3%" in table_text(_score_table(metrics))


def table_text(table: Any) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()
