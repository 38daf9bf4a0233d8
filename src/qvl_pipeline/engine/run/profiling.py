"""Looking into a run: a trace of chosen steps, and where the memory went when it ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

logger = logging.getLogger(__name__)

# Allocations and frees that are remembered; about 100 bytes each.
_MAX_ENTRIES = 100_000
_REMEDIES = (
    "set train.gradient_checkpointing: true, lower batching.packing_length or batching.per_device_train_batch_size "
    "(with more batching.gradient_accumulation_steps), set batching.packing_vit_patches, lower "
    "model.image_max_pixels or sample.video_max_pixels, or raise train.sp_ulysses_degree"
)


@contextmanager
def profiled(window: tuple[int, ...], done: int, output_dir: Path) -> Iterator[Callable[[], None]]:
    """Trace a window of steps with `torch.profiler`; one step before it is a warm-up that is thrown away.

    Steps are those of the whole run. In a resumed run that begins inside the window, what is left of it is traced.

    Args:
        window: First and last step to trace, 1-based; empty traces nothing.
        done: Steps done by earlier legs of the run.
        output_dir: The trace goes to `profile/steps-<first>-<last>.json.gz` in it, in Chrome's trace format.

    Yields:
        A function to be called at the end of every step.
    """
    if not window or done >= window[1]:
        yield lambda: None
        return
    first, last = max(window[0], done + 1), window[1]
    before = first - 1 - done
    warmup = min(1, before)
    path = output_dir / "profile" / f"steps-{first}-{last}.json.gz"

    def write(finished: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(path))
        logger.info("trace of the steps %d to %d: %s", first, last, path)

    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    steps = schedule(wait=before - warmup, warmup=warmup, active=last - first + 1, repeat=1)
    with profile(activities=[ProfilerActivity.CPU, *cuda], schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step


@contextmanager
def out_of_memory_explained(output_dir: Path, rank: int, device: torch.device, *, snapshot: bool) -> Iterator[None]:
    """Say what to do when GPU memory runs out, and leave a snapshot of who holds it.

    Args:
        output_dir: The snapshot goes to `memory/rank<r>.pickle` in it, for https://pytorch.org/memory_viz.
        rank: This rank.
        device: Its device.
        snapshot: Record allocations, which slows training a little, and write the snapshot.

    Raises:
        torch.OutOfMemoryError: Memory ran out, with the remedies in its message.
    """
    records = snapshot and device.type == "cuda"
    if records:
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)
    elif snapshot:
        logger.info("memory_snapshot_on_oom is not used: snapshots are of CUDA memory, and this is %s", device.type)
    try:
        yield
    except torch.OutOfMemoryError as error:
        seen = "set train.memory_snapshot_on_oom: true to see what holds it"
        if records:
            path = output_dir / "memory" / f"rank{rank}.pickle"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            seen = f"what holds it is in {path} (drop it on https://pytorch.org/memory_viz)"
        raise torch.OutOfMemoryError(f"out of GPU memory: {_REMEDIES}; {seen}. {error}") from error
    finally:
        if records:
            torch.cuda.memory._record_memory_history(enabled=None)
