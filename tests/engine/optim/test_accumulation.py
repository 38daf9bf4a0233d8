"""Gradients that are accumulated in another type than that of the computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
