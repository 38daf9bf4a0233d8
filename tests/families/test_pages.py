"""docs/models.md: its tables are what the facts and the profiles say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qvl_pipeline.families import FAMILIES, divided_heads
from qvl_pipeline.families.facts import MODELS, ModelFacts
from tests.kedro_project import SHIPPED, profile_named

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
Row = list[str]
# Those of a model which has a profile of its own.
EXTRA = {
    "qwen2_5_vl_7b_lora": "LoRA, on one GPU",
    "qwen3_vl_8b_lora": "LoRA, on one GPU",
    "qwen3_vl_8b_qlora": "QLoRA, on a small GPU",
    "long_video": "clips of an hour and more, 256K tokens, four GPUs a sample",
    "frozen_vision": "the vision tower stays as it is: what is a matter of language",
}


def short(facts: ModelFacts) -> str:
    return facts.name.removeprefix("Qwen/")


def profile_of(facts: ModelFacts) -> Row:
    name = profile_named(facts)
    return [f"`{name}`", hardware(name)] if name in SHIPPED else ["none", ""]


def hardware(profile: str) -> str:
    text = (ROOT / "conf" / profile / "parameters.yml").read_text()
    return re.search(r"^# Hardware: (\S+?),", text, re.M)[1]


def base_of(profile: str) -> str:
    model = yaml.safe_load((ROOT / "conf" / profile / "parameters.yml").read_text())["model"]
    return model["load_from_pretrained_path"].removeprefix("Qwen/")


def parameters(facts: ModelFacts) -> str:
    return f"{facts.parameters:,}" if facts.parameters % 10**8 else f"{facts.parameters / 1e9:.1f} G"


def variants() -> list[Row]:
    return [
        [short(facts), parameters(facts), f"{facts.context:,}", facts.license, facts.use, *profile_of(facts)]
        for facts in MODELS.values()
    ]


def inside() -> list[Row]:
    return [
        [
            *(short(facts), str(text.num_hidden_layers), f"{text.hidden_size:,}"),
            f"{text.intermediate_size or text.shared_expert_intermediate_size:,}",
            *(str(text.num_attention_heads), str(text.num_key_value_heads), str(text.head_dim)),
            *(f"{text.vocab_size:,}", "yes" if text.tie_word_embeddings else "no"),
        ]
        for facts in MODELS.values()
        for text in [facts.text]
    ]


def towers() -> list[Row]:
    return [
        [
            *(short(facts), str(vision.depth), f"{vision.hidden_size:,}", f"{vision.intermediate_size:,}"),
            *(str(vision.num_heads), str(vision.patch_size)),
            numbers(vision.fullatt_block_indexes) if vision.fullatt_block_indexes else "all blocks",
            numbers(vision.deepstack_visual_indexes) if vision.deepstack_visual_indexes else "none",
        ]
        for facts in MODELS.values()
        for vision in [facts.vision]
    ]


def audio_towers() -> list[Row]:
    return [
        [
            *(short(facts), str(audio.encoder_layers), f"{audio.d_model:,}", f"{audio.encoder_ffn_dim:,}"),
            *(str(audio.encoder_attention_heads), str(audio.num_mel_bins)),
            f"{2 * audio.n_window * hearing.hop_length // hearing.sampling_rate} seconds",
        ]
        for facts in MODELS.values()
        if (audio := facts.audio) and (hearing := FAMILIES[facts.family].hearing)
    ]


def numbers(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))


def comparison() -> list[Row]:
    one, other, third = (
        next(facts for facts in MODELS.values() if facts.family == name)
        for name in ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
    )
    sizes = {name: [facts.size for facts in MODELS.values() if facts.family == name] for name in FAMILIES}
    windows = f"windows of {one.vision.window_size} pixels, but for {len(one.vision.fullatt_block_indexes)} blocks"
    sections = [f"{numbers(facts.text.mrope_section)} of {facts.text.head_dim // 2}" for facts in (one, other, third)]
    linear = FAMILIES["qwen3_5"].linear_attention is not None
    return [
        ["position encoding", "M-RoPE (time, height, width)", "interleaved M-RoPE", "interleaved M-RoPE"],
        ["attention of the language model", *["softmax"] * 2, "linear, and softmax in each fourth layer" * linear],
        ["rotary frequencies of time, height, width", *sections],
        ["their base", *(f"{facts.text.rope_theta:,.0f}" for facts in (one, other, third))],
        [
            "visual feature fusion",
            "the last block's features",
            f"DeepStack: those of {len(other.vision.deepstack_visual_indexes)} more blocks, into the first layers",
            "the last block's features",
        ],
        ["vision attention", windows, *["each frame as a whole"] * 2],
        [
            "time of video",
            f"in positions, {one.vision.tokens_per_second} a second",
            *["in the text, a second before each pair of frames"] * 2,
        ],
        ["pixels of a token", *(f"{FAMILIES[facts.family].token_pixels:,}" for facts in (one, other, third))],
        ["context", f"{one.context:,} tokens", *[f"{other.context:,} tokens, extendable to 1M"] * 2],
        ["long video", "good", *["excellent (> 1 hour)"] * 2],
        ["sizes", *(", ".join(sizes[facts.family]) for facts in (one, other, third))],
        ["primary use", "general multimodal", "long video and documents", "the same, with thoughts before answers"],
    ]


def extra() -> list[Row]:
    return [[f"`{profile}`", base_of(profile), what, hardware(profile)] for profile, what in EXTRA.items()]


EXPECTED = {
    "VARIANTS": variants,
    "EXTRA": extra,
    "TEXT": inside,
    "VISION": towers,
    "AUDIO": audio_towers,
    "COMPARISON": comparison,
}


def tables(page: str) -> list[list[Row]]:
    found = re.findall(r"^\|(?:---|---:)\|.*\n((?:\|.*\n)+)", page, re.M)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()] for rows in found]


@pytest.mark.parametrize(("number", "expected"), list(enumerate(EXPECTED.values())), ids=list(EXPECTED))
def test_the_table_is_what_is_known(number: int, expected: object) -> None:
    found = tables(PAGE.read_text())
    assert len(found) == len(EXPECTED)
    assert found[number] == expected()


def test_degrees_of_sequence_parallelism_are_as_the_page_says() -> None:
    degrees = {
        short(facts): [n for n in (2, 4, 8) if not any(heads % n for heads in divided_heads(facts.text).values())]
        for facts in MODELS.values()
    }
    assert degrees.pop("Qwen2.5-VL-7B-Instruct") == degrees.pop("Qwen2.5-Omni-7B") == [2, 4]
    assert set(map(tuple, degrees.values())) == {(2, 4, 8)}


def test_every_profile_of_a_real_model_is_on_the_page() -> None:
    of_models = {profile_named(facts) for facts in MODELS.values()}
    real = {profile for profile in SHIPPED if not profile.startswith("tiny_")}
    assert set(EXTRA) == real - of_models, "the others are in the table of models"
