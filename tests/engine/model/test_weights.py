"""Loading without ever holding the whole model: equal to `from_pretrained`, and how much each rank touches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import hf_storage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForImageTextToText

from qvl_pipeline.engine.model.loading import build_model, load_processor
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.model.weights import build_skeleton, load_weights
from qvl_pipeline.engine.parallel.sharding import start_process_group
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.ranks import JobFailedError, run_ranks
from tests.engine.training import make_training


def load_sharded(spec: TrainSpec) -> PackedVLM:
    _, device = start_process_group(1, 60)
    model, _ = build_model(spec, load_processor(spec), device, None)
    shard_model(model, device, spec.parallel)
    load_weights(model, spec.model.path, device, offload=False)
    return model


def assert_equals_from_pretrained(spec: TrainSpec) -> None:
    hf = load_sharded(spec).hf
    expected = AutoModelForImageTextToText.from_pretrained(spec.model.path, dtype=torch.float32)
    tensors = dict(expected.named_parameters()) | dict(expected.named_buffers())
    for name, actual in [*hf.named_parameters(), *hf.named_buffers()]:
        whole = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
        assert whole.dtype == tensors[name].dtype, name
        assert torch.equal(whole, tensors.pop(name)), name
    assert not tensors
    tied = hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    assert tied == hf.config.tie_word_embeddings


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_sharded_weights_are_those_of_from_pretrained(
    family: str, nproc: int, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = make_training(tmp_path / "data", tiny_folders(family), family, kinds=("text",))
    run_ranks(assert_equals_from_pretrained, nproc, spec, log_dir=tmp_path / "logs")


class Allocated(TorchDispatchMode):
    """Counts the bytes of all storage that operations make, meta tensors aside; nothing is subtracted when freed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.kept: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views of a memory-mapped file take no memory: of these, `bytes_read` counts what is copied.
        mapped = func is torch.ops.aten.set_.source_Storage
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.storages:
                    self.kept.append(storage)  # so that no other storage gets this address
                    self.storages[storage.data_ptr()] = 0 if mapped else storage.nbytes()
        return result


def measure_loading(spec: TrainSpec, folder: Path) -> None:
    bytes_read = []
    read = hf_storage.HuggingFaceStorageReader._process_read_request

    def counting(self: Any, file: Any, request: Any, planner: Any) -> None:
        values = 1
        for length in request.lengths:
            values *= length
        bytes_read.append(4 * values)
        read(self, file, request, planner)

    hf_storage.HuggingFaceStorageReader._process_read_request = counting
    with Allocated() as allocated:
        model = load_sharded(spec)
    report = {"allocated": sum(allocated.storages.values()), "largest": max(allocated.storages.values())}
    report["read"] = sum(bytes_read)
    report["whole"] = 4 * sum(parameter.numel() for parameter in model.parameters())
    report["largest_parameter"] = 4 * max(parameter.numel() for parameter in model.parameters())
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(report))


def test_no_rank_reads_or_allocates_the_whole_model(
    family: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = make_training(tmp_path / "data", tiny_folders(family), family, kinds=("text",))
    run_ranks(measure_loading, 4, spec, tmp_path, log_dir=tmp_path / "logs")
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for report in reports:
        # A quarter of the parameters and little more, in tensors no larger than the largest shard.
        assert report["whole"] / 4 < report["allocated"] < 0.35 * report["whole"], report
        assert report["largest"] <= 0.3 * report["largest_parameter"], report
    assert sum(report["read"] for report in reports) == reports[0]["whole"]


@pytest.fixture
def damaged(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> Callable[[Callable], TrainSpec]:
    """Make a training whose checkpoint has been tampered with."""

    def damage(change: Callable[[dict[str, torch.Tensor]], None]) -> TrainSpec:
        good = tiny_folders("qwen2_5_vl")
        folder = tmp_path / "damaged"
        folder.mkdir()
        for file in good.iterdir():
            (folder / file.name).symlink_to(file)
        weights = load_file(good / "model.safetensors")
        change(weights)
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return make_training(tmp_path / "data", folder, "qwen2_5_vl", kinds=("text",))

    return damage


def test_checkpoint_that_lacks_a_parameter_or_has_another_is_refused(
    damaged: Callable[[Callable], TrainSpec], tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["visual.extra.weight"] = weights.pop("model.norm.weight")

    with pytest.raises(
        JobFailedError,
        match=r"lacks 1 parameters \(model.language_model.norm.weight\) and has unknown 1 "
        r"parameters \(visual.extra.weight\)",
    ):
        run_ranks(load_sharded, 1, damaged(change), log_dir=tmp_path / "logs")


def test_names_and_types_that_other_releases_stored_are_read(
    damaged: Callable[[Callable], TrainSpec], tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[
                f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")
            ] = weights.pop(name).bfloat16()
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()

    run_ranks(assert_equals_from_pretrained, 2, damaged(change), log_dir=tmp_path / "logs")


def test_quantised_checkpoint_is_refused(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    config = json.loads((tiny_folders("qwen3_vl") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="quantised checkpoint"):
        build_skeleton(str(tmp_path))
