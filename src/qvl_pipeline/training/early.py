"""What a training would stumble over, asked before the data for it are prepared: hours, maybe, before its launch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from qvl_pipeline.config import AdapterConfig, BatchingConfig, IngestConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.data.base_model import check_family, check_weights
from qvl_pipeline.errors import UserError
from qvl_pipeline.training.ahead import spec_ahead, write_base_ahead
from qvl_pipeline.training.checks import check_before_launch
from qvl_pipeline.training.identity import checkpoint_to_start_from
from qvl_pipeline.training.processes import training_processes

logger = logging.getLogger(__name__)


def check_before_preparing(
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    ingest: IngestConfig,
    scratch: Path,
) -> None:
    """Refuse a training that cannot run, by parameters, base model and machine alone.

    Takes some seconds, most of them to import torch and transformers. Of a base model on the hub, its configuration,
    processor and index of weights are fetched, and no weights.

    Args:
        sample: Parameters of sampling.
        model: Parameters of the model.
        batching: Parameters of the plan.
        train: Parameters of training.
        adapter: Parameters of the adapter.
        ingest: The declared sources.
        scratch: Folder in which trainings of the profile work.

    Raises:
        UserError: Says what is wrong and what to do.
    """
    logger.info("asking first whether this machine can train what is to be prepared; this takes some seconds")
    check_eval_split(train, ingest)
    processes = training_processes(train, batching)
    checkpoint_to_start_from(train, identity={})  # that it is there, and complete
    if batching.packing and batching.group_by_length:
        logger.info("batching.group_by_length has nothing to do: with packing, packs are of equal length")
    with TemporaryDirectory() as temporary:
        base_model = Path(temporary)
        _prepare(base_model, model)
        # What only the plan will tell; of a stream, the number of steps is declared.
        steps = batching.max_steps if batching.max_steps > 0 else None
        blocks = sample, model, batching, train, adapter
        spec = spec_ahead(base_model, base_model / "no frames yet", steps or 0, *blocks, scratch)
        check_before_launch(spec, steps, processes.per_node * processes.nodes.nnodes)


def check_eval_split(train: TrainConfig, ingest: IngestConfig) -> None:
    """Refuse a loss over an eval split that the declared sources cannot have.

    Raises:
        UserError: All of them are for training.
    """
    if train.eval_strategy != "no" and all(source.split in ("train", "benchmark") for source in ingest.datasets):
        raise UserError(
            f"train.eval_strategy is '{train.eval_strategy}', but every source has 'split: train' or is a benchmark: "
            "set it to 'no', or leave the split of a source to its rows or to ingest.eval_fraction"
        )


def check_eval_samples(valid_samples: Path, needed_by: str, splits: Sequence[str] = ("eval",)) -> None:
    """Refuse to go on with samples none of which is of the eval split.

    Args:
        valid_samples: Parquet file of the samples that passed validation.
        needed_by: What needs such samples.
        splits: The splits that will do.

    Raises:
        UserError: There is none.
    """
    import pyarrow.parquet as pq

    found = pq.read_table(valid_samples, columns=["split"])["split"]
    if set(splits).isdisjoint(found.unique().to_pylist()):
        raise UserError(
            f"no valid sample is of the split 'eval', which {needed_by} needs: give a source 'split: eval' or set "
            "ingest.eval_fraction; or set train.eval_strategy to 'no' and leave out 'evaluate' (kedro run --pipelines "
            "sample,tokenize,train)"
        )


def _prepare(folder: Path, model: ModelConfig) -> None:
    write_base_ahead(folder, model)
    if (name := model.load_from_pretrained_path) is None:
        return
    from qvl_pipeline.data.plan.processor import load_processor

    check_family(name, model.processor_type)
    load_processor(folder, model)
    check_weights(name)
