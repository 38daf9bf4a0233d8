"""Samples that are read, tokenised and packed while they are trained on, as `kedro run` does it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.dvc_repository import command

PARAMETERS = {
    "batching.dataset_type": "vision_iterable",
    "batching.num_train_epochs": 1,  # the profile has another number, which a stream does not
    "batching.max_steps": "3",
    "batching.packing_length": "256",
    "batching.shuffle_buffer_size": "8",
    "batching.data_parallel_size": "2",
    "train.dataloader_num_workers": "1",
    "train.eval_strategy": "steps",
    "train.eval_steps": "2",
}


def test_an_iterable_dataset_type_trains_without_a_plan(trained: Path) -> None:
    before = load_file(trained / "data/06_models/tiny_qwen3_vl/trained/model.safetensors")
    parameters = ",".join(f"{key}={value}" for key, value in PARAMETERS.items())
    command(trained, f"kedro run --pipelines tokenize,train --params {parameters}")

    inputs, reports = trained / "data/05_model_input/tiny_qwen3_vl", trained / "data/08_reporting/tiny_qwen3_vl"
    assert len(pd.read_parquet(inputs / "pack_plan.parquet")) == 0

    rows = pd.read_csv(reports / "training_metrics.csv")
    assert rows["step"].tolist() == [1, 2, 3]
    assert (rows["tokens"] > 0.9 * 2 * 256).all()
    assert (rows["tokens"] <= 2 * 256).all()
    assert rows["epoch"].iloc[-1] > 1  # of 28 samples
    assert rows["eval_loss"].notna().tolist() == [False, True, True]
    result = json.loads((reports / "train_result.json").read_text())
    assert (result["steps"], result["world_size"]) == (3, 2)
    assert result["tokens"] == rows["tokens"].sum()
    assert result["final_loss"] == pytest.approx(rows["loss"].iloc[-1])
    after = load_file(trained / "data/06_models/tiny_qwen3_vl/trained/model.safetensors")
    assert not any(torch.equal(after[name], weight) for name, weight in before.items())
