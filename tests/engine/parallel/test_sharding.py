"""Which layers are gathered ahead, and that gradients travel once a step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.parallel.sharding import _prefetch
from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training


class Layer:
    """Records what it was told to gather ahead."""

    def __init__(self) -> None:
        self.forward: list[Layer] | None = None
        self.backward: list[Layer] | None = None

    def set_modules_to_forward_prefetch(self, layers: list[Layer]) -> None:
        self.forward = layers

    def set_modules_to_backward_prefetch(self, layers: list[Layer]) -> None:
        self.backward = layers


def test_each_layer_gathers_the_next_ones_of_its_direction(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    spec = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text",)).parallel
    a, b, c, d = tower = [Layer() for _ in range(4)]
    _prefetch(tower, dataclasses.replace(spec, forward_prefetch=2))
    assert [layer.forward for layer in tower] == [[b, c], [c, d], [d], []]
    assert all(layer.backward is None for layer in tower)
    _prefetch(tower, dataclasses.replace(spec, backward_prefetch=2))
    assert [layer.backward for layer in tower] == [[], [a], [b, a], [c, b]]


def count_reductions(spec_path: Path, folder: Path) -> int:
    calls = 0
    reduce = _fsdp_param_group.foreach_reduce

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    _fsdp_param_group.foreach_reduce = counting
    status = main(spec_path)
    (folder / "calls.json").write_text(json.dumps(calls))
    return status


@pytest.mark.parametrize("shard_size", [0, 1], ids=["fsdp", "hsdp"])
def test_gradients_are_exchanged_once_a_step(
    shard_size: int, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("image",) * 4, packs_per_step=4)
    spec = changed(base, tmp_path / "run", parallel={"hsdp_shard_size": shard_size})
    (tmp_path / "run").mkdir()
    spec.save(tmp_path / "run" / "train_spec.json")
    run_ranks(count_reductions, 2, tmp_path / "run" / "train_spec.json", tmp_path, log_dir=tmp_path / "logs")
    # Two micro-batches of each rank, one step: three decoder layers, two vision blocks, the rest of the
    # tower and the root exchange once.
    assert json.loads((tmp_path / "calls.json").read_text()) == 7


def note_what_stays_gathered(spec_path: Path, result: Path) -> None:
    spec = TrainSpec.load(spec_path)
    trainer = Trainer(spec, StopRequest(), Watchdog(float("inf"), lambda *_: None))
    losses = trainer.model(trainer.builder.build([TokenizedSamples(Path(spec.data.tokenized)).row(0)], vision=True))
    gathered = [name for name, value in trainer.model.hf.named_parameters() if not isinstance(value, DTensor)]
    losses.sum().backward()
    if dist.get_rank() == 0:
        result.write_text(json.dumps(gathered))


def test_embedding_and_head_stay_gathered_between_forward_and_backward(
    tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("image",) * 2)
    base.save(tmp_path / "train_spec.json")
    args = tmp_path / "train_spec.json", tmp_path / "gathered.json"
    run_ranks(note_what_stays_gathered, 2, *args, log_dir=tmp_path / "logs")
    gathered = json.loads((tmp_path / "gathered.json").read_text())
    assert gathered == ["model.language_model.embed_tokens.weight", "model.language_model.norm.weight"]
