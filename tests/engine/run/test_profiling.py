"""Traces of chosen steps, and what is said and left behind when GPU memory runs out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_pipeline.engine.run.profiling import out_of_memory_explained, profiled
from tests.engine.training import changed, make_training, trained


def traced_steps(folder: Path) -> dict[str, int]:
    """Steps in each trace, by the sizes of the product that each step computes once."""
    found = {}
    for path in sorted((folder / "profile").glob("*")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name] = sum(event.get("name") == "aten::mm" for event in events)
    return found


@pytest.mark.parametrize(
    ("window", "done", "expected"),
    [
        ((2, 3), 0, {"steps-2-3.json.gz": 2}),
        ((1, 1), 0, {"steps-1-1.json.gz": 1}),
        ((2, 4), 2, {"steps-3-4.json.gz": 2}),  # resumed inside of the window
        ((4, 9), 0, {"steps-4-9.json.gz": 2}),  # the run ends inside of it
        ((1, 2), 2, {}),
        ((), 0, {}),
    ],
)
def test_exactly_the_window_is_traced(
    tmp_path: Path, window: tuple[int, ...], done: int, expected: dict[str, int]
) -> None:
    with profiled(window, done, tmp_path) as end_step:
        for _ in range(done, 5):
            torch.ones(2, 2) @ torch.ones(2, 2)
            end_step()
    assert traced_steps(tmp_path) == expected


def test_rank_0_of_a_training_writes_one_trace(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl")
    trained(changed(base, tmp_path / "run", run={"profile_steps": (2, 2)}), nproc=2)
    (name, products), *more = traced_steps(tmp_path / "run").items()
    assert name == "steps-2-2.json.gz"
    assert products > 100
    assert not more


@pytest.mark.parametrize("snapshot", [False, True])
def test_out_of_memory_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: bool) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    with (
        pytest.raises(torch.OutOfMemoryError) as caught,
        out_of_memory_explained(tmp_path, 3, torch.device("cuda"), snapshot=snapshot),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    message = str(caught.value)
    for remedy in ("gradient_checkpointing", "packing_length", "sp_ulysses_degree", "video_max_pixels"):
        assert remedy in message
    assert "Tried to allocate 2.00 GiB" in message
    path = tmp_path / "memory" / "rank3.pickle"
    assert path.exists() == (str(path) in message) == snapshot
    assert calls == ([{"max_entries": 100_000}, {"enabled": None}] if snapshot else [])


def test_a_cpu_has_no_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: pytest.fail("recorded"))
    with out_of_memory_explained(tmp_path, 0, torch.device("cpu"), snapshot=True):
        pass
