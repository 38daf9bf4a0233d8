"""`result.json`, with which a training is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qvl_pipeline.engine.feed.steps import PlannedFeed
from qvl_pipeline.engine.feed.stream import StreamedFeed
from qvl_pipeline.engine.run.metrics import read_rows
from qvl_pipeline.storage.whole import write_whole


def write_result(
    output_dir: Path,
    feed: PlannedFeed | StreamedFeed,
    device: torch.device,
    *,
    resumed_from: int,
    exported_step: int,
    kept: dict[str, list[str]],
    facts: dict[str, Any],
) -> None:
    """Write the result of a run.

    Args:
        output_dir: Its folder.
        feed: Its steps.
        device: The device of this rank.
        resumed_from: Steps that were done before.
        exported_step: Step whose weights were exported.
        kept: Models of other steps, and why they are kept.
        facts: What else there is to know.
    """
    skipped = read_rows(output_dir / "skipped.jsonl")
    result = {
        "steps": feed.max_steps,
        "resumed_from_step": resumed_from,
        "tokens": feed.tokens,
        "supervised_tokens": feed.supervised_tokens,
        "skipped_samples": sum(row.get("split") != "eval" for row in skipped),
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "exported_step": exported_step,
        "kept_checkpoints": kept,
        **facts,
    }
    write_whole(output_dir / "result.json", json.dumps(result, indent=2) + "\n")
