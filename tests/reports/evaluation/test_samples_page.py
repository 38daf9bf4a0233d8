from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvl_pipeline.reports.evaluation.samples_page import PART, write_samples_page
from qvl_pipeline.reports.thumbnail import Thumbnail
from tests.reports.evaluation.test_report import NASTY, PIXEL, Page, prediction


def table(samples: int = 3 * PART) -> pd.DataFrame:
    rows = [prediction(number, f"kind {number % 3}", number % 2 == 0) for number in range(samples)]
    return pd.DataFrame(rows).assign(source=[f"source {number % 5}" for number in range(samples)])


def write(folder: Path, predictions: pd.DataFrame, most: int = 1000) -> Path:
    media = lambda sample_id: [[Thumbnail(PIXEL, f"picture of {sample_id}")]]  # noqa: E731
    write_samples_page(folder, title="tiny", predictions=predictions, media=media, most=most)
    return folder


def part(folder: Path, number: int) -> list[str]:
    return json.loads(re.fullmatch(rf"part\({number}, (.*)\)\n", (folder / f"part-{number:05d}.js").read_text())[1])


def index(folder: Path) -> dict[str, Any]:
    return json.loads(re.search(r"const index = (.*), total", (folder / "index.html").read_text())[1])


def test_every_sample_is_in_a_part_where_the_index_says(tmp_path: Path) -> None:
    predictions = table()
    folder = write(tmp_path / "samples", predictions)
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", *(f"part-0000{n}.js" for n in range(3))]
    found = index(folder)
    rows = predictions.set_index("sample_id")
    seen = []
    for row, right in enumerate(found["right"]):
        card = part(folder, row // found["part"])[row % found["part"]]
        sample = rows.loc[re.search(r'title="(made/\d+)"', card)[1]]
        seen.append(sample.name)
        assert sample["kind"] == found["kinds"][found["kind"][row]]
        assert sample["source"] == found["sources"][found["source"][row]]
        assert sample["trained_score"] == right
        assert f"picture of {sample.name}" in card
    assert sorted(seen) == sorted(rows.index)


def test_samples_without_an_answer_are_left_out(tmp_path: Path) -> None:
    predictions = table(10).astype({"trained_answer": "string"})
    predictions.loc[3, "trained_answer"] = pd.NA
    folder = write(tmp_path / "samples", predictions)
    assert len(index(folder)["right"]) == 9
    assert "total = 9" in (folder / "index.html").read_text()


def test_what_a_filter_leaves_is_in_few_parts(tmp_path: Path) -> None:
    found = index(write(tmp_path / "samples", table(12 * PART)))
    wrong = [row // PART for row, right in enumerate(found["right"]) if not right and found["kind"][row] == 1]
    assert len(set(wrong)) == len(wrong) / PART


@pytest.mark.parametrize("most", [0, 7])
def test_no_more_than_so_many_are_shown_evenly(tmp_path: Path, most: int) -> None:
    folder = write(tmp_path / "samples", table(), most)
    found = index(folder)
    assert len(found["right"]) == most
    assert len(list(folder.iterdir())) == (2 if most else 1)
    assert len(set(found["kind"])) == min(most, 3)
    assert f"total = {3 * PART}" in (folder / "index.html").read_text()


def test_text_of_the_data_is_shown_not_obeyed_and_nobody_is_asked_for_anything(tmp_path: Path) -> None:
    predictions = table().assign(kind=NASTY, trained_answer=NASTY)
    folder = write(tmp_path / "samples", predictions)
    html = (folder / "index.html").read_text()
    assert html.count("<script") == html.count("</script>") == 1
    assert not re.search(r"url\(|@import|https?:", html)
    assert index(folder)["kinds"] == [NASTY]
    card = part(folder, 0)[0]
    assert "<script" not in card
    assert NASTY in Page(card).text


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, table()) for name in ("first", "second"))
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [
        path.read_bytes() for path in sorted(second.iterdir())
    ]
