"""What works with which family: said once, shown by a command and on a page, and held to by the configuration."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from qvl_pipeline import config
from qvl_pipeline.cli.models import models
from qvl_pipeline.config.across import find_conflicts
from qvl_pipeline.config.base import Block
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.capabilities import CAPABILITIES, capability_table, works

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def blocks(family: str, **changed: dict) -> dict[str, Block]:
    source = {"name": "a", "path": "a.jsonl", "data_type": "jsonl"}
    given = {"ingest": {"datasets": [source]}, "model": {"processor_type": family}} | changed
    return {name: block(**given.get(name, {})) for name, block in config.BLOCKS.items() if name != "replay"}


def test_families_speak_of_capabilities_that_there_are_and_of_each_in_one_way() -> None:
    for family in FAMILIES.values():
        assert {*family.unsupported, *family.notes} <= set(CAPABILITIES)
        assert not set(family.unsupported) & set(family.notes)
    for capability in CAPABILITIES.values():
        block, key = capability.key
        assert not key or key in config.BLOCKS[block].model_fields


def test_what_does_not_work_is_refused_with_the_reason_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = blocks("qwen3_vl_moe", train={"torch_compile": True})
    found = dict(find_conflicts(asked))
    reason = FAMILIES["qwen3_vl_moe"].unsupported["compile"]
    assert found == {("train", "torch_compile"): f"torch.compile does not work with Qwen3-VL-MoE: {reason}"}
    assert dict(find_conflicts(blocks("qwen3_vl", train={"torch_compile": True}))) == {}
    qlora = {"type": "lora", "quantize_base": "nf4"}
    [(key, sentence)] = find_conflicts(blocks("qwen3_vl_moe", adapter=qlora))
    assert (key, sentence.partition(":")[0]) == (
        ("adapter", "quantize_base"),
        "a quantised base (QLoRA) does not work with Qwen3-VL-MoE",
    )
    assert dict(find_conflicts(blocks("qwen3_5", adapter=qlora))) == {}
    alone = dataclasses.replace(FAMILIES["qwen3_vl"], unsupported={"sp": "so it is", "adapters": "nor are they"})
    monkeypatch.setitem(FAMILIES, "qwen3_vl", alone)
    asked = blocks("qwen3_vl", train={"sp_ulysses_degree": 2}, adapter={"type": "lora"})
    assert set(dict(find_conflicts(asked))) == {("train", "sp_ulysses_degree"), ("adapter", "type")}


@pytest.mark.parametrize(
    ("family", "block", "values", "what"),
    [
        ("qwen3_vl", "train", {"router_aux_loss_coef": 0.1}, "experts"),
        ("qwen3_5", "model", {"experts_implementation": "eager"}, "experts"),
        ("qwen2_5_vl", "model", {"linear_attn_implementation": "torch"}, "linear attention"),
    ],
)
def test_what_is_said_of_parts_that_a_family_has_not_is_refused(
    family: str, block: str, values: dict, what: str
) -> None:
    changed = {block: values} if block == "train" else {"model": {"processor_type": family, **values}}
    [(key, sentence)] = find_conflicts(blocks(family, **changed))
    assert key == (block, next(iter(values)))
    assert sentence == f"{FAMILIES[family].title} has no {what}: leave it out"


def test_the_command_and_the_page_show_the_same_table() -> None:
    shown = re.sub(r"[^\w]+", "", CliRunner().invoke(models, terminal_width=400, env={"COLUMNS": "400"}).output)
    for row in capability_table(FAMILIES):
        assert re.sub(r"[^\w]+", "", row[0]) in shown
        assert f"| {' | '.join(row)} |" in PAGE.read_text()
    assert works(FAMILIES["qwen3_vl"], "sp") == "yes"
