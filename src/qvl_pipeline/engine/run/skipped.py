"""Samples that were left out because they or their media failed: counted, named, and taken out of the loss."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qvl_pipeline.engine.feed.batch import BadSample


class SkippedSamples:
    """What all ranks left out. Ranks exchange it where metrics are logged, and only where skipping is allowed.

    Attributes:
        tokens: Supervised tokens that this rank left out of the step so far.
    """

    def __init__(self, path: Path, *, allowed: bool, streamed: bool = False) -> None:
        """Start with nothing skipped.

        Args:
            path: The file `skipped.jsonl`, written by rank 0.
            allowed: Samples may be skipped whose media fail.
            streamed: Samples are left out as they are read, before their tokens count.
        """
        self._path, self._allowed, self._reports = path, allowed, allowed or streamed
        self._found: list[dict[str, Any]] = []
        self.tokens = 0

    def add(self, step: int, skipped: Iterable[BadSample], *, split: str = "train") -> None:
        """Note what was left out of a micro-batch, of training or of the evaluation (`eval`) after a step."""
        for bad in skipped:
            self.tokens += bad.supervised_tokens if split == "train" else 0
            self._found.append({"step": step, "sample_id": bad.sample_id, "split": split, "reason": bad.reason})

    def correct_gradients(self, parameters: Iterable[nn.Parameter], supervised_tokens: int) -> None:
        """Divide the gradients of a step by the tokens that were really trained on; called by all ranks.

        They were divided by the tokens of the plan, because a micro-batch is trained on before the next one is loaded.
        The correction is computed on the device, so that nobody waits for it.

        Args:
            parameters: Parameters with the gradients of the whole step.
            supervised_tokens: Tokens over all ranks, by the plan.
        """
        if not self._allowed:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
        # A fill, not a copy from the host, which would wait for the device.
        missing = torch.full((), float(self.tokens), device=local[0].device)
        dist.all_reduce(missing)
        scale = supervised_tokens / (supervised_tokens - missing).clamp(min=1)
        torch._foreach_mul_(local, scale)
        self.tokens = 0

    def report(self) -> int:
        """Write down what was skipped since the last call, on any rank, and count it; called by all ranks."""
        if not self._reports:
            return 0
        gathered: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, self._found)
        self._found = []
        # Ranks that share a pack have found the same.
        rows = list({(row["step"], row["sample_id"]): row for found in gathered for row in found}.values())
        if rows and dist.get_rank() == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["step"]))
        return len(rows)
