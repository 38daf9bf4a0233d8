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
    import pandas as pd

    from qvl_pipeline.preflight.asking import ask, recorded_trainings
    from qvl_pipeline.preflight.verdict import Plan
    from qvl_pipeline.reports.preflight_page import render_preflight

    packs, tokenized = model_input / "pack_plan.parquet", model_input / "tokenized.arrow"
    there = packs.exists() and tokenized.exists()
    plan = Plan(pd.read_parquet(packs) if there else None, tokenized if there else None, model_input / "video_frames")
    data, name = model_input.parent.parent, model_input.name
    recorded = recorded_trainings(data / "08_reporting", name)
    blocks = sample, model, batching, train, adapter, preflight
    report = ask(plan, *blocks, data / "06_models" / name / "scratch", recorded)
    print(f"preflight: {report['sentence']}", flush=True)
    return render_preflight(name, report), report
