"""Gradients that are accumulated in another type than that of the computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.fsdp import FSDPModule

from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained


@pytest.mark.parametrize(("order", "nproc"), [("tiit", 1), ("ttii", 2), ("iitt", 2)])
def test_media_may_be_in_any_of_several_micro_batches(
    order: str, nproc: int, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    kinds = tuple({"t": "text", "i": "image"}[kind] for kind in order)
    training = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=kinds, packs_per_step=4)
    expected = trained(changed(training, tmp_path / "fp32"), nproc=1)
    rows = trained(changed(training, tmp_path / "bf16", parallel={"bf16": True}), nproc=nproc)
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-2)
    assert rows[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=3e-2)


@pytest.mark.parametrize("adapter", [{"type": "none"}, {"type": "lora"}], ids=lambda adapter: adapter["type"])
@pytest.mark.parametrize("parallel", [{}, {"bf16": True}, {"hsdp_shard_size": 1}], ids=str)
def test_exchanged_after_every_micro_batch_gradients_are_the_same(
    parallel: dict, adapter: dict, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    kinds = ("text", "image", "text", "video")
    training = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=kinds, packs_per_step=4)
    specs = [
        changed(training, tmp_path / str(each), parallel={**parallel, "accumulate_sharded": each}, adapter=adapter)
        for each in (False, True)
    ]
    once, each = (trained(spec, nproc=2) for spec in specs)
    assert each[0]["loss"] == once[0]["loss"]
    assert each[0]["grad_norm"] == pytest.approx(once[0]["grad_norm"], rel=1e-5)


def look_at_whole_gradients(spec: TrainSpec) -> None:
    """After a micro-batch that is not the last, see what is held whole."""
    trainer = Trainer(spec, StopRequest(), Watchdog(60, lambda error, where: None))
    held: list[int] = []

    def bytes_held() -> int:
        params = [
            param
            for module in trainer.model.modules()
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group)
            for param in group.fsdp_params
        ]
        grads = [param.unsharded_accumulated_grad for param in params] + [
            param._unsharded_param.grad for param in params if hasattr(param, "_unsharded_param")
        ]
        return sum(grad.numel() * grad.itemsize for grad in grads if grad is not None)

    flag = trainer.model.set_requires_gradient_sync
    trainer.model.set_requires_gradient_sync = lambda value: (held.append(bytes_held()), flag(value))
    trainer.run()
    numbers = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    # Before its second micro-batch a rank has all gradients of the first, or none but its shards.
    if spec.parallel.accumulate_sharded:
        assert held == [0, 0], held
    else:
        assert held[1] == 4 * numbers, (held, numbers)


@pytest.mark.parametrize("each", [False, True])
def test_exchanged_after_every_micro_batch_none_is_held_whole(
    each: bool, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    training = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("image",) * 4, packs_per_step=4)
    spec = changed(training, tmp_path / "run", parallel={"accumulate_sharded": each})
    Path(spec.run.output_dir).mkdir()
    run_ranks(look_at_whole_gradients, 2, spec, log_dir=tmp_path / "logs")
