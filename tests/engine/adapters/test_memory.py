"""Bytes a rank holds for weights, gradients and optimizer state, by what is trained, as torch accounts for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.start import set_initial_values
from qvl_pipeline.engine.optim.optimization import make_optimizers
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.model.test_weights import load_sharded
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training


def local_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of this rank's shards."""
    return sum(tensor.to_local().untyped_storage().nbytes() for tensor in tensors)


def measure(spec: TrainSpec, folder: Path) -> None:
    """Take a step and write what is held after it."""
    model = load_sharded(spec)
    if spec.adapter.used:
        set_initial_values(model, spec.adapter, spec.model.path, 0)
    (optimizer,) = make_optimizers(model, spec.optim)
    parameters = list(model.parameters())
    quantized = [layer.quantized for _, layer in quantized_layers(model)]
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    held = {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad and p.is_floating_point()),
        "quantized": sum(matrix.shape.numel() for matrix in quantized),
        "weights": local_bytes([p.data for p in parameters]),
        "gradients": local_bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": local_bytes(state),
    }
    if torch.distributed.get_rank() == 0:
        (folder / "held.json").write_text(json.dumps(held))


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"model": {"freeze_modules": ("visual",)}},
        {"adapter": {"type": "lora", "r": 8}},
        {"adapter": {"type": "lora", "r": 8, "quantize_base": "nf4"}},
        {"adapter": {"type": "lora", "r": 8, "quantize_base": "nf4", "double_quant": False}},
    ],
    ids=["full", "frozen vision", "lora", "qlora", "qlora, float32 scales"],
)
def test_trained_weights_are_sixteen_bytes_a_parameter_frozen_ones_two_and_quantised_ones_half_a_byte(
    groups: dict, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text",))
    training = changed(base, tmp_path / "run", parallel={"bf16": True}, **groups)
    run_ranks(measure, 2, training, tmp_path, log_dir=tmp_path / "logs")
    held = json.loads((tmp_path / "held.json").read_text())
    trained, frozen, quantized = held["trained"] / 2, held["frozen"] / 2, held["quantized"] / 2
    assert bool(quantized) == training.adapter.quantizes
    # Four bits a number, and of each 64 one byte and of each 16,384 four more, or of each 64 four bytes.
    each = 1 / 2 + 1 / 64 + 4 / 16384 if training.adapter.double_quant else 1 / 2 + 4 / 64
    # Shards are filled up to equal sizes, which tells for so small a model.
    assert held["weights"] == pytest.approx(4 * trained + 2 * frozen + each * quantized, rel=0.01)
    assert held["gradients"] == pytest.approx(4 * trained, rel=0.01)
    assert held["optimizer"] == pytest.approx(8 * trained, rel=0.01)
