"""From a run and its heaviest micro-batches to the memory of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qvl_pipeline.engine.model.flops import ModelFlops, flops_of
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.preflight.hardware import GIB, Hardware, kernels_on
from qvl_pipeline.preflight.memory.model import cut, number_of, prepare
from qvl_pipeline.preflight.memory.rank import Peak, Step, optimizer_bytes, peak_of
from qvl_pipeline.preflight.memory.rehearsal import rehearse
from qvl_pipeline.preflight.memory.units import FLOAT32, units_of
from qvl_pipeline.preflight.packs import Heavy, make_batch

# Largest relative error that was measured, on one GPU and on a CPU (docs/preflight.md).
ERROR = 0.10
# What a GPU holds beside tensors: context and libraries of CUDA, and with other ranks the buffers of NCCL.
_CONTEXT, _NCCL = int(0.8 * GIB), int(1.0 * GIB)
# Of what comes and goes, what the caching allocator cannot hand out again, because it lies in pieces.
_FRAGMENTED = 0.04


@dataclass(frozen=True)
class Estimate:
    """Memory of the rank that needs most.

    Attributes:
        peak: Tensors where they are most, by part.
        reserve: Bytes beside tensors.
        heavy: The micro-batch in which that is.
        parameters: Number of the model's parameters.
        trained: Number of those that are trained.
        checkpoint: Bytes of a checkpoint.
        offloaded: Bytes that each rank keeps in the host's memory instead.
        flops: FLOPs of the model by what a batch has.
        config: Configuration of the model.
    """

    peak: Peak
    reserve: int
    heavy: Heavy
    parameters: int
    trained: int
    checkpoint: int
    offloaded: int
    flops: ModelFlops
    config: Any

    @property
    def bytes(self) -> int:
        """All that is needed of a device."""
        return self.peak.bytes + self.reserve

    @property
    def low(self) -> int:
        """The least that it may be."""
        return self.bytes - int(ERROR * self.peak.bytes)

    @property
    def high(self) -> int:
        """The most that it may be."""
        return self.bytes + int(ERROR * self.peak.bytes)


def estimate(
    spec: TrainSpec, config: Any, heaviest: Sequence[Heavy], hardware: Hardware, packs_per_step: int
) -> Estimate:
    """Estimate the memory that a run needs of each rank.

    Args:
        spec: The run.
        config: Configuration of its model.
        heaviest: Its heaviest micro-batches.
        hardware: Where it runs.
        packs_per_step: Packs of an optimizer step over all ranks.

    Raises:
        ValueError: The model has not the parts that are named.
    """
    kernels, _ = kernels_on(hardware, spec)
    family, degree = FAMILIES[spec.model.family], spec.parallel.sp_ulysses_degree
    model = prepare(spec, config, kernels)
    flops, parameters, trained = flops_of(model), number_of(model), number_of(model, trained=True)
    stands_for = cut(model)
    shards = spec.parallel.hsdp_shard_size or hardware.ranks
    units = units_of(model, shards, spec)
    data_ranks = max(1, hardware.ranks // degree)
    micro_batches = -(-packs_per_step // (data_ranks * spec.data.per_device_train_batch_size))
    offloaded = spec.parallel.cpu_offload and hardware.device == "cuda"
    best = None
    for heavy in heaviest:
        batch = make_batch(heavy.samples, config, family, degree=degree, rmpad=spec.data.use_rmpad)
        step = Step(units, stands_for, rehearse(model, batch, hardware.device), micro_batches)
        peak = peak_of(step, spec, offloaded=offloaded)
        if best is None or peak.bytes > best[0].bytes:
            best = peak, heavy, step
    assert best is not None, "a training has packs"
    peak, heavy, step = best
    states = optimizer_bytes(step, spec) + (FLOAT32 * step.total("trained") if spec.optim.ema_decay else 0)
    kept = step.total("weights") + step.total("gradients") + states
    return Estimate(
        peak=peak,
        reserve=_reserve(peak, hardware),
        heavy=heavy,
        parameters=parameters,
        trained=trained,
        checkpoint=shards * (states + step.total("gradients")),
        offloaded=kept if offloaded else 0,
        flops=flops,
        config=config,
    )


def _reserve(peak: Peak, hardware: Hardware) -> int:
    if hardware.device == "cpu":
        return 0
    comes_and_goes = peak.bytes - sum(peak.parts.get(name, 0) for name in ("weights", "optimizer", "average"))
    return _CONTEXT + (_NCCL if hardware.ranks > 1 else 0) + int(_FRAGMENTED * comes_and_goes)
