"""Facts of the published models: they build, with the published number of parameters; nobody needs torch for them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig, Qwen3_5MoeVisionConfig

from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.facts import MODELS, ModelFacts

SIZES = {
    "qwen2_5_vl": {"3B", "7B", "32B", "72B"},
    "qwen3_vl": {"2B", "4B", "8B", "32B"},
    "qwen3_vl_moe": {"30B-A3B", "235B-A22B"},
    "qwen2_5_omni": {"3B", "7B"},
    "qwen3_5": {"0.8B", "2B", "4B", "9B", "27B"},
    "qwen3_5_moe": {"35B-A3B", "122B-A10B", "397B-A17B"},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def facts(request: pytest.FixtureRequest) -> ModelFacts:
    return request.param


# Of models published as a part of more: what others count who load the trained part alone.
TRAINED_ALONE = {"Qwen/Qwen2.5-Omni-3B": 4_703_464_448, "Qwen/Qwen2.5-Omni-7B": 8_931_813_888}


def built_from(facts: ModelFacts) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**facts.config()))


def test_every_published_size_is_there() -> None:
    for family, sizes in SIZES.items():
        assert {model.size for model in MODELS.values() if model.family == family} == sizes
    for name, model in MODELS.items():
        assert name.removesuffix("-Instruct").endswith(f"-{model.size}")
        assert model.family in FAMILIES


def test_model_builds_from_facts_with_the_published_number_of_parameters(facts: ModelFacts) -> None:
    model = built_from(facts)
    built = sum(tensor.numel() for tensor in model.parameters())
    assert built + facts.kept_parameters == pytest.approx(facts.parameters, rel=1e-3)
    family = FAMILIES[facts.family]
    classes = [type(module).__name__ for module in model.modules()]
    assert classes.count(family.decoder_layer) == facts.text.num_hidden_layers
    assert classes.count(family.vision_block) == facts.vision.depth
    if facts.audio:
        assert classes.count(family.hearing.encoder_layer) == facts.audio.encoder_layers
    assert {family.group_of(name) for name, _ in model.named_parameters()} >= {"vit", "merger", "embed", "llm"}
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == facts.text.tie_word_embeddings


@pytest.mark.parametrize(("name", "parameters"), TRAINED_ALONE.items())
def test_the_thinker_has_the_number_of_parameters_that_it_has_alone(name: str, parameters: int) -> None:
    assert sum(tensor.numel() for tensor in built_from(MODELS[name]).parameters()) == parameters


@pytest.mark.parametrize("name", [name for name, facts in MODELS.items() if facts.text.linear_num_key_heads])
def test_what_is_kept_beside_the_model_is_one_layer_more_and_what_leads_into_it(name: str) -> None:
    """Multi-token prediction: a layer of softmax attention, a projection of two widths to one, and three norms."""
    facts, width = MODELS[name], MODELS[name].text.hidden_size
    layers = built_from(facts).model.language_model.layers
    layer = next(layer for layer in layers if hasattr(layer, "self_attn"))
    assert facts.kept_parameters == sum(tensor.numel() for tensor in layer.parameters()) + 2 * width**2 + 3 * width


def test_35b_a3b_is_what_transformers_takes_for_granted() -> None:
    """Its classes name this checkpoint as the one that their defaults are of."""
    facts = MODELS["Qwen/Qwen3.5-35B-A3B"]
    for said, default, differs in (
        (facts.text, Qwen3_5MoeTextConfig(), {"max_position_embeddings"}),
        (facts.vision, Qwen3_5MoeVisionConfig(), set()),
    ):
        values = {key: value for key, value in dataclasses.asdict(said).items() if hasattr(default, key)}
        assert {key for key, value in values.items() if value not in (None, getattr(default, key))} == differs
    assert AutoConfig.for_model(**facts.config()).text_config.layer_types == Qwen3_5MoeTextConfig().layer_types


def test_everything_said_reaches_the_config(facts: ModelFacts) -> None:
    said = facts.config()
    config = AutoConfig.for_model(**facts.config())
    for part in [key for key in said if key.endswith("_config")]:
        made = getattr(config, part)
        for key, value in said[part].items():
            got = getattr(made, key)
            if isinstance(value, dict):
                assert {name: got[name] for name in value} == value
            else:
                assert (list(got) if isinstance(value, tuple) else got) == (
                    list(value) if isinstance(value, tuple) else value
                ), key


def test_facts_agree_with_themselves_and_with_the_family(facts: ModelFacts) -> None:
    text, vision = facts.text, facts.vision
    assert sum(text.mrope_section) == text.head_dim * (text.partial_rotary_factor or 1) // 2
    assert text.num_attention_heads % text.num_key_value_heads == 0
    assert vision.patch_size == FAMILIES[facts.family].patch_size
    assert max(vision.fullatt_block_indexes or vision.deepstack_visual_indexes or (0,)) < vision.depth
    assert (vision.tokens_per_second is None) == (facts.family != "qwen2_5_vl")
    assert (text.linear_num_key_heads is None) == (FAMILIES[facts.family].linear_attention is None)
    hearing = FAMILIES[facts.family].hearing
    assert (facts.audio is None) == (hearing is None)
    assert hearing is None or hearing.mel_bins == facts.audio.num_mel_bins
    assert (facts.kept_parameters == 0) == (FAMILIES[facts.family].kept_prefixes == ())


def test_facts_need_no_torch() -> None:
    check = (
        "import sys, qvl_pipeline.families.facts; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
