"""The model card: what a model was trained on, what it saw, and lines that serve it so that it sees the same."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.audio_utils
import yaml

from qvl_pipeline.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.media.sound.decoding import read_sound
from qvl_pipeline.tracking.mlflow.loading import AnsweringModel
from qvl_pipeline.training.card.model_card import model_card, sampling_item, with_scores
from tests.engine.training import published
from tests.media.sounds import tone, write_heard_clip, write_wav

ROW = {"source": "cups", "samples": 90, "tokens": 8000, "supervised_tokens": 700, "drawn_per_epoch": 2.0, "share": 1.0}
SUMMARY = {"steps": 40, "fingerprint": "f1nger", "sources": [ROW]}
CODE = {"mlflow.source.git.commit": "c0mmit", "git_dirty": "false"}
SAMPLE = SampleConfig(fps=1.5, video_max_frames=64, video_min_pixels=12544, video_max_pixels=50176)
FIXED = SampleConfig(video_sampling_strategy="frame_num", frame_num=8)


def card(family: str, sample: SampleConfig = SAMPLE, base: str | None = "org/model", **code: str) -> str:
    model = ModelConfig(processor_type=family, load_from_pretrained_path=base)
    return model_card(
        "cups_run", sample=sample, model=model, train=TrainConfig(), plan_summary=SUMMARY, code=CODE | code
    )


def option(text: str, name: str) -> Any:
    """The JSON behind an option of a command in a card."""
    [command] = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if name in block]
    words = shlex.split(command.replace("\\\n", " "))
    return json.loads(words[words.index(name) + 1])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_a_card_says_what_was_trained_on_which_code_and_what_it_saw(family: str) -> None:
    text = card(family)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "org/model"
    assert body.startswith("\n# cups_run\n")
    for said in ("| cups | 90 | 8000 | 700 | 2.0 | 100.0 % |", "40 steps", "`c0mmit`.", "`f1nger`", "12544 to 50176"):
        assert said in text
    assert "changes that are in no commit" not in text
    assert "with changes that are in no commit" in card(family, git_dirty="true")


@pytest.mark.parametrize("export", ["adapter", "merged", "both"])
def test_a_card_says_where_the_adapter_is(export: str) -> None:
    model = ModelConfig(processor_type="qwen3_vl", load_from_pretrained_path="org/model")
    facts = {"sample": SAMPLE, "model": model, "train": TrainConfig(), "plan_summary": SUMMARY, "code": CODE}
    text = model_card("cups_run", **facts, adapter=AdapterConfig(type="dora", r=8, export=export))
    assert "Trained as a DoRA of rank 8." in text
    assert ('from_pretrained("org/model"), "adapter")' in text) == (export != "merged")
    assert ("The folder has no weights of its own" in text) == (export == "adapter")
    assert ("do not put it on them once more" in text) == (export != "adapter")
    assert "adapter" not in model_card("cups_run", **facts)
    assert "NF4" not in text
    text = model_card("cups_run", **facts, adapter=AdapterConfig(type="lora", quantize_base="nf4", export=export))
    assert "a LoRA of rank 16 over the base model in NF4, and made for the base model as it is." in text


def test_a_local_base_model_is_no_hub_id(tmp_path: Any) -> None:
    for base in (str(tmp_path), None):
        assert "base_model:" not in card("qwen3_vl", base=base)


@pytest.mark.parametrize("sample", [SAMPLE, FIXED])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_engines_are_told_the_sampling_of_the_training(family: str, sample: SampleConfig) -> None:
    text, item = card(family, sample), sampling_item(sample)
    assert ast.literal_eval(re.search(r"^sampling = (.*)$", text, re.MULTILINE)[1]) == item
    assert option(text, "--mm-process-config") == {"video": item}
    loader = option(text, "--media-io-kwargs")["video"]
    if sample is FIXED:
        assert loader == {"num_frames": 8}
        assert "--mm-processor-kwargs" not in text
    else:
        assert loader == ({"num_frames": -1} if family != "qwen2_5_vl" else {"num_frames": 64, "fps": 1.5})
        assert option(text, "--mm-processor-kwargs") == {"fps": 1.5}


def test_the_code_of_a_card_is_python() -> None:
    [code] = re.findall(r"```python\n(.*?)```", card("qwen3_vl"), re.DOTALL)
    ast.parse(code)
    assert "image_patch_size=16" in code


@pytest.mark.parametrize("heard", [False, True], ids=["a clip and a sound", "a clip that is heard"])
def test_the_code_of_the_card_of_a_model_that_hears_answers(
    heard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_audio(path: str, sampling_rate: int) -> np.ndarray:  # transformers' own needs packages that are not here
        return read_sound(Path(path), None, None, rate=sampling_rate, longest_s=9)

    sample = SAMPLE.model_copy(update={"use_audio_in_video": heard, "video_min_pixels": 1024})
    text = card("qwen2_5_omni", sample)
    assert ("heard, from the second of the first frame on" in text) == heard
    assert "SGLang" not in text
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    build_tiny_model(tmp_path / "thinker", family="qwen2_5_omni", seed=0, corpus=["What happens?"])
    monkeypatch.chdir(published(tmp_path / "exported", tmp_path / "thinker"))
    write_heard_clip(Path("clip.mp4"), 24, 8, tone(2.5))
    write_wav(Path("sound.wav"), tone(1.3))
    monkeypatch.setattr(transformers.audio_utils, "load_audio", load_audio)
    exec(compile(code.replace("=128)", "=3)"), "card", "exec"), {})
    # Three seconds at 1.5 frames a second are 4 frames, which are two temporal patches of 2 x 2 tokens.
    said = capsys.readouterr().out
    assert said.count("<|VIDEO|>") == 2 * 4
    samples = load_audio("clip.mp4" if heard else "sound.wav", 16_000)
    assert said.count("<|AUDIO|>") == audio_tokens(FAMILIES["qwen2_5_omni"].hearing.spectra(len(samples)))
    assert ("<|vision_bos|><|audio_bos|>" in said) == heard


def test_what_mlflow_loads_of_a_model_that_also_speaks_is_the_part_that_answers(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "thinker", family="qwen2_5_omni", seed=0, corpus=["What happens?"])
    served = AnsweringModel(published(tmp_path / "exported", tmp_path / "thinker"))
    (answer,) = served.predict([{"question": "What happens?"}], {"max_new_tokens": 2})
    assert isinstance(answer, str)


def test_scores_are_added_behind_all_that_the_card_said() -> None:
    kinds = {"text": {"exact_match": 0.5, "loss": 1.25, "n": 4}, "overall": {"exact_match": 0.5, "loss": 1.25, "n": 4}}
    text = card("qwen3_vl")
    completed = with_scores(text, {"base": kinds, "trained": kinds})
    assert completed.startswith(text.rstrip())
    assert "| kind | metric | n | base | trained |" in completed
    assert "| text | exact_match | 4 | 0.5000 | 0.5000 |" in completed
    assert "| kind | metric | n | trained |" in with_scores(text, {"trained": kinds})
