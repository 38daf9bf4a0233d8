"""The spec of a training that nothing is prepared for yet, for questions whose answer should not wait for the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvl_pipeline.config import AdapterConfig, BatchingConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.data.base_model import write_manifest
from qvl_pipeline.training.spec import Inputs, make_spec

if TYPE_CHECKING:
    from qvl_pipeline.engine.spec import TrainSpec


def write_base_ahead(folder: Path, model: ModelConfig) -> None:
    """Write what the stage `tokenize` will write of the base model, of a tiny one its configuration only."""
    write_manifest(folder, model)
    if model.load_from_pretrained_path is None:
        from qvl_pipeline.demo.tiny_model import write_tiny_config

        write_tiny_config(folder, model.processor_type)


def spec_ahead(
    base_model: Path,
    video_frames: Path,
    steps: int,
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    output_dir: Path,
) -> TrainSpec:
    """Make the spec of a training of which only the base model need be there.

    Args:
        base_model: Folder with `manifest.json`.
        video_frames: Folder of the frame store.
        steps: How many steps there will be; 0 where only the plan will tell.
        sample: Parameters of sampling.
        model: Parameters of the model.
        batching: Parameters of the plan.
        train: Parameters of training.
        adapter: Parameters of the adapter.
        output_dir: Folder that the engine would work in.

    Raises:
        UserError: Two blocks say different things.
    """
    nowhere = base_model / "not made yet"
    summary = {"steps": steps, "epochs": None, "samples_per_epoch": 0.0}
    return make_spec(
        Inputs(base_model, nowhere, nowhere, video_frames, summary),
        sample=sample,
        model=model,
        batching=batching,
        weights={},
        train=train,
        output_dir=output_dir,
        identity={},
        resume_from="",
        adapter=adapter,
    )
