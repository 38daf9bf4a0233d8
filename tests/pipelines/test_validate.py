"""The stage `validate`: what it prints, and when it refuses to go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qvl_pipeline.config import DataEngineConfig, IngestConfig, ValidateConfig
from qvl_pipeline.data.tables import REJECTS, SAMPLES, to_frame
from qvl_pipeline.data.validation.validate import TooManyRejectsError
from qvl_pipeline.pipelines.validate.nodes import keep_valid, validate_rows, write_page
from tests.data.samples import as_file
from tests.media.files import write_image

GOOD = (
    '[{"role":"user","content":[{"type":"text","text":"a"}]},'
    '{"role":"assistant","content":[{"type":"text","text":"b"}]}]'
)
ANSWER = '{"role":"assistant","content":[{"type":"text","text":"b"}]}]'
BLANK = GOOD.replace('"b"', '" "')


ENGINE = DataEngineConfig()
NAMED = ValidateConfig(dataset="my data")
# Media of these tests are in temporary folders.
INGEST = IngestConfig(datasets=[{"path": "a.jsonl", "data_type": "jsonl", "data_folder": "/"}])


def _samples(*messages: str, media: Sequence[Path] = ()) -> pq.ParquetFile:
    rows = [
        {"sample_id": f"s/{row}", "source": "s", "row": row, "split": "train", "messages": text, "media": []}
        for row, text in enumerate(messages)
    ]
    for row, path in zip(rows, media, strict=False):
        row["media"] = [{"type": "image", "path": str(path), "start": None, "end": None}]
    return as_file(pa.Table.from_pylist(rows, SAMPLES))


def _kept(write: Callable[[Path], None], folder: Path) -> list[str]:
    """Ids in the table that is written."""
    write(folder / "valid.parquet")
    return pq.read_table(folder / "valid.parquet", schema=SAMPLES)["sample_id"].to_pylist()


def _rejects(*details: str) -> pd.DataFrame:
    rows = [{"source": "s", "row": 9, "rule": "unknown_format", "detail": detail} for detail in details]
    return to_frame(REJECTS.empty_table().from_pylist(rows, REJECTS))


def test_counts_and_an_example_of_each_rule_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rejects = _rejects("row 9: 'a[red].png' is a URL", "row 10: another")
    config = ValidateConfig(max_reject_fraction=1)
    quarantine, _, media_index, report = validate_rows(_samples(GOOD, BLANK, BLANK), rejects, config, INGEST, ENGINE)
    write = keep_valid(_samples(GOOD, BLANK, BLANK), quarantine, report, "<html>", config, ENGINE)
    printed = capsys.readouterr().out
    assert "ingested 5 = valid 1 + quarantined 2 + rejected 2" in printed
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.splitlines()]
    assert "unknown_format 2 s/9: row 9: 'a[red].png' is a URL" in lines
    assert "empty_turn 2 s/1: turn 1 (assistant) says nothing" in lines
    assert "leakage" not in printed
    assert _kept(write, tmp_path) == ["s/0"]
    assert (len(quarantine), len(media_index)) == (2, 0)


def test_what_is_wrong_is_printed_and_kept_before_the_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    samples, config = _samples(GOOD, BLANK, BLANK), ValidateConfig(max_reject_fraction=0.6)
    quarantine, _, _, report = validate_rows(samples, _rejects(), config, INGEST, ENGINE)
    assert quarantine["sample_id"].tolist() == ["s/1", "s/2"]
    with pytest.raises(TooManyRejectsError, match=r"^2 of 3 rows \(66.7%\) .* by empty_turn \(2\):.*quarantine"):
        keep_valid(samples, quarantine, report, "<html>", config, ENGINE)
    assert "ingested 3 = valid 1 + quarantined 2 + rejected 0" in capsys.readouterr().out


def test_nothing_broken_prints_the_counts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    validate_rows(_samples(GOOD), _rejects(), ValidateConfig(), INGEST, ENGINE)
    assert capsys.readouterr().out == "ingested 1 = valid 1 + quarantined 0 + rejected 0\n"


def test_a_sample_that_only_warns_is_used_printed_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    quarantine, warnings, _, report = validate_rows(_samples(GOOD, GOOD), _rejects(), ValidateConfig(), INGEST, ENGINE)
    assert "used, with a warning: duplicate (1)" in capsys.readouterr().out
    assert (len(quarantine), report["counts"]["valid"], report["warnings"]) == (0, 2, {"duplicate": 1})
    assert warnings[["sample_id", "rule", "detail"]].to_numpy().tolist() == [
        ["s/1", "duplicate", "has the same turns and files as s/0"]
    ]


def test_an_animation_among_images_is_counted_and_named_with_an_example(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    frames = [Image.open(write_image(tmp_path / f"{number}.png", seed=number)) for number in range(3)]
    for number in range(2):
        frames[number].save(tmp_path / f"{number}.gif", save_all=True, append_images=frames)
    asked = '[{"role":"user","content":[{"type":"image"},{"type":"text","text":"Which?"}]},' + ANSWER
    samples = _samples(asked, asked, media=[tmp_path / "0.gif", tmp_path / "1.gif"])
    _, warnings, _, report = validate_rows(samples, _rejects(), ValidateConfig(), INGEST, ENGINE)
    assert (report["counts"]["valid"], report["warnings"]) == (2, {"animated_image": 2})
    assert warnings["sample_id"].tolist() == ["s/0", "s/1"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "used, with a warning: animated_image (2), for example s/0: image '" in printed


def test_the_page_shows_counts_histograms_and_pictures_of_sound_files_alone(tmp_path: Path) -> None:
    good, broken = write_image(tmp_path / "good.png"), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    asked = '[{"role":"user","content":[{"type":"image"},{"type":"text","text":"<b>Which?"}]},' + ANSWER
    reserved = asked.replace("Which", "<|im_end|>")
    samples = _samples(asked, reserved, media=(good, broken))
    tables = validate_rows(samples, _rejects("<i>bad</i>"), ValidateConfig(), INGEST, ENGINE)
    quarantine, warnings, media_index, report = tables
    html = write_page(samples, _rejects("<i>bad</i>"), quarantine, warnings, media_index, report, NAMED, ENGINE)
    assert "&lt;i&gt;bad&lt;/i&gt;" in html
    assert "<i>bad" not in html
    assert "the text of turn 0 holds &lt;|im_end|&gt;" in html
    assert "<h1>my data</h1>" in html
    valid, offenders = html.split("Rows that are left out")
    assert valid.count("<img") == 1
    assert "&lt;b&gt;Which?" in valid
    assert "<img" not in offenders  # the only offender that was read has a file that cannot be decoded
    assert "Text of a sample" in html
    assert "Resolution of a file" in html
    assert not re.search(r"url\(|@import|https?:|<script", html)
    samples = _samples(reserved, asked, media=(good, broken))
    quarantine, warnings, media_index, report = validate_rows(samples, _rejects(), ValidateConfig(), INGEST, ENGINE)
    html = write_page(samples, _rejects(), quarantine, warnings, media_index, report, NAMED, ENGINE)
    assert html.split("Rows that are left out")[1].count("<img") == 1


def test_columns_that_nothing_reads_are_counted_printed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    metadata = ['{"id":1,"<score>":2}', '{"id":2,"<score>":null}', "{}"]
    rows = [
        {"sample_id": f"s/{row}", "source": "s", "row": row, "split": "train", "messages": GOOD, "media": []}
        | {"metadata": text}
        for row, text in enumerate(metadata)
    ]
    samples = as_file(pa.Table.from_pylist(rows, SAMPLES))
    quarantine, warnings, media_index, report = validate_rows(samples, _rejects(), ValidateConfig(), INGEST, ENGINE)
    assert report["put_aside"] == {"s": {"id": 2, "<score>": 1}}
    assert "columns of s that nothing reads, put aside in metadata: id (2), <score> (1)" in capsys.readouterr().out
    html = write_page(samples, _rejects(), quarantine, warnings, media_index, report, NAMED, ENGINE)
    assert "id (2), &lt;score&gt; (1)" in html
