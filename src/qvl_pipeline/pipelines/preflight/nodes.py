"""The node of the pipeline `preflight`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvl_pipeline.config import AdapterConfig, BatchingConfig, ModelConfig, PreflightConfig, SampleConfig, TrainConfig


def preflight_of_profile(
    model_input: Path,
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    preflight: PreflightConfig,
) -> tuple[str, dict[str, Any]]:
    """Say what the training of a profile needs: from its pack plan if there is one, else from its parameters.

    Args:
        model_input: Folder of the profile's plan, which need not be there.
        sample: Parameters of sampling.
        model: Parameters of the model.
        batching: Parameters of the packs.
        train: Parameters of training.
        adapter: Parameters of the adapter.
        preflight: On what it is to run.

    Returns:
        The page, and the report.

    Raises:
        UserError: Says what is wrong and what to do.
    """
    from qvl_pipeline.preflight.asking import ask, plan_of, recorded_trainings
    from qvl_pipeline.reports.preflight_page import render_preflight

    data, name = model_input.parent.parent, model_input.name
    reports = data / "08_reporting"
    plan = plan_of(model_input, reports / name / "plan_summary.json", batching)
    blocks = sample, model, batching, train, adapter, preflight
    report = ask(plan, *blocks, data / "06_models" / name / "base", recorded_trainings(reports, name))
    print(f"preflight: {report['sentence']}", flush=True)
    return render_preflight(name, report), report
