"""The heaviest micro-batches, tried before the first step: whether they fit, and how much memory they take.

A step on them is taken for real, because memory is highest in its backward pass or when the optimizer's state is made.
Afterwards everything is as before, bit for bit: weights, optimizer, generators.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.feed.steps import MicroBatch
from qvl_pipeline.engine.run.checkpoints import RandomState

logger = logging.getLogger(__name__)

# A measured peak further from the estimate than this is said.
_ERROR = 0.1


@dataclass(frozen=True)
class WorstCase:
    """What to try.

    Attributes:
        micro_batches: The heaviest ones, this rank's part of each.
        accumulates: A step of the run has several micro-batches.
        load: From a micro-batch to its batch, on the host.
        expected_bytes: Peak that was foretold; 0 where nothing was.
    """

    micro_batches: Sequence[MicroBatch]
    accumulates: bool
    load: Callable[[MicroBatch], Batch]
    expected_bytes: int


def try_worst_case(
    case: WorstCase,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    accumulate_sharded: bool,
) -> dict[str, Any]:
    """Take a step on each of the heaviest micro-batches and undo it; called by all ranks.

    Args:
        case: What to try.
        model: The sharded model.
        optimizers: Its optimizers, which have no state yet.
        device: This rank's device.
        accumulate_sharded: Gradients are exchanged after every micro-batch.

    Returns:
        Facts for `result.json`: the peak that was measured and the one that was foretold, of the rank with the highest,
        and the ratio of the two.
    """
    highest = 0
    with _undone(model, optimizers, device):
        # The first step makes the optimizer's state, which is there in all others.
        for micro_batch in [case.micro_batches[0], *case.micro_batches]:
            with _peak_bytes(model, optimizers, device) as peak:
                _step(case, micro_batch, model, optimizers, device, accumulate_sharded)
            highest = max(highest, peak())
    everyone = torch.tensor([highest], dtype=torch.int64, device=device)
    dist.all_reduce(everyone, dist.ReduceOp.MAX)
    measured, expected = int(everyone), case.expected_bytes
    ratio = measured / expected if expected else None
    if ratio is not None and abs(ratio - 1) > _ERROR:
        logger.warning("the heaviest pack takes %.2f times the memory that the preflight foretold", ratio)
    return {"measured_bytes": measured, "expected_bytes": expected or None, "ratio": ratio}


def _step(
    case: WorstCase,
    micro_batch: MicroBatch,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    accumulate_sharded: bool,
) -> None:
    times = 2 if case.accumulates else 1
    for number in range(1, times + 1):
        batch = case.load(micro_batch).to(device)
        model.set_requires_gradient_sync(number == times or accumulate_sharded)
        (model(batch).sum() / max(1, len(batch.targets))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _undone(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> Iterator[None]:
    """Bring back weights and generators, and forget the optimizer's state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [_local(parameter).detach().to("cpu", copy=True) for parameter in trained]
    random = RandomState(device)
    generators = random.state_dict()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(trained, kept, strict=True):
                _local(parameter).copy_(values)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
        random.load_state_dict(generators)


@contextlib.contextmanager
def _peak_bytes(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: torch.device
) -> Iterator[Callable[[], int]]:
    """Measure the most bytes of tensors inside: on CUDA by its allocator, on a CPU by torch's profiler."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    held = sum(_local(parameter).nbytes for parameter in model.parameters())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    held += sum(_local(value).nbytes for state in states for value in state.values() if torch.is_tensor(value))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield lambda: held + _most_allocated(profiled)


def _most_allocated(profiled: torch.profiler.profile) -> int:
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
