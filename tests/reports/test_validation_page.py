from __future__ import annotations

import re
from typing import Any

import orjson
import pandas as pd
import pyarrow as pa

from qvl_pipeline.reports.validation_page import VALID_SHOWN, render_validation
from tests.reports.evaluation.test_report import PIXEL, Page

LOST = pd.DataFrame({"sample_id": [], "source": [], "row": [], "rule": [], "detail": []})


def sample(number: int, source: str, *media: tuple[str, str], said: str = "An answer.", **turn: Any) -> dict[str, Any]:
    asked = [{"type": kind} for kind, _ in media] + [{"type": "text", "text": f"question {number} of {source}"}]
    answered = {"role": "assistant", "content": [{"type": "text", "text": said}], **turn}
    return {
        "sample_id": f"{source}/{number}",
        "source": source,
        "split": "train",
        "messages": orjson.dumps([{"role": "user", "content": asked}, answered]).decode(),
        "media": [{"type": kind, "path": path} for kind, path in media],
    }


def page(samples: list[dict[str, Any]], **changed: Any) -> str:
    given = {
        "dataset": "my data",
        "report": {
            "counts": {"ingested": 9, "valid": 9, "quarantined": 0, "rejected": 0},
            "rules": {},
            "put_aside": {},
        },
        "samples": pa.Table.from_pylist(samples).to_batches(),
        "rejects": LOST.drop(columns="sample_id"),
        "quarantine": LOST,
        "warnings": LOST,
        "media_index": pd.DataFrame(columns=["type", "width", "height", "duration_s", "fps"]),
        "thumbnail": lambda kind, path: PIXEL if kind == "image" else None,
    }
    return render_validation(**given | changed)


def test_the_title_is_the_name_of_the_data_set() -> None:
    sources = [sample(0, f"source_{number}") for number in range(22)]
    assert "<h1>my data</h1>" in page(sources)
    assert "found in 22 sources" in page(sources)
    assert "<h1>source_0</h1>" in page(sources[:1], dataset=None)


def test_valid_samples_of_all_sources_are_shown_those_with_media_first() -> None:
    many = [sample(number, "text") for number in range(50)]
    few = [sample(0, "pictures"), sample(1, "pictures", ("image", "a.png")), sample(2, "pictures", ("video", "b.mp4"))]
    broken = LOST.assign(sample_id=["text/0"], source="text", rule="x", detail="y", row=0)
    html = page(many + few, quarantine=broken)
    shown = html.split("Samples that go on")[1].split("Rows that are left out")[0]
    found = re.findall(r'class="origin">([^<,]*)', shown)
    assert len(found) == VALID_SHOWN
    assert found[:4] == ["pictures/1", "text/1", "pictures/2", "text/2"]
    assert "text/0" not in found
    assert shown.count("<img") == 1
    assert "video b.mp4" in shown
    assert "[image] question 1 of pictures" in Page(shown).text


def test_calls_of_tools_are_shown() -> None:
    called = [{"name": "weather", "arguments": {"of": "Rome"}}]
    html = page([sample(0, "tools", said="", tool_calls=called)])
    assert '{"tool_calls":[{"name":"weather","arguments":{"of":"Rome"}}]}' in Page(html).text


def test_labels_of_bins_are_written_out_and_have_the_width_that_they_need() -> None:
    texts = [sample(number, "long", said="x" * (100 + 2_000 * number)) for number in range(40)]
    html = page(texts)
    labels = re.findall(r"<span>([\d,]+ to [\d,]+)</span>", html)
    assert len(labels) == 12
    assert labels[-1] == "45,500 to 78,100"  # twelve equal factors from 118 to 78,118
    assert "e+0" not in html
    assert ".bins { display: grid; grid-template-columns: max-content" in html
