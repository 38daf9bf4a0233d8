"""Trainings over a quantised base (QLoRA): what they start at, what stays, and what no way to run them changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForImageTextToText

from qvl_pipeline.engine.model.adapters.attach import AttachedAdapter
from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.nf4 import dequantize, quantize
from qvl_pipeline.engine.model.adapters.values import gathered
from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.families import FAMILIES
from tests.engine.adapters.test_training import adapter, assert_same_training, rows, weights
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained

QLORA = {"type": "lora", "quantize_base": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": QLORA,
    "dora": {"type": "dora", "quantize_base": "nf4", "targets": {"llm": ["attention"]}, "train_fully": ("merger",)},
    "pissa": {**QLORA, "init": "pissa", "double_quant": False, "quantize_parts": ("llm", "vit")},
}
STEPS = 20


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """Twenty steps on two ranks, with a checkpoint after each five."""
    folder = tmp_path_factory.mktemp("quantized")
    kinds = ("text", "image", "text", "text") * STEPS
    base = make_training(folder, tiny_folders("qwen3_vl"), "qwen3_vl", kinds)
    run = {"save_steps": 5, "save_total_limit": 4}
    training = changed(base, folder / "run", run=run, adapter=QLORA, optim={"learning_rate": 2e-3})
    trained(training, nproc=2)
    return training


@pytest.fixture(autouse=True)
def skip_what_no_run_may_ask_for(request: pytest.FixtureRequest) -> None:
    if "family" in request.fixturenames:
        reason = FAMILIES[request.getfixturevalue("family")].unsupported.get("quantized_base")
        if reason:
            pytest.skip(reason)


@pytest.fixture(scope="module")
def short(
    tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]
) -> Callable[[str, str], TrainSpec]:
    """A training of three steps on two ranks, of each family and kind of adapter."""

    @cache
    def training(family: str, kind: str) -> TrainSpec:
        base = make_training(tmp_path_factory.mktemp("short"), tiny_folders(family), family)
        spec = changed(base, Path(base.run.output_dir), adapter=KINDS[kind])
        trained(spec, nproc=2)
        return spec

    return training


def losses(training: TrainSpec) -> list[float]:
    return [row["loss"] for row in rows(training)]


def base_weights(training: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(training.model.path) / "model.safetensors")


def is_quantized(name: str, weight: torch.Tensor) -> bool:
    """Whether it is a linear layer of the language model, by its name in the files of either family."""
    return ".layers." in name and weight.ndim == 2


@pytest.mark.parametrize("nproc", [1, 4])
def test_twenty_steps_are_the_same_on_any_number_of_ranks(nproc: int, training: TrainSpec, tmp_path: Path) -> None:
    actual = changed(training, tmp_path, run={"save_steps": 0})
    assert len(trained(actual, nproc)) == STEPS
    assert_same_training(actual, training)
    expected = adapter(training)
    for name, tensor in adapter(actual).items():
        error = (tensor - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: differs by {error:.1e}"


def test_the_curve_is_within_two_percent_of_that_over_the_unquantised_base(
    tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of steps of a hundred tokens or more: the loss of a few is as much chance as curve."""
    kinds, packs = ("text",) * 32 * STEPS, {"packs_per_step": 32}
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds, **packs)
    together = {"data": {"per_device_train_batch_size": 32}}
    plain, quantized = (
        changed(base, tmp_path / name, adapter={**QLORA, "quantize_base": name}, **together) for name in ("none", "nf4")
    )
    for training in (plain, quantized):
        trained(training, nproc=1)
    assert losses(quantized) == pytest.approx(losses(plain), rel=0.02)
    assert losses(quantized) != pytest.approx(losses(plain), rel=1e-5)
    # The curves are not two flat lines.
    for training in (plain, quantized):
        assert sum(losses(training)[-5:]) < 0.985 * sum(losses(training)[:5])


