from __future__ import annotations

from pathlib import Path

import pytest

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.evaluation.checks import checked_samples, warn_of_cut_answers
from tests.evaluation.world import write_tokenized


def test_answers_that_will_be_cut_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"sample_id": f"made/{answer}", "source": "made", "kind": "text", "task": "exact_match", "split": "eval"}
        | {
            "answer": "x",
            "input_ids": [1] * (12 + answer),
            "label_spans": [],
            "media": [],
            "vit_patches": 0,
            "spectra": 0,
        }
        # A prompt of ten tokens, the answer, and the two tokens that end it.
        | {"length": 12 + answer, "supervised_tokens": answer + 1, "spectra": 0, "prompt_length": 10}
        for answer in (3, 4, 6, 5)
    ]
    write_tokenized(tmp_path / "tokenized.arrow", rows)
    chosen = checked_samples(tmp_path / "tokenized.arrow", EvaluateConfig(max_new_tokens=4))
    warn_of_cut_answers(tmp_path / "tokenized.arrow", chosen, max_new_tokens=6)
    assert not caplog.messages
    warn_of_cut_answers(tmp_path / "tokenized.arrow", chosen, max_new_tokens=4)
    (warning,) = caplog.messages
    assert warning.startswith("2 of 4 expected answers are longer than evaluate.max_new_tokens (4)")
    assert warning.endswith("of sample made/6, has 6 tokens")
