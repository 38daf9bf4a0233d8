"""The speed table runs on any device, is written row by row, and goes on where it was cut off."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_table, report
from benchmarks.gpu_models import TINY, make_batch, make_clip
from benchmarks.gpu_table import FORMS, MEDIA, PUBLISHED, SMALL, by_importance

from qvl_pipeline.families.facts import MODELS


def test_every_row_is_measured_once_and_a_cut_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_table, "WARMUP_STEPS", 0)
    monkeypatch.setattr(gpu_table, "SMALL", TINY)
    measure, measured = gpu_table.measure, []

    def cut_off(config: object, form: str, media: str, *rest: object) -> dict[str, object]:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append((config.model_type, form, media))
        return measure(config, form, media, *rest)

    monkeypatch.setattr(gpu_table, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu_table.main(["--tiny"])
    assert measured[:2] == [("qwen3_vl", "full", "images"), ("qwen2_5_vl", "full", "images")]
    done, measured[:] = list(measured), []
    monkeypatch.setattr(gpu_table, "measure", lambda *args: measured.append(args[1:3]) or measure(*args))
    gpu_table.main(["--tiny"])
    assert len(done) + len(measured) == len(TINY) * len(FORMS) * len(MEDIA)
    rows = json.loads((tmp_path / "gpu_table_tiny.json").read_text())["rows"]
    assert len({(row["model"], row["form"], row["media"]) for row in rows}) == len(rows) == 16
    assert [row["note"] for row in rows if not row["tokens_per_second"]] == []
    with (tmp_path / "gpu_table_tiny.csv").open(newline="") as file:
        assert [row["form"] for row in csv.DictReader(file)] == [row["form"] for row in rows]


@pytest.mark.parametrize("name", sorted(set(SMALL) - set(TINY)))
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("form", ["full", "lora"])
def test_linear_attention_and_experts_are_measured_on_images_and_video(
    name: str, media: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_table, "WARMUP_STEPS", 0)
    with gpu_table.one_rank():
        row = gpu_table.measure(SMALL[name], form, media, torch.device("cpu"), 512, 1)
    assert (row["note"], row["kept_less"]) == ("", "nothing")
    assert row["tokens_per_second"] > 0
    assert {"tiny_qwen3_5": ", torch", "tiny_qwen3_vl_moe": ", grouped_mm"}[name] in row["kernels"]


def test_no_row_is_begun_that_may_not_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_table, "measure", lambda *_: {"note": ""})
    gpu_table.main(["--tiny", "--minutes", "-1"])
    assert not (tmp_path / "gpu_table_tiny.json").exists()


def test_the_table_is_of_published_models_and_begins_with_full_training_on_images() -> None:
    assert set(PUBLISHED) <= set(MODELS)
    rows = by_importance(PUBLISHED)
    assert rows[: len(PUBLISHED)] == [(model, "full", "images") for model in PUBLISHED]
    assert {row[0] for row in rows if row[1:] == ("full", "video")} == set(PUBLISHED)
    assert {"Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3-VL-30B-A3B-Instruct"} <= set(PUBLISHED)
    quantised = {row[0] for row in rows if row[1] == "qlora"}
    assert quantised == {model for model in PUBLISHED if not MODELS[model].text.num_experts}
    assert len(set(rows)) == len(rows) == (len(PUBLISHED) * 3 + len(quantised)) * 2


@pytest.mark.parametrize(("name", "pairs"), [("tiny_qwen3_vl", 247), ("tiny_qwen2_5_vl", 256)])
def test_a_clip_fills_its_pack(name: str, pairs: int) -> None:
    batch = make_batch(TINY[name], [make_clip(TINY[name], 16_384)])
    assert batch.lengths == [16_384]
    assert batch.grid_thw.tolist() == [[pairs, 14, 16]]
    assert len(batch.visual_index) * 4 == len(batch.patches)
