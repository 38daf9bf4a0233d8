"""Bytes a rank holds for weights, gradients, optimizer state and activations, by what is trained and how.

`python -m benchmarks.memory [--tokens 256]`: the tiny Qwen3-VL in bfloat16 on two gloo ranks, with steps of two
micro-batches. Weights and optimizer state are the storages of a rank's shards. Gradients and activations are what
torch's allocator still holds, of what was allocated meanwhile: activations after the forward pass of a micro-batch,
without the parameters that are gathered then; gradients after the first of the two micro-batches. What lives for the
length of one operation, and the layers that are gathered at a time, are not in the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import report
from benchmarks.train_step import make_training, on_ranks
from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.media.arrow_rows import TokenizedSamples

_LORA = {"adapter": {"type": "lora", "r": 4, "alpha": 8.0}}
_QLORA = {"adapter": {**_LORA["adapter"], "quantize_base": "nf4"}}
_VISION = {"model": {"freeze_modules": ("visual",)}}
_REPLICATED = {"parallel": {"frozen_sharding": "replicated"}}


def _recompute(kind: str, every: int = 1) -> dict[str, Any]:
    return {"recompute": {"llm": kind, "vit": kind, "every": every}}


# What each row changes of a full training.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "full, accumulate_sharded": {"parallel": {"accumulate_sharded": True}},
    "full, adamw_8bit": {"optim": {"optim": "adamw_8bit"}},
    "full, adamw_bf16": {"optim": {"optim": "adamw_bf16"}},
    "full, muon": {"optim": {"optim": "muon"}},
    "full, selective": _recompute("selective"),
    "full, recomputed, every 2": _recompute("full", every=2),
    "full, recomputed": _recompute("full"),
    "frozen vision": _VISION,
    "frozen vision, replicated": _VISION | _REPLICATED,
    "lora": _LORA,
    "lora, replicated": _LORA | _REPLICATED,
    "lora, selective": _LORA | _recompute("selective"),
    "lora, recomputed": _LORA | _recompute("full"),
    "qlora": _QLORA,
    "qlora, recomputed": _QLORA | _recompute("full"),
}


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="of a pack")
    rows = {row["training"]: row for row in measure(ROWS, parser.parse_args().tokens)}
    ratios = {
        "lora_over_full": rows["lora"]["bytes"] / rows["full"]["bytes"],
        **{
            f"{kind}_over_kept_activations": rows[f"full, {kind}"]["activations"] / rows["full"]["activations"]
            for kind in ("selective", "recomputed")
        },
    }
    report("memory", list(rows.values()), ratios=ratios, targets={})


def measure(names: Iterable[str], tokens: int) -> list[dict[str, Any]]:
    """Measure some of the rows.

    Args:
        names: Which.
        tokens: Length of a pack.

    Returns:
        For each: `training`, its name; numbers of parameters that are `trained`, `frozen` and `quantized`; and bytes on
        the first rank.
    """
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_training(folder, tokens // 8, seed=0, packing_length=tokens, micro_batches=2)
        spec = TrainSpec.load(path)
        for training in names:
            groups = {"parallel": {}} | ROWS[training]
            groups["parallel"] = {"bf16": True} | groups["parallel"]
            changed = {key: dataclasses.replace(getattr(spec, key), **values) for key, values in groups.items()}
            dataclasses.replace(spec, **changed).save(path)
            held = on_ranks(_measure, path)
            total = sum(held[kind] for kind in ("weights", "gradients", "optimizer", "activations"))
            rows.append({"training": training, **held, "bytes": total})
    return rows


def _measure(path: Path) -> dict[str, int]:
    """Take a step for the optimizer's state and all caches to be there; then look at the next one."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchao's step is compiled, which takes minutes on a CPU
    spec = TrainSpec.load(path)
    trainer = Trainer(spec, StopRequest(), Watchdog(spec.run.ddp_timeout, lambda *_: None))
    model, samples = trainer.model, TokenizedSamples(Path(spec.data.tokenized))
    step = next(iter(trainer.feed.steps_after(0)))
    first, last = (
        trainer.builder.build([samples.row(row) for row in micro_batch.sample_rows], vision=micro_batch.vision)
        for micro_batch in step.micro_batches
    )

    def run(batch: Any, *, is_last: bool) -> torch.Tensor:
        model.set_requires_gradient_sync(is_last or spec.parallel.accumulate_sharded)
        loss = model(batch).sum() / step.supervised_tokens
        _reshard(model)
        return loss

    for _ in range(2):  # in a first step, FSDP2 still makes what it gathers into
        for batch in (first, last):
            run(batch, is_last=batch is last).backward()
        for optimizer in trainer.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    activations, loss = _held_after(lambda: run(first, is_last=False))
    loss.backward()
    gradients = []
    for _ in range(5):  # the least of several: threads of gloo may hold what they exchanged for a moment longer
        run(last, is_last=True).backward()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        gradients.append(_held_after(lambda: run(first, is_last=False).backward())[0])
    state = [
        value for optimizer in trainer.optimizers for values in optimizer.state.values() for value in values.values()
    ]
    parameters = list(model.parameters())
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad and p.is_floating_point()),
        "quantized": sum(layer.quantized.shape.numel() for _, layer in quantized_layers(model)),
        "weights": sum(_bytes(parameter.data) for parameter in parameters),
        "gradients": min(gradients),
        "optimizer": sum(_bytes(value) for value in state if value.ndim),
        "activations": activations,
    }


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _held_after(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that were allocated while something ran and are held still, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of this rank's part of a tensor, which may be made of several (torchao's 8-bit state)."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()


if __name__ == "__main__":
    main()
