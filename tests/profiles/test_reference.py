"""The reference is that of the declarations, and editors accept exactly what the pipelines accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.profiles.reference import PAGE, SCHEMA, main, parameters_page, parameters_schema

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "conf").glob("*/parameters*.yml"))


def problems(parameters: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(parameters_schema()).iter_errors(parameters)]


def test_both_files_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (PAGE, SCHEMA):
        path.parent.mkdir()
    main()
    for path in (PAGE, SCHEMA):
        assert path.read_text() == (ROOT / path).read_text(), "run `make docs`"


def test_every_parameter_has_a_meaning() -> None:
    definitions = parameters_schema()["$defs"].values()
    blocks = {definition["title"]: definition for definition in definitions if definition["type"] == "object"}
    assert {block.__name__ for block in BLOCKS.values()} <= blocks.keys()
    keys = {f"{title}.{name}": key for title, block in blocks.items() for name, key in block["properties"].items()}
    assert [name for name, key in keys.items() if not key.get("description")] == []


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_editors_accept_the_shipped_profiles(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text()) or {}) == []


@pytest.mark.parametrize(
    "accepted",
    [
        {"train": {"report_to": "none"}, "compare": {"runs": "a+b"}},
        {"replay": None, "ingest": {}},
        {"train": {"gradient_checkpointing": ["llm"], "learning_rates": {"vit": 1e-6}}},
    ],
)
def test_editors_accept_what_the_pipelines_accept(accepted: dict[str, Any]) -> None:
    assert problems(accepted) == []


@pytest.mark.parametrize(
    "refused",
    [
        {"trian": {}},
        {"train": {"learning_rat": 1}},
        {"train": {"learning_rate": 0}},
        {"train": {"learning_rates": {"tower": 1e-6}}},
        {"ingest": {"datasets": [{"pth": "a"}]}},
        {"model": {"processor_type": "qwen"}},
    ],
)
def test_editors_refuse_what_the_pipelines_refuse(refused: dict[str, Any]) -> None:
    assert len(problems(refused)) == 1


def test_the_page_says_what_decides() -> None:
    cells = [line.split(" | ") for line in parameters_page().splitlines() if " | " in line]
    decides = {row[0].strip("| `"): row[3] for row in cells}
    assert decides["learning_rate"] == "yes"
    assert decides["save_steps"] == decides["ddp_timeout"] == decides["memory_limit_gib"] == "no"
    assert decides["attn_implementation"] == "yes, but not frames and tokens"
    assert decides["weight"] == "yes, but not frames"
