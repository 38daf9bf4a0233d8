"""How many processes a node starts."""

from __future__ import annotations

import os

from qvl_pipeline.config import BatchingConfig, TrainConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.training.launcher import Processes


def training_processes(train: TrainConfig, batching: BatchingConfig) -> Processes:
    """Processes of this node: as many as asked for, else one a GPU, else its share of what the declared batch needs.

    Raises:
        UserError: More are asked for than there are GPUs, or it is not known which of several nodes this is.
    """
    nodes = train.launch.nodes()
    given, key = train.nproc_per_node, "train.nproc_per_node"
    if given == "auto" and "PET_NPROC_PER_NODE" in os.environ:
        key = "PET_NPROC_PER_NODE"
        given = os.environ[key]  # Kubeflow may say `auto` or `gpu` too
    without_gpus = batching.data_parallel_size * train.sp_ulysses_degree // nodes.nnodes
    return Processes(processes_per_node(given, key, without_gpus), nodes, train.launch.max_restarts)


def processes_per_node(given: int | str, key: str, without_gpus: int) -> int:
    """Return a number of processes: that which is given, else one a GPU.

    Args:
        given: The number, or a word such as `auto`.
        key: Where it is from, for the message.
        without_gpus: The number where nothing is given and there are no GPUs.

    Raises:
        UserError: More are given than this node has GPUs, of which each takes one; without GPUs they share the CPU.
    """
    import torch

    gpus = torch.cuda.device_count()
    if not str(given).isdigit():
        return gpus or max(1, without_gpus)
    if 0 < gpus < int(given):
        raise UserError(
            f"{key} is {given}, but this node has {gpus} GPU{'s' * (gpus > 1)} and each process takes one: "
            f"choose at most {gpus}, or 'auto'"
        )
    return int(given)
