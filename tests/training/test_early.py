"""What cannot be trained is refused before its data are prepared: by parameters, base model and machine alone."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from qvl_pipeline.config import AdapterConfig, BatchingConfig, IngestConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.errors import UserError
from qvl_pipeline.training.early import check_before_preparing, check_eval_samples

SOURCE = {"name": "a", "path": "a", "data_type": "json"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early") / "model"
    build_tiny_model(folder, family="qwen3_vl", seed=0, corpus=["which digit?"])
    return folder


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def check(scratch: Path, *, sources: list[dict[str, Any]] | None = None, **blocks: dict[str, Any]) -> None:
    check_before_preparing(
        SampleConfig(),
        ModelConfig(**{"processor_type": "qwen3_vl"} | blocks.get("model", {})),
        BatchingConfig(**blocks.get("batching", {})),
        TrainConfig(**blocks.get("train", {})),
        AdapterConfig(**blocks.get("adapter", {})),
        IngestConfig(datasets=sources or [SOURCE]),
        scratch,
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_a_tiny_model_that_is_not_built_yet_passes_and_nothing_is_left(family: str, tmp_path: Path) -> None:
    check(tmp_path / "scratch", model={"processor_type": family}, train={"eval_strategy": "epoch"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"train": {"freeze_modules": ["visaul"]}}, "freeze_modules: 'visaul' matches no parameter of qwen3_vl"),
        ({"train": {"learning_rates": {"vit": 1e-3}, "freeze_modules": ["visual"]}}, "'vit' has no trained parameters"),
        ({"train": {"fp16": True}}, "fp16 needs a GPU"),
        ({"train": {"sp_ulysses_degree": 8}}, "8 does not divide the model's 4 attention heads"),
        ({"train": {"nproc_per_node": 3, "sp_ulysses_degree": 2}}, "2 does not divide the number of processes, 3"),
        ({"model": {"attn_implementation": "torch_varlen"}}, "attn_implementation 'torch_varlen' runs on CUDA only"),
        (
            {"train": {"resume_from_checkpoint": "/no/checkpoint-3"}},
            "resume_from_checkpoint: /no/checkpoint-3 does not",
        ),
        ({"batching": {"max_steps": 3}, "train": {"profile_steps": [4, 5]}}, "after the last step of the plan, 3"),
        ({"model": {"load_from_pretrained_path": "./no/such"}}, "'./no/such' is neither a model folder nor a hub id"),
        (
            {"sources": [SOURCE | {"split": "train"}], "train": {"eval_strategy": "epoch"}},
            "eval_strategy is 'epoch', but every source has 'split: train'",
        ),
    ],
)
def test_what_cannot_run_is_refused(blocks: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        check(tmp_path, **blocks)


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"train.nproc_per_node is 3, but this node has 2 GPUs"):
        check(tmp_path, train={"nproc_per_node": 3})


def test_a_gpu_without_bfloat16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100")
    with pytest.raises(UserError, match="bf16 is not what Tesla V100 computes in: set bf16 to false, fp16 to true"):
        check(tmp_path, train={"bf16": True})


def test_a_package_of_kernels_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl_pipeline.engine.model.kernels.why_not_liger", lambda device: None)
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match="use_liger_kernel needs the package liger-kernel: install it"):
        check(tmp_path, train={"use_liger_kernel": True})


def test_a_base_model_is_there_with_its_weights(pretrained: Path, tmp_path: Path) -> None:
    named = {"load_from_pretrained_path": str(pretrained)}
    check(tmp_path / "scratch", model=named)
    with pytest.raises(UserError, match=r"is of type qwen3_vl, but model.processor_type is qwen2_5_vl"):
        check(tmp_path, model=named | {"processor_type": "qwen2_5_vl"})


def test_weights_that_are_missing_are_named(pretrained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    named = {"load_from_pretrained_path": str(folder)}
    with pytest.raises(UserError, match=r"has no model.safetensors and no model.safetensors.index.json: only safeten"):
        check(tmp_path, model=named)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {}, "weight_map": dict(zip("ab", files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({}, folder / files[0])
    with pytest.raises(UserError, match=rf"has no {files[1]} \(1 of the 2 files that its index names are missing\)"):
        check(tmp_path, model=named)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"the weights of the base model '.*' cannot be found: "):
        check(tmp_path, model=named)


def test_a_disk_without_room_for_checkpoints_and_export_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million parameters: 4 bytes of weights and 8 of moments in each of three checkpoints, and 2 x 4 exported."""
    train = {"save_steps": 10, "save_total_limit": 2}
    asked: list[Path] = []

    def space(free: int) -> None:
        usage = namedtuple("usage", "free")(free)
        monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or usage)

    space(10**8)
    check(tmp_path / "models" / "scratch", train=train)
    assert asked == [tmp_path], "the folder nearest to one that is not there yet"
    space(5 * 10**7)
    with pytest.raises(
        UserError, match=r"needs about 0\.1 GiB of disk \(3 checkpoints of 0\.0 GiB, .*free some, lower"
    ):
        check(tmp_path / "models" / "scratch", train=train)
    # One at the end, without those that are kept; or what is there already, of the leg before.
    check(tmp_path / "models" / "scratch", train={})
    left = tmp_path / "models" / "scratch" / "0123" / "checkpoints"
    left.mkdir(parents=True)
    (left / "state").write_bytes(bytes(5 * 10**7))
    check(tmp_path / "models" / "scratch", train=train)


def test_valid_samples_without_an_eval_split_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "valid_samples.parquet"
    pq.write_table(pa.table({"split": ["train", "eval"]}), path)
    check_eval_samples(path, "'evaluate'")
    pq.write_table(pa.table({"split": ["train", "benchmark"]}), path)
    check_eval_samples(path, "'evaluate'", ("eval", "benchmark"))
    for splits in (["train", "train"], ["train", "benchmark"], pa.array([], pa.string())):
        pq.write_table(pa.table({"split": splits}), path)
        with pytest.raises(UserError, match="no valid sample is of the split 'eval', which 'evaluate' needs: give a"):
            check_eval_samples(path, "'evaluate'")
