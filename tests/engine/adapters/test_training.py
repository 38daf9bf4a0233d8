"""Trainings of adapters: what is trained, what stays, and what does not depend on how it is run (invariants 14, 15)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear
from qvl_pipeline.engine.model.adapters.start import set_initial_values
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from tests.engine.model.test_weights import load_sharded
from tests.engine.ranks import JobFailedError, run_ranks
from tests.engine.training import changed, make_training, trained

LORA = {"type": "lora", "targets": {"llm": "all", "merger": "all"}}
DORA = {"type": "dora", "targets": {"llm": ["attention", "mlp"]}, "train_fully": ("merger",)}


@pytest.fixture(scope="session")
def trainings(
    tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]
) -> Callable[[str, str], TrainSpec]:
    """A training of three steps on two ranks, of each family and kind of adapter, with a checkpoint after each step."""

    @cache
    def training(family: str, kind: str) -> TrainSpec:
        base = make_training(tmp_path_factory.mktemp("adapter"), tiny_folders(family), family)
        run = {"save_steps": 1, "save_total_limit": 3}
        adapter = {"lora": LORA, "dora": DORA}[kind]
        if kind == "dora" and family == "qwen3_vl_moe":  # its experts are no linear layers
            adapter = adapter | {"targets": {"llm": ["attention"]}}
        spec = changed(base, Path(base.run.output_dir), run=run, adapter=adapter)
        trained(spec, nproc=2)
        return spec

    return training


def rows(training: TrainSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(training.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def adapter(training: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(training.export.output_dir) / "adapter" / "adapter_model.safetensors")


def weights(training: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(training.export.output_dir) / "model.safetensors")


def assert_same_training(actual: TrainSpec, expected: TrainSpec) -> None:
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows(actual)] == pytest.approx([row[key] for row in rows(expected)], rel=1e-5)
    expected_tensors = adapter(expected)
    assert adapter(actual).keys() == expected_tensors.keys()
    for name, tensor in adapter(actual).items():
        torch.testing.assert_close(
            tensor, expected_tensors[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def record_names(spec: TrainSpec, folder: Path) -> None:
    """Write which parameters are trained, and in which type every parameter is held."""
    model = load_sharded(spec)
    set_initial_values(model, spec.adapter, spec.model.path, spec.run.seed)
    names = {name: [p.requires_grad, str(p.dtype)] for name, p in model.hf.named_parameters()}
    (folder / "names.json").write_text(json.dumps(names))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_trained_is_exactly_what_was_named_and_the_rest_is_bit_unchanged(
    family: str, kind: str, trainings: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    training = trainings(family, kind)
    run_ranks(record_names, 1, changed(training, tmp_path, parallel={"bf16": True}), tmp_path, log_dir=tmp_path / "l")
    names = json.loads((tmp_path / "names.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(training.model.path)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    named = [n for n in linear if ".language_model." in n] + ([n for n in linear if ".merger." in n] * (kind == "lora"))
    own = ["lora_A", "lora_B"] + ["lora_magnitude"] * (kind == "dora")
    expected = {f"{name}.{part}" for name in named for part in own}
    if kind == "dora":
        expected |= {name for name, _ in model.named_parameters() if name.startswith("model.visual.merger.")}
    assert {name for name, (is_trained, _) in names.items() if is_trained} == expected
    # What is trained is float32, all else is held as it is computed with.
    assert {name: dtype for name, (_, dtype) in names.items()} == {
        name: "torch.float32" if name in expected else "torch.bfloat16" for name in names
    }
    base = load_file(Path(training.model.path) / "model.safetensors")
    unmerged = {model_name for model_name in base} - {
        hub for hub in base if any(_same(hub, name, training) for name in [*expected, *(f"{n}.weight" for n in named)])
    }
    for name, weight in weights(training).items():
        assert torch.equal(weight, base[name]) == (name in unmerged), name


def _same(hub: str, name: str, training: TrainSpec) -> bool:
    return FAMILIES[training.model.family].hub_name(name) == hub


def test_the_first_loss_is_the_base_models_bit_for_bit(
    family: str, trainings: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    base = changed(trainings(family, "lora"), tmp_path, run={"save_steps": 0}, adapter={"type": "none"})
    first = trained(base, nproc=2)[0]["loss"]
    assert [rows(trainings(family, kind))[0]["loss"] for kind in ("lora", "dora")] == [first, first]


def test_the_first_loss_is_the_base_models_in_bfloat16_too(tiny_folders: Callable[[str], Path], tmp_path: Path) -> None:
    kinds = ("text", "image")
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds, packs_per_step=1)
    forms = {"base": {"type": "none"}, "dora": DORA}
    specs = [changed(base, tmp_path / n, parallel={"bf16": True}, adapter=a) for n, a in forms.items()]
    first, second = ([row["loss"] for row in trained(spec, nproc=1)] for spec in specs)
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize(("kind", "nproc"), [("lora", 1), ("dora", 4)])
def test_same_training_on_any_number_of_ranks(
    family: str, kind: str, nproc: int, trainings: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings(family, kind)
    actual = changed(expected, tmp_path, run={"save_steps": 0})
    trained(actual, nproc)
    assert_same_training(actual, expected)


@pytest.mark.parametrize(
    ("family", "kind", "made_by", "killed_after", "nproc"),
    [("qwen3_vl", "dora", 2, 1, 2), ("qwen3_vl", "dora", 2, 2, 1), ("qwen2_5_vl", "lora", 1, 1, 2)],
)
def test_resumed_equals_uninterrupted(
    family: str,
    kind: str,
    made_by: int,
    killed_after: int,
    nproc: int,
    trainings: Callable[[str, str], TrainSpec],
    tmp_path: Path,
) -> None:
    expected = trainings(family, kind)
    if made_by == 1:
        expected = changed(expected, tmp_path / "whole")
        trained(expected, nproc=1)
    actual = changed(expected, tmp_path / "run", run={"save_steps": 0})
    shutil.copytree(expected.run.output_dir, actual.run.output_dir)
    for path in (Path(actual.run.output_dir) / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > killed_after:
            (path / "COMPLETE").unlink()
    shutil.rmtree(actual.export.output_dir)
    trained(actual, nproc)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_from_step"] == killed_after
    assert_same_training(actual, expected)


def test_a_checkpoint_holds_what_is_trained_and_no_more(
    family: str, trainings: Callable[[str, str], TrainSpec]
) -> None:
    training = trainings(family, "lora")
    folder = Path(training.run.output_dir) / "checkpoints" / "checkpoint-3"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name.removeprefix("model.hf.") for name in stored if name.startswith("model.")}
    assert tensors
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in tensors)
    states = {name.rpartition(".")[0].removeprefix("optimizer.state.hf.") for name in stored if "exp_avg" in name}
    assert states == tensors


def test_a_checkpoint_is_no_larger_than_the_adapter_and_its_two_moments(
    tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text",), packs_per_step=1)
    training = changed(base, tmp_path / "run", adapter={"type": "lora", "r": 64})
    trained(training, nproc=2)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".distcp")
    numbers = sum(tensor.numel() for tensor in adapter(training).values())
    assert 3 * 4 * numbers < size <= 1.1 * 3 * 4 * numbers


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_of_another_base_model_is_refused(
    kind: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text",) * 2, packs_per_step=1)
    groups = {"adapter": LORA if kind == "lora" else {"type": "none"}}
    one, other = ({"identity": {"base_model": digest}} for digest in ("sha:1", "sha:2"))
    first = changed(base, tmp_path / "run", run=dict(one), **groups)
    trained(first, nproc=1)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    with pytest.raises(JobFailedError):
        trained(changed(base, tmp_path / "two", run={**other, "resume_from": str(checkpoint)}, **groups), nproc=1)
    message = json.loads((tmp_path / "two" / "errors" / "rank0.json").read_text())["message"]
    assert "belongs to a run of another kind (base_model: sha:1 there, sha:2 here)" in message


@pytest.mark.parametrize(
    ("nproc", "groups"),
    [
        (4, {"parallel": {"hsdp_shard_size": 2}, "recompute": {"llm": "selective", "vit": "full"}}),
        (2, {"parallel": {"sp_ulysses_degree": 2}}),
        (1, {"model": {"torch_compile": True}, "data": {"per_device_train_batch_size": 3}}),
    ],
    ids=["hsdp and recomputation", "sequence parallel", "compiled, packs together"],
)
def test_ways_to_run_train_the_same(
    nproc: int, groups: dict[str, Any], trainings: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings("qwen3_vl", "dora")
    actual = changed(expected, tmp_path, run={"save_steps": 0}, **groups)
    trained(actual, nproc)
    assert_same_training(actual, expected)


def test_an_average_and_a_rate_of_lora_b_train_the_same_on_any_number_of_ranks(
    trainings: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    optim = {"ema_decay": 0.5, "learning_rates": {"lora_b": 2e-2}}
    specs = [
        changed(trainings("qwen3_vl", "dora"), tmp_path / str(nproc), optim=optim, export={"export_ema": True})
        for nproc in (1, 2)
    ]
    for nproc, spec in enumerate(specs, start=1):
        first, *_ = trained(spec, nproc)
        assert first["learning_rates"]["lora_b"] == pytest.approx(2 * first["learning_rates"]["llm"])
    assert_same_training(*specs)


def test_muon_trains_the_same_on_any_number_of_ranks(
    trainings: Callable[[str, str], TrainSpec], tmp_path: Path
) -> None:
    optim = {"optim": "muon"}
    specs = [changed(trainings("qwen3_vl", "lora"), tmp_path / str(nproc), optim=dict(optim)) for nproc in (1, 2)]
    for nproc, spec in enumerate(specs, start=1):
        trained(spec, nproc)
    assert_same_training(*specs)


def test_result_lists_adapted_modules_and_parameters(trainings: Callable[[str, str], TrainSpec]) -> None:
    training = trainings("qwen3_vl", "lora")
    result = json.loads((Path(training.run.output_dir) / "result.json").read_text())
    modules = result["adapter"]["modules"]
    assert modules["Qwen3VLTextAttention.q_proj"] == modules["Qwen3VLTextMLP.down_proj"] == 3
    assert sum(modules.values()) == 3 * 7 + 2
    assert result["trained_parameters"] == sum(tensor.numel() for tensor in adapter(training).values())


def test_pissa_starts_as_the_base_and_learns(trainings: Callable[[str, str], TrainSpec], tmp_path: Path) -> None:
    lora = trainings("qwen3_vl", "lora")
    pissa = changed(lora, tmp_path / "two", run={"save_steps": 0}, adapter={**LORA, "init": "pissa"})
    first, *_, last = trained(pissa, nproc=2)
    assert first["loss"] == rows(lora)[0]["loss"]
    assert last["loss"] != rows(lora)[-1]["loss"]
    alone = changed(pissa, tmp_path / "one")
    trained(alone, nproc=1)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows(alone)] == pytest.approx([row[key] for row in rows(pissa)], rel=1e-5)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert adapter(pissa)[name].shape[0] == 2 * pissa.adapter.r


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_one_of_the_two_is_exported_alone_and_it_is_said_what_vllm_would_not_serve(
    form: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("image",), packs_per_step=1)
    training = changed(base, tmp_path / "run", adapter={**LORA, "export": form})
    trained(training, nproc=2)
    folder = Path(training.export.output_dir)
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Qwen3VLProcessor"
    there = {name: (folder / name).exists() for name in ("adapter", "config.json", "model.safetensors")}
    assert there == {name: (name == "adapter") == (form == "adapter") for name in there}
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert ("the adapter changes merger: vLLM serves LoRA of the language model only" in log) == (form == "adapter")


def test_adapted_layers_are_linear_layers() -> None:
    """What looks for linear layers, such as transformers' own initialisation, finds them."""
    assert issubclass(AdaptedLinear, torch.nn.Linear)
