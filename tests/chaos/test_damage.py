"""A byte of what stages hand to each other is damaged: whoever reads it names the file, or reads what was written.

`CHAOS_DAMAGES` is how many random damages are tried, `CHAOS_SEED` where they begin.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from kedro.framework.project import pipelines
from kedro.framework.startup import bootstrap_project
from kedro.utils import load_obj

from qvl_pipeline.data.made_with import attrs_of, first_difference
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.cache import FrameCache
from qvl_pipeline.storage.batches import CheckedBatches
from qvl_pipeline.storage.digests import read_sealed
from qvl_pipeline.storage.soundness import damage
from qvl_pipeline.storage.tables import open_table, read_table
from tests.kedro_project import REPOSITORY, run

TRIALS = int(os.environ.get("CHAOS_DAMAGES", "80"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
# Entries that a later stage reads; pages are for people, and the curve of the training is read for one.
ENTRIES = [
    "01_raw/digits.manifest.json",
    "02_intermediate/digits/samples.parquet",
    "02_intermediate/digits/rejects.parquet",
    "03_primary/digits/valid_samples.parquet",
    "03_primary/digits/media_index.parquet",
    "03_primary/digits/quarantine.parquet",
    "05_model_input/tiny_qwen3_vl/sampled_samples.parquet",
    "05_model_input/tiny_qwen3_vl/video_frames",
    "05_model_input/tiny_qwen3_vl/tokenized.arrow",
    "05_model_input/tiny_qwen3_vl/stream_samples.parquet",
    "05_model_input/tiny_qwen3_vl/pack_plan.parquet",
    "06_models/tiny_qwen3_vl/base",
    "06_models/tiny_qwen3_vl/trained",
    "07_model_output/tiny_qwen3_vl/predictions.parquet",
    "08_reporting/digits/validation_report.json",
    "08_reporting/tiny_qwen3_vl/plan_summary.json",
    "08_reporting/tiny_qwen3_vl/train_result.json",
    "08_reporting/tiny_qwen3_vl/metrics.json",
]


def flip(content: bytearray, rng: random.Random) -> bytes:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut_off(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.randrange(len(content))])


def blank(content: bytearray, rng: random.Random) -> bytes:
    """A block that was allocated and never written."""
    start = rng.randrange(len(content))
    return bytes(content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :])


def scrambled(content: bytearray, _rng: random.Random) -> bytes:
    """All of it; a single bit of a table of a few rows may be in what no reader looks at, such as statistics."""
    return bytes(byte ^ 0xFF for byte in content)


DAMAGES: list[Callable[[bytearray, random.Random], bytes]] = [flip, cut_off, blank]


@cache
def schema(path: Path) -> pa.Schema | None:
    """The columns that the catalog names for a table."""
    catalog = yaml.safe_load((REPOSITORY / "conf/base/catalog.yml").read_text(encoding="utf-8"))
    names = {Path(entry["filepath"]).name: entry.get("schema") for entry in catalog.values()}
    return load_obj(names[path.name]) if names.get(path.name) else None


def content(path: Path) -> Any:
    """What a reader gets; the record of parameters, which is compared with those of a run, apart."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): content(file) for file in sorted(path.rglob("*")) if file.is_file()}
    if path.suffix == ".parquet":
        return read_table(path).to_pylist()
    if path.suffix == ".arrow":
        batches = CheckedBatches(path)
        return [batches.batch(number).to_pylist() for number in range(len(batches))]
    return read_sealed(path) if path.suffix == ".json" else path.read_bytes()


def record(path: Path) -> dict[str, Any]:
    if path.suffix == ".parquet":
        return attrs_of(open_table(path).schema_arrow).get("made_with", {})
    return attrs_of(CheckedBatches(path).schema).get("made_with", {}) if path.suffix == ".arrow" else {}


def outcome(entry: Path, file: Path, before: tuple[Any, Any]) -> str:
    if wrong := damage(entry, schema(entry)):
        assert file.name in wrong or "digests.json" in wrong, f"{file} was damaged, but {wrong}"
        return "named"
    if content(entry) == before[0] and record(entry) == before[1]:
        return "as it was"
    return "named" if first_difference(record(entry), before[1]) else "SILENT"


