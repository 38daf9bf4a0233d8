"""What every benchmark leaves behind: a table to read, and a file with the hardware and versions it holds for."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "liger-kernel", "flash-attn", "pyarrow", "daft", "av", "torchcodec", "decord")


def report(
    name: str, rows: Sequence[Mapping[str, Any]], *, ratios: Mapping[str, float], targets: Mapping[str, str]
) -> None:
    """Print the rows as a table and the ratios beside their targets, then write both to `results/<name>.json`.

    Args:
        name: The benchmark's module name.
        rows: What was measured; all rows have the same keys, which carry the units.
        ratios: The figures the benchmark is about, all from this one run.
        targets: For each ratio that has one, what it should be, such as `>= 1.5`.
    """
    print_table(rows)
    for key, value in ratios.items():
        print(f"{key}: {value:.4g}" + (f" (target {targets[key]})" if key in targets else ""))
    RESULTS.mkdir(exist_ok=True)
    result = {"rows": list(rows), "ratios": dict(ratios), "targets": dict(targets), "machine": machine()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same keys in columns; plain text, because a bare GPU node has no table library."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def machine() -> dict[str, Any]:
    """Hardware and versions that the figures hold for."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "versions": {package: found for package in _PACKAGES if (found := _version(package))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
