"""Adapters that cannot be, each refused in one sentence before any process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from qvl_pipeline.config import AdapterConfig, TrainConfig
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.training.checks import check_before_launch
from qvl_pipeline.training.identity import adapter_digest
from qvl_pipeline.training.spec import _learning_rates
from tests.engine.training import changed, make_training


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"r": 8}, "r without a type would train the whole model: set type to lora or dora, or to none"),
        ({"type": "lore"}, "'none', 'lora' or 'dora'"),
        ({"type": "lora", "r": 0}, "greater than or equal to 1"),
        ({"type": "lora", "rank": 8}, "unknown key 'rank'"),
        ({"type": "lora", "targets": {"head": "all"}}, "'vit', 'merger', 'deepstack', 'visual', 'llm', 'audio' or"),
        ({"type": "lora", "targets": {"llm": "none"}}, "targets names no part to adapt: name one, such as {llm: all}"),
        ({"type": "lora", "targets": ["*_proj"]}, "valid dictionary"),
        ({"type": "dora", "init": "pissa"}, "init 'pissa' is for type 'lora'"),
        ({"type": "lora", "init": "pissa", "start_from": "x"}, "init 'pissa' and start_from are two ways to start"),
        ({"type": "lora", "learning_rates": {"lora_a": 1e-3}}, "'lora_b'"),
        (
            {"quantize_base": "nf4"},
            "quantize_base without a type would train the whole model: set type to lora or dora",
        ),
        (
            {"type": "none", "quantize_base": "nf4"},
            "quantize_base 'nf4' needs an adapter, for quantised weights cannot",
        ),
        ({"type": "lora", "quantize_base": "int8"}, "'none' or 'nf4'"),
        ({"type": "lora", "double_quant": False}, "double_quant means nothing without a quantised base: set quantize_"),
        (
            {"type": "lora", "quantize_base": "nf4", "quantize_parts": ["head"]},
            "'vit', 'merger', 'deepstack', 'visual'",
        ),
        ({"type": "lora", "quantize_base": "nf4", "quantize_parts": []}, "at least 1 item"),
    ],
)
def test_refused_by_the_block(block: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence) as caught:
        AdapterConfig(**block)
    assert any(sentence in error["msg"] and "\n" not in error["msg"] for error in caught.value.errors())


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    folder = tmp_path_factory.mktemp("refused")
    build_tiny_model(folder / "model", family="qwen2_5_vl", seed=0, corpus=["which digit is this?"])
    return make_training(folder / "data", folder / "model", "qwen2_5_vl", kinds=("text",))


def refused(training: TrainSpec, folder: Path, sentence: str, adapter: dict[str, Any], **groups: Any) -> None:
    spec = changed(training, folder, adapter={"type": "lora", **adapter}, **groups)
    with pytest.raises(UserError, match=sentence) as caught:
        check_before_launch(spec, steps=10, ranks=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "groups", "sentence"),
    [
        ({"targets": {"deepstack": "all"}}, {}, "adapter.targets: Qwen2.5-VL has no linear layers in 'deepstack'"),
        ({"targets": {"llm": ["q_proj"]}}, {}, "'q_proj' matches no linear layer of 'llm': use all, one of attention"),
        (
            {"train_fully": ("mergr",)},
            {},
            "adapter.train_fully: 'mergr' matches no parameter of qwen2_5_vl; use one of",
        ),
        (
            {"targets": {"merger": "all"}, "train_fully": ("merger",)},
            {},
            "adapter.train_fully: 'merger' would train 'model.visual.merger.mlp.0.bias', which adapter.targets adapts",
        ),
        (
            {"quantize_base": "nf4", "quantize_parts": ("deepstack",)},
            {},
            "adapter.quantize_parts: Qwen2.5-VL has no linear layers in 'deepstack', but in ",
        ),
        (
            {"quantize_base": "nf4", "targets": {"llm": ["attention"]}, "train_fully": ("*.layers.0.mlp.*",)},
            {},
            r"would train 'model.*layers.0.mlp.down_proj.weight', which adapter.quantize_parts quantises",
        ),
        ({}, {"model": {"freeze_modules": ("visual",)}}, "freeze_modules means nothing with adapter.type 'lora'"),
        ({}, {"optim": {"learning_rates": {"merger": 1e-3}}}, "'merger' has no trained parameters in this run"),
        ({}, {"optim": {"optim": "adamw_bf16"}}, "optim 'adamw_bf16' saves next to nothing where an adapter"),
        ({"start_from": "nowhere"}, {}, "nowhere has no adapter_config.json: give the folder of a LoRA adapter"),
    ],
)
def test_refused_for_this_model(
    adapter: dict[str, Any], groups: dict[str, Any], sentence: str, training: TrainSpec, tmp_path: Path
) -> None:
    refused(training, tmp_path, sentence, adapter, **groups)


def test_what_fits_is_not_refused(training: TrainSpec, tmp_path: Path) -> None:
    rates = {"lora_b": 1e-3, "merger": 1e-5}
    adapter = {"type": "dora", "targets": {"llm": ["mlp"], "visual": ["attention"]}, "train_fully": ("merger",)}
    check_before_launch(changed(training, tmp_path, adapter=adapter, optim={"learning_rates": rates}), 10, 1)
    adapter |= {"quantize_base": "nf4", "quantize_parts": ("llm", "vit")}
    check_before_launch(changed(training, tmp_path, adapter=adapter, optim={"learning_rates": rates}), 10, 1)


@pytest.fixture
def stored(training: TrainSpec, tmp_path: Path) -> Path:
    model = AutoModelForImageTextToText.from_pretrained(training.model.path)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model" in n]
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names)).save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"r": 8}, "has r 4, but adapter.r is 8: set it to 4"),
        ({"alpha": 16.0}, "has alpha 8, but adapter.alpha is 16.0: set it to 8"),
        ({"type": "dora"}, "has type lora, but adapter.type is dora"),
        ({"targets": {"llm": ["mlp"]}}, r"adapts is not what adapter.targets names: \d+ there only \(model.language"),
        ({"train_fully": ("merger",)}, r"trains in full is not what adapter.train_fully names: \d+ here only"),
    ],
)
def test_adapter_of_another_form_is_no_start(
    adapter: dict[str, Any], sentence: str, training: TrainSpec, stored: Path, tmp_path: Path
) -> None:
    refused(training, tmp_path, sentence, {"start_from": str(stored), **adapter})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa": its base model was changed with it'),
        ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern = .*, which is not known here"),
        ({"bias": "all"}, "has bias = "),
        ({"peft_type": "IA3"}, "an adapter of type IA3: only LORA is known here"),
    ],
)
def test_adapter_of_an_unknown_kind_is_no_start(
    change: dict[str, Any], sentence: str, training: TrainSpec, stored: Path, tmp_path: Path
) -> None:
    config = json.loads((stored / "adapter_config.json").read_text())
    (stored / "adapter_config.json").write_text(json.dumps(config | change))
    refused(training, tmp_path, sentence, {"start_from": str(stored)})


def test_adapter_that_one_of_several_ranks_saved_is_no_start(training: TrainSpec, stored: Path, tmp_path: Path) -> None:
    tensors = load_file(stored / "adapter_model.safetensors")
    halves = {name: t.chunk(2)[0].contiguous() if "lora_B" in name else t for name, t in tensors.items()}
    save_file(halves, stored / "adapter_model.safetensors")
    refused(
        training, tmp_path, r"is \[\d+, 4\], but this model needs .* saved from one of", {"start_from": str(stored)}
    )


def test_a_start_that_is_not_there_or_of_two_rates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone is not a folder: give that of an adapter in peft's format"):
        adapter_digest(AdapterConfig(type="lora", start_from=str(tmp_path / "gone")))
    train, adapter = (
        block(learning_rates={"llm": 1e-3}, **more)
        for block, more in ((TrainConfig, {}), (AdapterConfig, {"type": "lora"}))
    )
    with pytest.raises(UserError, match="both have a rate of 'llm': keep one of them"):
        _learning_rates(train, adapter)


def test_switching_an_adapter_off_is_no_mistake() -> None:
    assert AdapterConfig(type="none", r=8).decisive() == AdapterConfig().decisive() == {"type": "none"}
    plain = AdapterConfig(type="lora", quantize_base="none", double_quant=False)
    assert plain.decisive() == AdapterConfig(type="lora").decisive()
    assert AdapterConfig(type="lora", quantize_base="nf4").decisive()["double_quant"] is True
