"""What counts as made with the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.config import IngestConfig, ModelConfig, SampleConfig, ValidateConfig
from qvl_pipeline.config.base import Block
from qvl_pipeline.data.made_with import first_difference, made_with, read_record, with_attrs, write_record
from qvl_pipeline.datasets import TableDataset

SCHEMA = pa.schema([("a", pa.int64())])
SOURCE = {"name": "a", "path": "data/a.jsonl", "data_folder": "media", "data_type": "jsonl"}
INGEST = {"datasets": [SOURCE], "seed": 1, "eval_fraction": 0.5}


def difference(before: Block, now: Block) -> str | None:
    return first_difference({"x": before.decisive("frames")}, {"x": now.decisive("frames")})


def ingest(source: dict[str, Any] | None = None, **changes: Any) -> IngestConfig:
    return IngestConfig(**INGEST | {"datasets": [SOURCE | (source or {})]} | changes)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (ingest(), ingest({"path": "./data//a.jsonl", "data_folder": "media/"})),
        (ingest(), ingest({"path": f"{Path.cwd()}/data/a.jsonl", "data_folder": str(Path.cwd() / "media")})),
        (ingest({"data_folder": ""}), ingest({"data_folder": str(Path.cwd())})),
        (ingest(), IngestConfig(**dict(reversed(INGEST.items())))),
        (ingest(), ingest({"weight": 2.0, "repeat": 3})),
        (ingest(), ingest({"format": "auto", "limit": None})),
        (ingest(), ingest(cache_folder="elsewhere")),
        (ingest(eval_fraction=0), ingest(eval_fraction=0, seed=7)),
        (ValidateConfig(), ValidateConfig(max_text_chars=200_000, severity={"duplicate": "warn"})),
        (ValidateConfig(), ValidateConfig(severity={"duplicate": "off"})),
        (ValidateConfig(max_reject_fraction=0.5), ValidateConfig(max_reject_fraction=0.05, probe_timeout_s=5)),
        (
            SampleConfig(fps=2),
            SampleConfig(
                num_workers=3,
                memory_gib=1,
                decode_timeout_s=9,
                max_reject_fraction=1,
                frame_cache=None,
                video_backend="qwen_vl_utils",
            ),
        ),
        (ModelConfig(processor_type="qwen3_vl"), ModelConfig(processor_type="qwen3_vl", image_max_pixels=3136)),
    ],
)
def test_what_cannot_change_the_output_is_no_difference(before: Block, now: Block) -> None:
    assert difference(before, now) is None


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (ingest(), ingest({"limit": 5}), "x.datasets.0.limit = None, but this run has 5"),
        (ingest(), ingest(seed=2), "x.seed = 1, but this run has 2"),
        (
            ingest(),
            ingest(datasets=[SOURCE, SOURCE | {"name": "b"}]),
            "x.datasets.1.name = None, but this run has 'b' (and 5 more differ)",
        ),
        (
            ValidateConfig(),
            ValidateConfig(severity={"duplicate": "error"}),
            "x.severity.duplicate = 'not an error', but this run has 'error'",
        ),
        (SampleConfig(), SampleConfig(fps=1), "x.fps = 2.0, but this run has 1.0"),
        (
            ModelConfig(processor_type="qwen3_vl"),
            ModelConfig(processor_type="qwen2_5_vl"),
            "x.processor_type = 'qwen3_vl', but this run has 'qwen2_5_vl'",
        ),
    ],
)
def test_what_changes_the_output_is_named_with_both_values(before: Block, now: Block, said: str) -> None:
    assert difference(before, now) == f"was made with {said}: give this run the former, or make it again"


def test_a_hand_over_without_a_record_says_nothing_about_its_parameters() -> None:
    declared = made_with({}, ingest=ingest(), sample=SampleConfig())["made_with"]
    assert first_difference(declared | {"more": {}}, declared) is None
    assert first_difference({}, declared) == (
        "does not say with which parameters of 'ingest' it was made: make it again"
    )


def test_the_record_is_read_out_of_every_kind_of_hand_over(tmp_path: Path) -> None:
    attrs = made_with({}, sample=SampleConfig())
    record = attrs["made_with"]
    pq.write_table(SCHEMA.empty_table().cast(with_attrs(SCHEMA, attrs)), tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), with_attrs(SCHEMA, attrs)):
        pass
    write_record(tmp_path, attrs)
    assert [read_record(tmp_path / name) for name in ("a.parquet", "a.arrow", ".")] == [record] * 3
    assert pd.read_parquet(tmp_path / "a.parquet").attrs == attrs
    (tmp_path / "none").mkdir()
    pq.write_table(SCHEMA.empty_table(), tmp_path / "none.parquet")
    assert read_record(tmp_path / "none") == read_record(tmp_path / "none.parquet") == {}


def test_a_table_of_the_catalog_keeps_its_record(tmp_path: Path) -> None:
    dataset = TableDataset(filepath=str(tmp_path / "a.parquet"), schema=f"{__name__}.SCHEMA")
    frame = pd.DataFrame({"a": [1]})
    dataset.save(frame)
    assert dataset.load().attrs == {}
    frame.attrs = made_with({}, sample=SampleConfig())
    dataset.save(frame)
    assert dataset.load().attrs == frame.attrs
    assert read_record(tmp_path / "a.parquet") == frame.attrs["made_with"]
