"""What works with which family, or why not: read by configuration checks, by `kedro models`, and by docs/models.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qvl_pipeline.families.family import ModelFamily


@dataclass(frozen=True)
class Capability:
    """Something that a run may ask for.

    Attributes:
        title: What it is, for people.
        key: Parameter by which it is asked for: block and name.
        asked: Whether a value of the parameter asks for it.
    """

    title: str
    key: tuple[str, str]
    asked: Callable[[Any], bool]


CAPABILITIES: Mapping[str, Capability] = {
    "packing": Capability("packs of several samples", ("batching", "packing"), bool),
    "padded_rows": Capability("padded rows, to compare with", ("train", "use_rmpad"), lambda value: not value),
    "sp": Capability("sequence parallelism", ("train", "sp_ulysses_degree"), lambda value: value > 1),
    "ep": Capability("expert parallelism", ("", ""), lambda value: False),  # no parameter asks for it yet
    "adapters": Capability("LoRA and DoRA", ("adapter", "type"), lambda value: value != "none"),
    "quantized_base": Capability(
        "a quantised base (QLoRA)", ("adapter", "quantize_base"), lambda value: value != "none"
    ),
    "compile": Capability("torch.compile", ("train", "torch_compile"), lambda value: value is True),
    "liger": Capability("Liger's kernels", ("train", "use_liger_kernel"), lambda value: value is True),
    "recompute": Capability("gradient checkpointing", ("train", "gradient_checkpointing"), bool),
    "preflight": Capability(
        "memory and time foretold", ("train", "gradient_checkpointing"), lambda value: value == "auto"
    ),
    "fp16": Capability("float16", ("train", "fp16"), bool),
    "muon": Capability("Muon", ("train", "optim"), lambda value: value == "muon"),
}


def works(family: ModelFamily, name: str) -> str:
    """Say whether a capability works with a family: `yes`, `yes: <what to know>`, or `no: <why>`."""
    if name in family.unsupported:
        return f"no: {family.unsupported[name]}"
    return f"yes: {family.notes[name]}" if name in family.notes else "yes"


def capability_table(families: Mapping[str, ModelFamily]) -> list[list[str]]:
    """Return a row for each capability: its title, and what each family says of it."""
    return [
        [capability.title, *(works(family, name) for family in families.values())]
        for name, capability in CAPABILITIES.items()
    ]
