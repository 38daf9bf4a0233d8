"""From the parameters of a profile to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qvl_pipeline.config import AdapterConfig, BatchingConfig, ModelConfig, PreflightConfig, SampleConfig, TrainConfig
from qvl_pipeline.data.base_model import write_manifest
from qvl_pipeline.preflight.verdict import Plan, look_ahead
from qvl_pipeline.training.processes import training_processes
from qvl_pipeline.training.spec import Inputs, make_spec


def ask(
    plan: Plan,
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    preflight: PreflightConfig,
    scratch: Path,
    recorded: Sequence[Path],
) -> dict[str, Any]:
    """Answer what the training of a profile needs; reads no weights, and of a published model nothing at all.

    Args:
        plan: Its plan, if there is one.
        sample: Parameters of sampling.
        model: Parameters of the model.
        batching: Parameters of the packs.
        train: Parameters of training.
        adapter: Parameters of the adapter.
        preflight: On what it is to run.
        scratch: Folder in which it would work.
        recorded: Files `train_result.json` of earlier trainings, those to be preferred first.

    Returns:
        The entry `preflight_report`.

    Raises:
        UserError: Says what is wrong and what to do.
    """
    processes = training_processes(train, batching)
    with TemporaryDirectory() as temporary:
        base_model, nowhere = Path(temporary), Path(temporary) / "not made yet"
        write_manifest(base_model, model)
        if model.load_from_pretrained_path is None:
            from qvl_pipeline.demo.tiny_model import write_tiny_config

            write_tiny_config(base_model, model.processor_type)
        steps = int(plan.packs["step"].iloc[-1]) + 1 if plan.there else max(0, batching.max_steps)
        summary = {"steps": steps, "epochs": None, "samples_per_epoch": 0.0}
        spec = make_spec(
            Inputs(base_model, nowhere, nowhere, plan.frames, summary),
            sample=sample,
            model=model,
            batching=batching,
            weights={},
            train=train,
            output_dir=scratch,
            identity={},
            resume_from="",
            adapter=adapter,
        )
        ranks = processes.per_node, processes.nodes.nnodes
        automatic = train.gradient_checkpointing == "auto"
        return look_ahead(spec, model, batching, preflight, plan, ranks, recorded, automatic=automatic)
