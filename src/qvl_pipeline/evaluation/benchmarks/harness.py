"""lmms-eval, where it is installed, run on a model as it is exported, and what it measured."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_pipeline.errors import UserError
from qvl_pipeline.orphans import end_with_parent

_PACKAGE = "lmms_eval"
# What lmms-eval calls the models of a family.
_MODELS = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "qwen2_5_omni": "qwen2_5_omni",
}
_LOG_LINES = 3  # of its log, in the message that it failed
# What its table of results says of a task that is no score.
_NOT_SCORES = ("alias", "samples")


def check_lmms_eval(tasks: Sequence[str]) -> None:
    """Refuse tasks of lmms-eval where it is not installed.

    Raises:
        UserError: It is not.
    """
    if tasks and importlib.util.find_spec(_PACKAGE) is None:
        raise UserError(
            f"evaluate.lmms_eval asks for {', '.join(tasks)}, and the package lmms_eval is not installed here: install "
            "it (`uv pip install lmms-eval`), or leave evaluate.lmms_eval out"
        )


def run_lmms_eval(
    model: str, family: str, tasks: Sequence[str], arguments: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, float]]:
    """Let lmms-eval measure a model.

    Args:
        model: Folder or hub id.
        family: Name of its family.
        tasks: Tasks of lmms-eval.
        arguments: Arguments of lmms-eval's model, such as `max_num_frames`.
        folder: Where it works; emptied before. Its output is in `lmms_eval.log`.

    Returns:
        By task, or group of tasks, `{metric: score, metric_stderr: its standard error, "n": samples}`, as it gave them.

    Raises:
        UserError: It is not installed, failed, or wrote no results; or the model's path cannot be handed to it.
    """
    check_lmms_eval(tasks)
    if {",", "="} & set(model):
        raise UserError(f"evaluate.lmms_eval: lmms-eval takes no path with ',' or '=', and the model is '{model}'")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / f"{_PACKAGE}.log"
    given = ",".join(f"{key}={value}" for key, value in {"pretrained": model, **arguments}.items())
    # Unbuffered, so that the log has what happened last at its end.
    command = [sys.executable, "-u", "-m", _PACKAGE, "--model", _MODELS[family], "--model_args", given]
    command += ["--tasks", ",".join(tasks), "--batch_size", "1", "--output_path", str(folder)]
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, preexec_fn=end_with_parent)
    files = sorted(folder.rglob("*results.json"))
    if done.returncode or not files:
        last = " / ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LOG_LINES:])
        raise UserError(
            f"evaluate.lmms_eval: lmms-eval ended with status {done.returncode} and {len(files) or 'no'} results for "
            f"{', '.join(tasks)} ({last}); its log is {log}"
        )
    return _read(json.loads(files[-1].read_text(encoding="utf-8")))


def _read(written: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Read `results` {task: {"metric,filter": score}} and `n-samples` {task: {"effective": count}}.

    A metric of another filter than `none` is `metric/filter`. What is no number, such as an error that was not
    estimated, is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for task, values in written["results"].items():
        scores = {}
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric in _NOT_SCORES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = "_stderr" if metric.endswith("_stderr") else ""
            name = metric.removesuffix(error)
            scores[(name if filtered in ("", "none") else f"{name}/{filtered}") + error] = float(value)
        counted = written.get("n-samples", {}).get(task, {}).get("effective")
        found[task] = scores | ({} if counted is None else {"n": counted})
    return found
