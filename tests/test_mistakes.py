"""docs/mistakes.md: every mistake on it is refused by the sentence beside it, before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl_pipeline.errors import UserError
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.origins import Origins
from qvl_pipeline.training.early import check_before_preparing

PAGE = Path(__file__).parents[1] / "docs" / "mistakes.md"
ORIGINS = Origins({}, [Path("conf/mine")])
# What a profile has to say at least.
BASE = {
    "ingest": {"datasets": [{"path": "rows.json", "data_type": "json"}]},
    "model": {"processor_type": "qwen3_vl"},
}
ASKED = ("sample", "model", "batching", "train", "adapter", "ingest")


def rows() -> list[tuple[str, str]]:
    """Return what is written and what is said of the tables of mistakes, as YAML and as plain text."""
    tables = PAGE.read_text().partition("## What the guide itself")[0]
    cells = re.findall(r"^\| (`.+?`) \| (.+?) \| (?:.*)\|$", tables, re.M)
    return [
        ("\n".join(re.findall(r"`([^`]+)`", written)), said.replace("\\|", "|").replace("\\*", "*"))
        for written, said in cells
    ]


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(under[key], value) for key, value in over.items() if isinstance(under.get(key), dict)}
    return {**under, **over, **both}


def refusal(written: str, scratch: Path) -> list[str]:
    """Return what a run would be refused with: by its parameters, or by the base model and the machine."""
    try:
        blocks = check_parameters(merged(BASE, yaml.safe_load(written)), ORIGINS)
        check_before_preparing(**{name: blocks[name] for name in ASKED}, scratch=scratch)
    except UserError as error:
        lines = str(error).splitlines()
        return [line.strip() for line in (lines[1:] if lines[0] == "the parameters cannot be used:" else lines)]
    return []


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def test_the_page_has_mistakes_of_every_block_and_many_across_blocks() -> None:
    blocks = [tuple(yaml.safe_load(written)) for written, _ in rows()]
    assert len(rows()) == len(set(rows())) >= 100
    assert {name for names in blocks for name in names} >= {*BASE, *ASKED, "evaluate", "validate", "data_engine"}
    assert sum(len(names) > 1 for names in blocks) >= 15


def test_what_the_mistakes_are_made_in_is_right(tmp_path: Path) -> None:
    assert refusal("{}", tmp_path) == []


@pytest.mark.parametrize(("written", "said"), rows(), ids=[written.replace("\n", " ") for written, _ in rows()])
def test_the_mistake_is_refused_in_one_sentence(written: str, said: str, tmp_path: Path) -> None:
    found = refusal(written, tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(said.removesuffix(" …"))
    assert list(tmp_path.iterdir()) == []
