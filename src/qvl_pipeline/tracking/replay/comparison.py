"""What a recorded run and its repetition have to have in common: data, every number of every step, weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from qvl_pipeline.tracking.replay.repeatable import numbers_of

# One compared thing: `metric`, `step`, `recorded`, `replayed`.
Row = dict[str, Any]

# How fast it went, with how much memory, and which rank was the slowest: no property of what was computed.
MEASURED = re.compile(r"^system/|per_second|_s$|tflops|mfu|slowest|fastest|wait|memory")
FINGERPRINTS = ("data_fingerprint", "plan_fingerprint")
TRAINING = "train/"


def is_same(row: Row) -> bool:
    """Return whether both runs have the same bits."""
    one, other = row["recorded"], row["replayed"]
    both_nan = all(isinstance(value, float) and math.isnan(value) for value in (one, other))
    return one == other or both_nan


def compare_data(recorded_id: str, new_id: str, inputs: Container[str]) -> list[Row]:
    """Compare the fingerprints that both runs have, and the digests of what they read."""
    recorded, new = (
        {name: run.data.tags[name] for name in FINGERPRINTS if name in run.data.tags}
        | {used.dataset.name: used.dataset.digest for used in run.inputs.dataset_inputs if used.dataset.name in inputs}
        for run in map(mlflow.MlflowClient().get_run, (recorded_id, new_id))
    )
    return [_row(name, None, recorded[name], new[name]) for name in recorded if name in new]


def compare_numbers(recorded_id: str, new_id: str, *, scores: bool) -> list[Row]:
    """Compare every metric at every step, but for times, rates and memory.

    Args:
        recorded_id: The recorded run.
        new_id: Its repetition.
        scores: Whether to compare the scores of an evaluation too.
    """
    recorded, new = (
        {
            (name, step): value
            for (name, step), value in numbers_of(run_id).items()
            if not MEASURED.search(name) and (scores or name.startswith(TRAINING))
        }
        for run_id in (recorded_id, new_id)
    )
    # Training first, in the order of its steps: the first difference is then where the runs part.
    keys = sorted(recorded.keys() | new.keys(), key=lambda key: (not key[0].startswith(TRAINING), key[1], key[0]))
    return [_row(*key, recorded.get(key), new.get(key)) for key in keys]


def compare_weights(recorded_id: str, new_id: str) -> list[Row]:
    """Compare the digests of the trained weights, where the recorded run has one."""
    recorded, new = (_model_digest(run_id) for run_id in (recorded_id, new_id))
    return [_row("weights", None, recorded, new)] if recorded else []


def _row(metric: str, step: int | None, recorded: Any, replayed: Any) -> Row:
    return {"metric": metric, "step": step, "recorded": recorded, "replayed": replayed}


def _model_digest(run_id: str) -> str | None:
    uri = mlflow.MlflowClient().get_run(run_id).info.artifact_uri
    try:
        pointer = json.loads(mlflow.artifacts.load_text(f"{uri}/model/pointer.json"))
        return pointer.get("weights", pointer["digest"])
    except (MlflowException, OSError):
        return None
