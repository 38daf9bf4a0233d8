from __future__ import annotations

import dataclasses
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.feed.batch_loader import load_batches
from qvl_pipeline.engine.feed.handing_over import packed, unpacked
from qvl_pipeline.engine.feed.steps import MicroBatch
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.feed.test_batch_loader import builder, options, training
from tests.engine.ranks import run_ranks

__all__ = ["training"]  # the fixture
WITH_AND_WITHOUT_PIXELS = [MicroBatch((0, 1, 3), True, patches=16), MicroBatch((0,), False)]


def values(batch: Batch) -> dict[str, Any]:
    """All fields, those of tensors as lists that `==` compares, with their types."""
    return {field.name: comparable(getattr(batch, field.name)) for field in dataclasses.fields(batch)}


def comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: comparable(inner) for name, inner in value.items()}
    return (value.dtype, value.shape, value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("rmpad", [True, False], ids=["packs", "padded rows"])
@pytest.mark.parametrize("micro_batch", WITH_AND_WITHOUT_PIXELS, ids=["pixels", "text"])
def test_a_batch_comes_out_of_a_process_as_it_was_built(
    micro_batch: MicroBatch, rmpad: bool, training: TrainSpec
) -> None:
    built = dataclasses.replace(builder(training), rmpad=rmpad)
    [here], [came] = (
        list(load_batches([micro_batch], Path(training.data.tokenized), built, options(num_workers=number)))
        for number in (0, 1)
    )
    assert values(came) == values(here)


@pytest.mark.parametrize(("micro_batch", "most"), [*zip(WITH_AND_WITHOUT_PIXELS, (2, 1), strict=True)])
def test_the_tensors_of_a_batch_are_one_file_beside_the_pixels(
    micro_batch: MicroBatch, most: int, training: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []
    share = torch.UntypedStorage._share_fd_cpu_
    monkeypatch.setattr(
        torch.UntypedStorage, "_share_fd_cpu_", lambda storage: shared.append(storage) or share(storage)
    )
    [batch] = load_batches([micro_batch], Path(training.data.tokenized), builder(training), options(num_workers=0))
    ForkingPickler(BytesIO()).dump(batch)
    assert len(shared) == most


def check_received(given: list[Batch], expected: dict[str, Any]) -> int:
    return int([values(batch) for batch in given] != [expected] * len(given))


def test_a_batch_is_an_argument_of_processes_that_start(training: TrainSpec, tmp_path: Path) -> None:
    micro_batches = WITH_AND_WITHOUT_PIXELS[:1]
    [batch] = load_batches(micro_batches, Path(training.data.tokenized), builder(training), options(num_workers=0))
    run_ranks(check_received, 2, [batch] * 2, values(batch), log_dir=tmp_path)


def test_tensors_of_any_kind_are_packed() -> None:
    given = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "flags": torch.tensor([[True], [False]]),
        "none": torch.zeros(0, 4, dtype=torch.int64),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "columns": torch.arange(12, dtype=torch.int32).view(3, 4)[:, 1:3],  # not contiguous
        "inner": {"half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16), "name": "a"},
        "rest": (1, None),
    }
    whole, placed = packed(given)
    found = unpacked(whole, placed)
    assert found.keys() == given.keys()
    for name in ("bytes", "flags", "none", "number", "columns"):
        assert_close(found[name], given[name], rtol=0, atol=0)
    assert_close(found["inner"]["half"], given["inner"]["half"], rtol=0, atol=0)
    assert (found["inner"]["name"], found["rest"]) == ("a", (1, None))
    whole.zero_()
    assert not any(found["columns"].ravel()), "views"


def test_nothing_is_packed_as_nothing() -> None:
    whole, placed = packed({"a": None})
    assert (len(whole), unpacked(whole, placed)) == (0, {"a": None})
