"""Checkpoints that are whole or absent: written aside, then published by one rename."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

_COMPLETE = "COMPLETE"
_NAME = re.compile(r"checkpoint-(\d+)")


def completed(folder: Path) -> list[tuple[int, Path]]:
    """List the complete checkpoints in a folder as `(step, path)`, oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and (path / _COMPLETE).exists())


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    keep: int,
    more: dict[str, Any],
) -> None:
    """Save model, optimizers and `more` state after `step`, then delete all but the `keep` newest checkpoints.

    Called by all ranks. An older checkpoint goes only after the new one is published.
    """
    target, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    leads = dist.get_rank() == 0
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizers)
    dcp.save({"model": model_state, "optimizer": optimizer_state, **more}, checkpoint_id=partial)
    dist.barrier()
    if leads:
        (partial / _COMPLETE).touch()
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for _, path in completed(folder)[:-keep]:
            shutil.rmtree(path)
    dist.barrier()


def load(path: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], more: dict[str, Any]) -> None:
    """Load a checkpoint into a model, its optimizers and the tensors of `more`, sharded over any number of ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizers)
    dcp.load({"model": model_state, "optimizer": optimizer_state, **more}, checkpoint_id=path)
    set_state_dict(model, optimizers, model_state_dict=model_state, optim_state_dict=optimizer_state)