def with_dequantized_base(training: TrainSpec, folder: Path) -> TrainSpec:
    """The same training over a base model whose weights are what the quantised ones stand for."""
    shutil.copytree(training.model.path, folder / "base")
    values = {
        name: dequantize(quantize(weight, double=training.adapter.double_quant), weight.shape, torch.float32)
        if is_quantized(name, weight)
        else weight
        for name, weight in base_weights(training).items()
    }
    save_file(values, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    return changed(training, folder / "run", model={"path": str(folder / "base")}, adapter={"quantize_base": "none"})


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_it_is_the_training_over_a_base_of_the_values_that_its_bytes_stand_for(
    family: str, kind: str, bf16: bool, short: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    quantized = short(family, kind)
    if bf16:
        quantized = changed(quantized, tmp_path / "bf16", parallel={"bf16": True})
        trained(quantized, nproc=2)
    plain = with_dequantized_base(quantized, tmp_path)
    trained(plain, nproc=2)
    assert losses(quantized)[0] == losses(plain)[0]
    assert losses(quantized) == pytest.approx(losses(plain), rel=1e-3 if bf16 else 1e-6)


def test_every_kind_starts_at_the_quantised_base_and_is_the_same_on_one_rank(
    short: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    assert losses(short("qwen3_vl", "dora"))[0] == losses(short("qwen3_vl", "lora"))[0]
    of_other_bytes = changed(short("qwen3_vl", "pissa"), tmp_path / "lora", adapter={"init": "zeros_b"})
    trained(of_other_bytes, nproc=2)
    assert losses(short("qwen3_vl", "pissa"))[0] == losses(of_other_bytes)[0] != losses(short("qwen3_vl", "lora"))[0]
    for kind in ("dora", "pissa"):
        alone = changed(short("qwen3_vl", kind), tmp_path / kind)
        trained(alone, nproc=1)
        for key in ("loss", "grad_norm"):
            expected = [row[key] for row in rows(short("qwen3_vl", kind))]
            assert [row[key] for row in rows(alone)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "nproc", "groups"),
    [
        ("dora", 4, {"parallel": {"hsdp_shard_size": 2}, "recompute": {"llm": "selective", "vit": "full"}}),
        ("lora", 2, {"parallel": {"sp_ulysses_degree": 2, "accumulate_sharded": True}}),
        ("lora", 1, {"data": {"per_device_train_batch_size": 3}}),
        ("lora", 2, {"data": {"use_rmpad": False}}),
        ("lora", 2, {"parallel": {"frozen_sharding": "replicated"}}),
    ],
    ids=["hsdp and recomputation", "sequence parallel", "packs together", "unpacked", "replicated"],
)
def test_ways_to_run_train_the_same(
    kind: str, nproc: int, groups: dict[str, Any], short: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    actual = changed(short("qwen3_vl", kind), tmp_path, **groups)
    trained(actual, nproc)
    assert_same_training(actual, short("qwen3_vl", kind))


@pytest.mark.parametrize(("killed_after", "nproc"), [(10, 4), (15, 1)])
def test_resumed_equals_uninterrupted(killed_after: int, nproc: int, training: TrainSpec, tmp_path: Path) -> None:
    actual = changed(training, tmp_path / "run", run={"save_steps": 0})
    shutil.copytree(training.run.output_dir, actual.run.output_dir)
    for path in (Path(actual.run.output_dir) / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > killed_after:
            (path / "COMPLETE").unlink()
    shutil.rmtree(actual.export.output_dir)
    trained(actual, nproc)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_from_step"] == killed_after
    assert_same_training(actual, training)


def test_a_checkpoint_holds_nothing_of_the_quantised_base(training: TrainSpec) -> None:
    folder = Path(training.run.output_dir) / "checkpoints" / "checkpoint-20"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    names = {name.rpartition(".")[2] for name in stored if name.startswith("model.")}
    assert names == {"lora_A", "lora_B"}


def train_and_compare_bytes(spec: TrainSpec) -> None:
    """Train; the bytes are those of the base model's files before and after, and all else that is frozen as it was."""
    trainer = Trainer(spec, StopRequest(), Watchdog(60, lambda error, where: None))
    hf, family = trainer.model.hf, trainer.model.family
    frozen = {name: gathered(p).clone() for name, p in hf.named_parameters() if not p.requires_grad}
    trainer.run()
    for name, parameter in hf.named_parameters():
        assert name not in frozen or torch.equal(gathered(parameter), frozen[name]), name
    base = base_weights(spec)
    layers = dict(quantized_layers(hf))
    assert {family.hub_name(f"{name}.weight") for name in layers} == {n for n, w in base.items() if is_quantized(n, w)}
    for name, layer in layers.items():
        expected = quantize(base[family.hub_name(f"{name}.weight")], double=True)
        assert layer.quantized.stored().keys() == expected.keys()
        for own, tensor in layer.quantized.stored().items():
            assert torch.equal(gathered(tensor), expected[own]), f"{name}: {own}"


def test_the_bytes_of_the_base_are_those_of_its_files_and_stay(
    family: str, short: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    spec = changed(short(family, "dora"), tmp_path)
    run_ranks(train_and_compare_bytes, 2, spec, log_dir=tmp_path / "logs")


def test_result_says_what_is_quantised(short: Callable[[str, str], TrainSpec]) -> None:
    training = short("qwen3_vl", "dora")
    result = json.loads((Path(training.run.output_dir) / "result.json").read_text())
    quantized = {name: weight for name, weight in base_weights(training).items() if is_quantized(name, weight)}
    numbers = sum(weight.numel() for weight in quantized.values())
    assert result["quantized"] == {"type": "nf4", "double": True, "matrices": len(quantized), "parameters": numbers}
    lora = sum(tensor.numel() for name, tensor in adapter(training).items() if "lora_" in name)
    assert result["parameters"] == lora + sum(weight.numel() for weight in base_weights(training).values())


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_exported_is_the_unquantised_base_and_the_adapter(
    family: str, kind: str, short: Callable[[str, str], TrainSpec]
) -> None:
    training = short(family, kind)
    base, merged = base_weights(training), weights(training)
    assert merged.keys() == base.keys()
    changed_names = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    adapted = {name for name, weight in base.items() if is_quantized(name, weight)}
    if kind == "dora":
        adapted = {n for n in adapted if "_attn." in n} | {n for n in base if n.startswith("visual.merger.")}
        adapted |= {n for n in base if ".visual.merger." in n}
    assert changed_names == adapted
    if kind == "lora":
        tensors = adapter(training)
        for module in {name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}:
            update = 2.0 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            [name] = [n for n in base if n.endswith(f".layers.{module.partition('.layers.')[2]}.weight")]
            torch.testing.assert_close(merged[name], base[name] + update, rtol=0, atol=1e-6)
    # What `evaluate` answers with: the adapter on the base model as it is.
    folder, ids = Path(training.export.output_dir), torch.tensor([[40, 41, 42, 43, 44]])
    model = AutoModelForImageTextToText.from_pretrained(training.model.path, dtype=torch.float32)
    expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        attached = AttachedAdapter(model, folder / "adapter")
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone, expected(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
        attached.switch(on=False)
        assert torch.equal(model(input_ids=ids).logits, alone)
