from __future__ import annotations

from pathlib import Path

import pandas as pd
from benchmarks import plan_memory


def test_what_is_measured_goes_through_the_whole_plan(tmp_path: Path) -> None:
    tokenized, plan, frames = tmp_path / "tokenized.arrow", tmp_path / "plan.parquet", tmp_path / "frames"
    plan_memory._write_samples(tokenized, 3000)
    plan_memory.make(tokenized, plan)
    plan_memory.start(tokenized, plan)
    plan_memory.share_out(tokenized, plan)
    assert sorted(row for rows in pd.read_parquet(plan)["sample_rows"] for row in rows) == list(range(3000))
    assert plan.with_suffix(".copy").read_bytes() != b""
    plan_memory._write_index(frames, 10)
    plan_memory.open_index(frames)