@pytest.fixture(scope="module")
def data(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a project in which all stages have run; nothing else has a name in common with it."""
    return shutil.copytree(trained / "data", tmp_path_factory.mktemp("damaged") / "data")


def test_no_damage_of_a_hand_over_is_silent(data: Path) -> None:
    rng = random.Random(SEED)
    before = {name: (content(data / name), record(data / name)) for name in ENTRIES}
    outcomes = Counter()
    for trial in range(TRIALS):
        name = ENTRIES[trial % len(ENTRIES)]
        files = [file for file in sorted((data / name).rglob("*")) if file.is_file() and file.stat().st_size]
        file = rng.choice(files) if files else data / name
        whole, kind = file.read_bytes(), rng.choice(DAMAGES)
        damaged = kind(bytearray(whole), rng)
        file.unlink()  # a mapped file is not changed under its reader
        file.write_bytes(damaged)
        try:
            found = "as it was" if damaged == whole else outcome(data / name, file, before[name])
        finally:
            file.unlink()
            file.write_bytes(whole)
        assert found != "SILENT", f"trial {trial} of seed {SEED}: {kind.__name__} in {file} was not noticed"
        outcomes[found] += 1
    assert outcomes["named"] >= TRIALS / 2, outcomes
    print(f"{TRIALS} damages: {dict(outcomes)}")


def test_the_frame_cache_hands_out_nothing_that_was_damaged(data: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    original = data / "05_model_input" / "frame_cache"
    clips = FrameCache(original)
    keys = list(clips._clips)
    before = {key: clips.clip(key)[1].to_pylist() for key in keys}
    decoded_again = 0
    for trial in range(max(20, TRIALS // 4)):
        folder = shutil.copytree(original, tmp_path / str(trial))
        file = rng.choice(sorted(folder.iterdir()))
        file.write_bytes(rng.choice(DAMAGES)(bytearray(file.read_bytes()), rng))
        damaged = FrameCache(folder)
        shard = damaged.shard(keys, 1 << 28)
        handed_out = {key: damaged.clip(key) for key in keys}
        for key, found in handed_out.items():
            assert found is None or found[1].to_pylist() == before[key], f"trial {trial} of seed {SEED}: {file}"
        decoded_again += shard is None
        assert shard is None or all(handed_out.values())
    assert decoded_again


@pytest.fixture
def project(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(trained)
    bootstrap_project(trained)
    pipelines.configure("qvl_pipeline.pipeline_registry")
    yield trained
    pipelines.configure("qvl_pipeline.pipeline_registry")


@pytest.mark.parametrize(
    ("stage", "file", "made_by"),
    [
        ("tokenize", "03_primary/digits/media_index.parquet", "validate"),
        ("train", "05_model_input/tiny_qwen3_vl/pack_plan.parquet", "tokenize"),
        ("train", "05_model_input/tiny_qwen3_vl/tokenized.arrow", "tokenize"),
        ("train", "05_model_input/tiny_qwen3_vl/video_frames/index.arrow", "sample"),
        ("train", "05_model_input/tiny_qwen3_vl/video_frames/frames-00000.arrow", "sample"),
        ("train", "06_models/tiny_qwen3_vl/base/model.safetensors", "tokenize"),
        ("train", "08_reporting/tiny_qwen3_vl/plan_summary.json", "tokenize"),
        ("evaluate", "06_models/tiny_qwen3_vl/trained/model.safetensors", "train"),
        ("evaluate", "08_reporting/tiny_qwen3_vl/train_result.json", "train"),
    ],
)
@pytest.mark.parametrize("kind", [scrambled, cut_off])
def test_a_damaged_input_is_named_with_the_stage_to_run_before_anything_starts(
    project: Path, stage: str, file: str, made_by: str, kind: Callable[[bytearray, random.Random], bytes]
) -> None:
    path = project / "data" / file
    whole = path.read_bytes()
    path.unlink()
    # In its middle: what is at its end may be padding.
    middle = bytearray(whole[len(whole) // 3 : len(whole) // 2])
    changed = kind(middle, random.Random(SEED))
    path.write_bytes(whole[: len(whole) // 3] + changed + (whole[len(whole) // 2 :] if kind is scrambled else b""))
    try:
        with pytest.raises(UserError) as caught:
            run(project, stage)
    finally:
        path.unlink()
        path.write_bytes(whole)
    message = str(caught.value)
    assert message.startswith(f"{stage} cannot start, because ")
    assert path.name in message
    assert "make it again by `kedro run --pipelines " in message
    assert made_by in message.partition("--pipelines ")[2].partition("`")[0].split(",")
    assert "\n" not in message
