"""Trainings in an MLflow database, as `kedro run` records them, without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

from qvl_pipeline.tracking.mlflow.chain import EVALUATES

EXPERIMENT = "qvl_pipeline"
# As in tracking/mlflow/run.py.
OF_TRAININGS = {"mlflow.experimentKind": "custom_model_development"}
STEPS = 40


def predictions(right: dict[str, list[bool]], answer: str = "7") -> pd.DataFrame:
    """Return predictions with an exact match where `right` says so, by kind; wrong answers are `answer`."""
    rows = [
        {
            "sample_id": f"digits/{kind}/{index}",
            "source": "digits",
            "kind": kind,
            "task": "exact_match",
            "question": f"[{kind}] Which digit is number {index}?",
            "expected": str(index % 7),
            "base_answer": "",
            "trained_answer": str(index % 7) if is_right else answer,
            "base_score": 0.0,
            "trained_score": float(is_right),
        }
        for kind, samples in right.items()
        for index, is_right in enumerate(samples)
    ]
    return pd.DataFrame(rows)


class Recorder:
    """Writes runs into one database."""

    def __init__(self, folder: Path, empty_database: Path) -> None:
        self.uri = f"sqlite:///{shutil.copy(empty_database, folder)}"
        self.client = MlflowClient(self.uri)
        self.folder = folder
        self._experiment = self.client.create_experiment(
            EXPERIMENT, (folder / "mlartifacts").as_uri(), tags=OF_TRAININGS
        )

    def training(
        self,
        profile: str,
        learning_rate: float = 2e-3,
        answers: pd.DataFrame | None = None,
        *,
        final_loss: float = 0.2,
        status: str = "FINISHED",
        tags: dict[str, str] | None = None,
        pipelines: str = "__default__",
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Record a training, with an evaluation if there are answers; return its id."""
        run = self._start(profile, {"profile": profile, "pipelines": pipelines, **(tags or {})})
        blocks = {"train": {"learning_rate": learning_rate, "seed": 42, "freeze_modules": []}, **(parameters or {})}
        self._yaml(run, blocks)
        flat = [
            Param(f"{name}.{key}", json.dumps(value)) for name, block in blocks.items() for key, value in block.items()
        ]
        self.client.log_batch(run, params=flat)
        losses = final_loss + 4 * np.exp(-np.arange(STEPS) / 8)
        curves = {
            "train/loss": losses,
            "train/tokens_per_second": np.r_[10.0, np.full(STEPS - 1, 1000 * final_loss)],
            "train/peak_memory_gib": np.linspace(1, 2, STEPS),
            "train/mfu": np.full(STEPS, 0.4),
        }
        metrics = [
            Metric(key, value, 0, 5 * (i + 1)) for key, values in curves.items() for i, value in enumerate(values)
        ]
        metrics += [Metric("train/eval_loss", losses[i - 1] + 0.1, 0, 5 * i) for i in (10, 20, 40)]
        self.client.log_batch(run, metrics=metrics)
        data = Dataset("pack_plan", f"sha:{profile}", "local", "{}")
        self.client.log_inputs(run, [DatasetInput(data)])
        self._json(run, "train_result.json", {"steps": 200, "train_time_s": 61.5, "device": "cpu", "world_size": 2})
        if answers is not None:
            self.answers(run, answers)
        self.client.set_terminated(run, status)
        return run

    def evaluation(self, training: str, answers: pd.DataFrame, max_new_tokens: int = 8) -> str:
        """Record a later evaluation of a training; return its id."""
        profile = self.client.get_run(training).data.tags["profile"]
        run = self._start(profile, {"profile": profile, "pipelines": "evaluate", EVALUATES: training})
        self._yaml(run, {"evaluate": {"max_new_tokens": max_new_tokens}})
        self.answers(run, answers)
        self.client.set_terminated(run)
        return run

    def runs(self) -> list[str]:
        """Return the ids of all runs."""
        return [run.info.run_id for run in self.client.search_runs([self._experiment])]

    def answers(self, run: str, answers: pd.DataFrame) -> None:
        """Log a table of predictions."""
        path = self.folder / "predictions.parquet"
        answers.to_parquet(path)
        self.client.log_artifact(run, str(path))

    def _start(self, name: str, tags: dict[str, str]) -> str:
        run = self.client.create_run(self._experiment, run_name=name).info.run_id
        self.client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
        return run

    def _json(self, run: str, name: str, values: dict[str, Any]) -> None:
        self.client.log_text(run, json.dumps(values), name)

    def _yaml(self, run: str, values: dict[str, Any]) -> None:
        self.client.log_text(run, yaml.safe_dump(values), "parameters.yml")
