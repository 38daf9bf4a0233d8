from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvl_pipeline.config import BatchingConfig
from qvl_pipeline.data.plan.steps import make_plan
from qvl_pipeline.data.plan.token_statistics import MOST_BINS, _distribution, source_table, token_statistics
from qvl_pipeline.data.plan.tokenization import SCHEMA

IMAGE = {"type": "image", "key": "a.png", "grid_t": 1, "grid_h": 4, "grid_w": 6, "seconds_per_grid": 0.0, "spectra": 0}
CLIP = {"type": "video", "key": "b.mp4", "grid_t": 5, "grid_h": 2, "grid_w": 4, "seconds_per_grid": 0.5, "spectra": 0}
WEIGHTS = {"text": 2.0, "pictures": 0.5, "long": 1.0}


def row(number: int, source: str, length: int, media: list[dict[str, Any]], split: str = "train") -> dict[str, Any]:
    return dict.fromkeys(SCHEMA.names[:6], "") | {
        "sample_id": f"{source}/{number}",
        "source": source,
        "split": split,
        "input_ids": list(range(length)),
        "label_spans": [{"start": length - 3, "end": length}],
        "length": length,
        "supervised_tokens": 3,
        "vit_patches": sum(item["grid_t"] * item["grid_h"] * item["grid_w"] for item in media),
        "spectra": sum(item["spectra"] for item in media),
        "prompt_length": length - 3,
        "media": media,
    }


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row(number, "text", 10 + number, []) for number in range(20)]
    rows += [row(number, "pictures", 40, [IMAGE, CLIP, IMAGE]) for number in range(10)]
    rows += [row(number, "long", 500, [CLIP]) for number in range(2)]
    rows += [row(number, "exam", 10_000, [IMAGE] * 9, split="eval") for number in range(3)]
    path = tmp_path_factory.mktemp("tokens") / "tokenized.arrow"
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for start in range(0, len(rows), 9):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 9], schema=SCHEMA))
    return path


def test_the_source_table_counts_each_sample_once_and_names_those_left_out(tokenized: Path) -> None:
    rows = {row.pop("source"): row for row in source_table(tokenized, ["long/0", "long/1"], WEIGHTS)}
    shares = {source: row.pop("share") for source, row in rows.items()}
    names = ("samples", "tokens", "supervised_tokens", "drawn_per_epoch", "overlong")
    assert rows == {
        "long": dict(zip(names, (0, 0, 0, 1.0, 2), strict=True)),
        "pictures": dict(zip(names, (10, 400, 30, 0.5, 0), strict=True)),
        "text": dict(zip(names, (20, 390, 60, 2.0, 0), strict=True)),
    }
    assert shares == {"long": 0.0, "pictures": 200 / 980, "text": 780 / 980}


def test_the_table_agrees_with_the_plan(tokenized: Path) -> None:
    plan, summary = make_plan(tokenized, BatchingConfig(packing_length=64, num_train_epochs=4), WEIGHTS)
    sources = pa.ipc.open_file(str(tokenized)).read_pandas()[["source", "length"]]
    drawn = sources.iloc[np.concatenate(plan["sample_rows"].tolist())].groupby("source")["length"]
    for row in source_table(tokenized, summary["overlong"], WEIGHTS):
        if row["samples"]:
            assert drawn.count()[row["source"]] == 4 * row["drawn_per_epoch"] * row["samples"]
            assert drawn.sum()[row["source"]] / summary["tokens"] == pytest.approx(row["share"])


def test_statistics_are_those_of_the_training_samples(tokenized: Path) -> None:
    statistics = token_statistics(tokenized)
    totals = {name: (values["n"], values["total"]) for name, values in statistics.items()}
    assert totals == {
        "tokens": (32, 390 + 400 + 1000),
        "supervised_tokens": (32, 96),
        "vit_patches": (32, 10 * (24 + 40 + 24) + 2 * 40),
        "images": (32, 20),
        "clips": (32, 12),
        "image_patches": (20, 20 * 24),
        "clip_patches": (12, 12 * 40),
        "clip_steps": (12, 12 * 5),
        "clip_seconds": (12, 12 * 2.0),
    }
    assert statistics["images"]["bins"] == [
        {"from": 0, "to": 1, "n": 22},
        {"from": 1, "to": 2, "n": 0},
        {"from": 2, "to": 3, "n": 10},
    ]
    assert (statistics["tokens"]["max"], statistics["tokens"]["median"]) == (500, 25.5)


def test_what_no_sample_has_is_left_out(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "text.arrow"), SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row(0, "text", 10, [])], schema=SCHEMA))
    assert list(token_statistics(tmp_path / "text.arrow")) == ["tokens", "supervised_tokens"]


@settings(deadline=None)
@given(
    st.one_of(
        st.lists(st.integers(0, 200_000), min_size=1, max_size=40).map(np.array),
        st.lists(st.floats(0, 1e5, allow_subnormal=False), min_size=1, max_size=40).map(np.array),
    )
)
@example(np.array([0.0, 1.0]))
def test_every_value_is_in_one_bin(values: np.ndarray) -> None:
    bins = _distribution(values)["bins"]
    assert 1 <= len(bins) <= MOST_BINS + 1
    assert [bin_["n"] for bin_ in bins] == [
        int(((values >= bin_["from"]) & (values < bin_["to"])).sum()) for bin_ in bins
    ]
    assert sum(bin_["n"] for bin_ in bins) == len(values)
    assert all(a["to"] == b["from"] for a, b in pairwise(bins))
