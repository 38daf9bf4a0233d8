from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import data, report


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "RESULTS", tmp_path)
    return tmp_path / "data.json"


def test_ingest_counts_every_row_in_a_process_of_its_own(results: Path) -> None:
    data.main(["ingest", "--rows", "3000"])
    rows = json.loads(results.read_text())["rows"]
    assert [row["count"] for row in rows] == [300, 3000]
    assert all(0.1 < row["peak_gib"] < 2 for row in rows)
    assert rows[1]["per_second"] == rows[1]["count"] / rows[1]["seconds"]


def test_sections_that_are_not_asked_for_keep_their_figures(results: Path) -> None:
    row = {"section": "probe", "case": "x", "count": 1, "seconds": 1.0, "per_second": 1.0, "peak_gib": None}
    kept = {"rows": [row], "ratios": {"probe.a": 1.0}, "targets": {"probe.a": ">= 1"}, "machine": report.machine()}
    results.write_text(json.dumps(kept))
    data.main(["ingest", "--rows", "100"])
    found = json.loads(results.read_text())
    assert [row["section"] for row in found["rows"]] == ["ingest", "ingest", "probe"]
    assert found["ratios"]["probe.a"] == 1.0
    results.write_text(json.dumps(kept | {"machine": "another"}))
    data.main(["ingest", "--rows", "100"])
    assert "probe.a" not in json.loads(results.read_text())["ratios"]


def test_tokenising_is_compared_on_the_same_samples(results: Path) -> None:
    data.main(["tokenize", "--rows", "16000"])
    found = json.loads(results.read_text())
    cases = [row["case"] for row in found["rows"]]
    assert cases == [f"{who}: {what}" for who in ("this project", "processor") for what in ("text", "image", "clip")]
    seconds = [row["seconds"] for row in found["rows"]]
    assert found["ratios"]["tokenize.over_processor"] == pytest.approx(sum(seconds[3:]) / sum(seconds[:3]))


def test_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data.main(["ingst"])
    assert "there is no section ingst" in capsys.readouterr().err


def test_the_cost_of_a_small_image_is_measured(results: Path) -> None:
    data.main(["patches"])
    [row] = json.loads(results.read_text())["rows"]
    assert json.loads(results.read_text())["ratios"]["patches.ms_an_image"] == 1000 * row["seconds"] / row["count"]
