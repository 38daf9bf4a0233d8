"""A base model is known by its content, wherever it lies and however it was replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage import base_model
from qvl_pipeline.tracking.lineage.base_model import base_model_digest

CONFIG, WEIGHTS = b'{"model_type": "qwen3_vl"}', save({"w": np.arange(4, dtype=np.uint8)})
# File systems take the time of a change from the clock that the kernel advances a hundred times a second or more.
CLOCK_TICK_S = 0.02


def other(content: bytes) -> bytes:
    """Return content of the same size and form that differs in its last two bytes."""
    return content[:-2] + content[-2:][::-1]


def pointer(folder: Path, path: object) -> Path:
    """Write the catalog entry that points to a pretrained model."""
    entry = folder / "base"
    entry.mkdir(exist_ok=True)
    (entry / "manifest.json").write_text(json.dumps({"path": str(path)}))
    return entry


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_replaced_by_one_of_its_size_and_time_is_another_model(
    tmp_path: Path, pretrained: Path, name: str
) -> None:
    entry, file = pointer(tmp_path, pretrained), pretrained / name
    first, before = base_model_digest(entry), file.stat()
    time.sleep(CLOCK_TICK_S)
    file.write_bytes(other(file.read_bytes()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert base_model_digest(entry) != first


def test_a_copy_is_the_same_model_whatever_else_lies_beside_it(tmp_path: Path, pretrained: Path) -> None:
    first = base_model_digest(pointer(tmp_path, pretrained))
    copy = shutil.copytree(pretrained, tmp_path / "copy")
    (copy / "README.md").write_text("a copy")
    assert base_model_digest(pointer(tmp_path, copy)) == first


def test_weights_are_read_once(tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pointer(tmp_path, pretrained)
    first = base_model_digest(entry)
    read: list[str] = []
    monkeypatch.setattr(base_model, "_sha256", lambda file: read.append(file.name) or "0" * 64)
    assert base_model_digest(entry) == first
    assert read == []
    time.sleep(CLOCK_TICK_S)
    (pretrained / "model.safetensors").write_bytes(WEIGHTS)
    base_model_digest(entry)
    assert read == ["model.safetensors"]


def test_weights_in_the_cache_of_the_hub_are_not_read(
    tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = base_model_digest(pointer(tmp_path, pretrained))
    repository, commit = tmp_path / "hub" / "models--org--model", "c0" * 20
    blobs, snapshot = repository / "blobs", repository / "snapshots" / commit
    for folder in (blobs, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name, blob in (("config.json", "f" * 40), ("model.safetensors", hashlib.sha256(WEIGHTS).hexdigest())):
        (blobs / blob).write_bytes(CONFIG if name == "config.json" else other(WEIGHTS))
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_model_digest(pointer(tmp_path, "org/model")) == first
    assert capsys.readouterr().out.startswith("base model: org/model from the hub")


def test_the_tiny_model_is_its_folder(tmp_path: Path) -> None:
    entry = pointer(tmp_path, ".")
    first = base_model_digest(entry)
    (entry / "model.safetensors").write_bytes(WEIGHTS)
    assert base_model_digest(entry) != first


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json"])
def test_a_model_that_is_not_there_any_more_is_said_in_one_sentence(
    tmp_path: Path, pretrained: Path, gone: str
) -> None:
    (pretrained / gone).unlink()
    with pytest.raises(UserError, match=f"pretrained' of model.load_from_pretrained_path cannot be read: .*{gone}"):
        base_model_digest(pointer(tmp_path, pretrained))
