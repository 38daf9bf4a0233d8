from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from qvl_pipeline.demo.tokenizer import train_tokenizer
from qvl_pipeline.evaluation.questions import last_question
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from tests.evaluation.world import World

QUESTIONS = [
    "What is the first digit of 3895?",
    "[image] Which digit is this?",
    "[image] and[image] What is the sum?",
    "[video] Which digit came second?",
    "[image] [video] Which digit is only in the video?",
    "[video] [video] Which came second?",
    "[image] … [image] And this?",
]
FRAME = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"


def test_questions_of_every_kind_read_as_they_were_asked(world: World) -> None:
    samples = TokenizedSamples(world.tokenized)
    asked = [last_question(world.processor.tokenizer, samples.row(row)) for row in range(len(samples))]
    assert asked == QUESTIONS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a question"])


@pytest.mark.parametrize(
    ("turn", "question"),
    [
        (f"<0.2 seconds>{FRAME}<1.2 seconds>{FRAME}Which?", "[video] Which?"),  # Qwen3-VL without the outer markers
        ("Which?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\nWhy?", "… Why?"),
        ("  line one\nline two ", "line one\nline two"),
        ("wait <0.5 seconds> here", "wait <0.5 seconds> here"),
        ("", ""),
    ],
)
def test_text_of_a_turn(tokenizer: PreTrainedTokenizerBase, turn: str, question: str) -> None:
    ids = tokenizer.encode(f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n")
    sample = {"input_ids": np.array([*ids, 5, 6, 7]), "prompt_length": len(ids)}
    assert last_question(tokenizer, sample) == question
