"""What the memory table of docs/adapters.md says, measured anew on a smaller pack; and that the page says it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import memory
from benchmarks.report import RESULTS

from tests.benchmarks.afresh import call

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
RANKS = 2
KINDS = ("weights", "gradients", "optimizer", "activations")
MEASURED = (
    "full",
    "full, accumulate_sharded",
    "full, adamw_8bit",
    "full, adamw_bf16",
    "full, selective",
    "full, recomputed",
    "frozen vision, replicated",
    "lora",
    "qlora",
)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["training"]: row for row in call("benchmarks.memory", "measure", names=MEASURED, tokens=128)}


@pytest.mark.parametrize(
    ("training", "trained", "frozen", "gradient", "state"),
    [
        # Bytes of a parameter over all ranks; gradients are each rank's own where they are whole until the exchange.
        ("full", 4, 2, 4 * RANKS, 8),
        ("full, accumulate_sharded", 4, 2, 4, 8),
        ("full, adamw_bf16", 2, 2, 4 * RANKS, 4),
        ("full, selective", 4, 2, 4 * RANKS, 8),
        ("frozen vision, replicated", 4, 2 * RANKS, 4 * RANKS, 8),
        ("lora", 4, 2, 4 * RANKS, 8),
    ],
)
def test_bytes_of_weights_gradients_and_optimizer_are_exact(
    training: str, trained: int, frozen: int, gradient: int, state: int, rows: dict[str, dict[str, Any]]
) -> None:
    row = rows[training]
    assert row["weights"] * RANKS == trained * row["trained"] + frozen * row["frozen"]
    assert row["gradients"] * RANKS == gradient * row["trained"]
    assert row["optimizer"] * RANKS == state * row["trained"]


def test_eight_bit_state_is_little_over_two_bytes(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["full, adamw_8bit"]
    assert 2 < row["optimizer"] * RANKS / row["trained"] < 2.3


def test_a_quantised_base_is_little_over_half_a_byte(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["qlora"]
    quantized = row["weights"] * RANKS - 4 * row["trained"] - 2 * row["frozen"]
    # Four bits a number, a byte of each 64, and four bytes of each 16,384; shards of so small matrices are filled up.
    assert quantized / row["quantized"] == pytest.approx(1 / 2 + 1 / 64 + 4 / 16384, rel=0.01)


def test_each_way_to_fit_holds_less_of_what_it_is_for(rows: dict[str, dict[str, Any]]) -> None:
    activations = {name: row["activations"] for name, row in rows.items()}
    assert activations["full, recomputed"] < 0.5 * activations["full, selective"]
    assert activations["full, selective"] < 0.7 * activations["full"]
    assert activations["lora"] < activations["full"]
    together = {name: row["bytes"] for name, row in rows.items()}
    assert (
        together["qlora"]
        < together["lora"]
        < together["full, adamw_bf16"]
        < together["full, adamw_8bit"]
        < together["full"]
    )


def test_the_page_has_the_figures_of_the_results() -> None:
    results = json.loads((RESULTS / "memory.json").read_text())["rows"]
    assert [row["training"] for row in results] == list(memory.ROWS)
    table = re.findall(r"^\| `(.+?)` \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \|$", DOCS.read_text(), re.M)
    assert table == [(row["training"], *(f"{row[kind] / 1e6:.2f}" for kind in KINDS)) for row in results]
