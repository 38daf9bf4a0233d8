"""What does not fit together across blocks; docs/mistakes.md has more of it, and what does fit is here."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.config.across import find_conflicts
from qvl_pipeline.config.training.train import Optimizer

LARGE = {"processor_type": "qwen2_5_vl", "load_from_pretrained_path": "Qwen/Qwen2.5-VL-72B-Instruct"}
SOURCE = {"path": "rows.json", "data_type": "json"}


def conflicts(**blocks: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    said = {"ingest": {"datasets": [SOURCE]}, "model": {"processor_type": "qwen3_vl"}, **blocks}
    return list(find_conflicts({name: model.model_validate(said.get(name, {})) for name, model in BLOCKS.items()}))


def test_defaults_fit_together() -> None:
    assert conflicts() == []


def test_a_quantised_base_is_not_compiled() -> None:
    ((key, sentence),) = conflicts(adapter={"type": "lora", "quantize_base": "nf4"}, train={"torch_compile": True})
    assert key == ("train", "torch_compile")
    assert "quantize_base" in sentence


@pytest.mark.parametrize("optim", get_args(Optimizer))
def test_a_model_that_no_gpu_can_hold_is_refused_with_every_optimizer(optim: str) -> None:
    train = {"optim": optim, "bf16": True, "nproc_per_node": 1, "launch": {"nnodes": 1}}
    ((key, sentence),) = conflicts(model=LARGE, train=train)
    assert key == ("train", "nproc_per_node")
    assert "take more, an adapter, or cpu_offload" in sentence


@pytest.mark.parametrize(
    "blocks",
    [
        {"train": {"launch": {"nnodes": 4}, "nproc_per_node": 8}},
        {"train": {"launch": {"nnodes": 1}, "nproc_per_node": 1}, "adapter": {"type": "lora"}},
        {"train": {"launch": {"nnodes": 1}, "nproc_per_node": 1, "fsdp_config": {"cpu_offload": True}}},
        {"train": {"nproc_per_node": 1}},  # of how many nodes is not said
    ],
)
def test_what_may_be_held_is_not_refused(blocks: dict[str, Any]) -> None:
    assert conflicts(model=LARGE, **blocks) == []


def test_copies_may_span_nodes_and_share_them_but_not_lie_across_their_borders() -> None:
    def sharded(shard: int, per_node: int, nodes: int) -> list[str]:
        train = {"nproc_per_node": per_node, "launch": {"nnodes": nodes}, "fsdp_config": {"hsdp_shard_size": shard}}
        return [sentence for _, sentence in conflicts(train=train)]

    assert sharded(8, 8, 4) == sharded(4, 8, 4) == sharded(16, 8, 4) == []
    assert "across the borders of nodes" in sharded(12, 8, 3)[0]
    assert "does not divide the number of processes, 24" in sharded(9, 8, 3)[0]


def test_a_model_of_which_nothing_is_known_is_left_to_its_own_files() -> None:
    train = {"sp_ulysses_degree": 8, "nproc_per_node": 8, "launch": {"nnodes": 1}}
    model = {"processor_type": "qwen2_5_vl", "load_from_pretrained_path": "my/own"}
    assert conflicts(model=model, train=train, batching={"packing_length": 10**6}) == []
    (found,) = conflicts(model=model | {"load_from_pretrained_path": "Qwen/Qwen2.5-VL-7B-Instruct"}, train=train)
    assert "does not divide the 28 attention heads" in found[1]
