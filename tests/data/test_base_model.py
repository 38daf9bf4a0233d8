from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl_pipeline.config import ModelConfig
from qvl_pipeline.data.base_model import check_prepared, read_base_model, write_manifest
from qvl_pipeline.errors import UserError

TINY = ModelConfig(processor_type="qwen3_vl")


def test_a_tiny_model_lies_in_the_folder_itself(tmp_path: Path) -> None:
    write_manifest(tmp_path, TINY)
    found = read_base_model(tmp_path)
    assert (found.path, found.processor, found.is_own) == (str(tmp_path), str(tmp_path), True)
    assert json.loads((tmp_path / "manifest.json").read_text())["path"] == ".", "the folder may be moved"


def test_a_pretrained_model_is_pointed_to(tmp_path: Path) -> None:
    write_manifest(tmp_path, ModelConfig(processor_type="qwen2_5_vl", load_from_pretrained_path="org/model"))
    found = read_base_model(tmp_path)
    assert (found.path, found.processor, found.family) == ("org/model", "org/model", "qwen2_5_vl")
    assert not found.is_own


def test_parameters_that_the_tokens_were_not_made_for_are_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, TINY)
    check_prepared(tmp_path, TINY.model_copy(update={"attn_implementation": "eager"}))
    with pytest.raises(UserError, match=r"model.image_max_pixels = 1310720, but this run has 9999.*sample,tokenize"):
        check_prepared(tmp_path, TINY.model_copy(update={"image_max_pixels": 9999}))
