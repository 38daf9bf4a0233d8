"""Runs the comparison and reports it."""

from __future__ import annotations

import argparse
from itertools import groupby
from statistics import median
from typing import Any

import benchmarks.preflight
from benchmarks.preflight import duration
from benchmarks.preflight.cpu import expected, measured
from benchmarks.preflight.gpu_rows import expected_gib, measured_rows
from benchmarks.preflight.profiles import rows
from benchmarks.preflight.settings import GRID
from benchmarks.report import report


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=benchmarks.preflight.__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cpu", "gpu", "profiles", "time"))
    options = parser.parse_args()
    if options.only in (None, "profiles"):
        report("preflight_profiles", list(rows()), ratios={}, targets={})
    if options.only in (None, "cpu"):
        _report("preflight_cpu", cpu_rows(), {"median": "<= 0.05", "worst": "<= 0.12"})
    if options.only in (None, "time"):
        _report("preflight_time", list(duration.rows()), {"worst": "<= 0.15"})
    if options.only in (None, "gpu"):
        found = [
            _row(
                f"{name}, {row['blocks']}, recomputed: {row['recomputed']}",
                expected_gib(name, row) * 2**30,
                row["memory_gib"] * 2**30,
            )
            for name, row in measured_rows()
        ]
        _report("preflight_gpu", found, {"worst": "<= 0.10"})


def cpu_rows() -> list[dict[str, Any]]:
    """Measure the grid; settings with the same number of ranks in the same processes."""
    found = []
    for _, group in groupby(sorted(GRID, key=lambda setting: setting.ranks), key=lambda setting: setting.ranks):
        settings = list(group)
        for setting, peak in zip(settings, measured(settings), strict=True):
            found.append(_row(f"{setting.name}, {setting.family}", expected(setting), peak))
            print(found[-1], flush=True)
    return found


def _row(setting: str, expected_bytes: float, measured_bytes: float) -> dict[str, Any]:
    return {
        "setting": setting,
        "expected_mib": expected_bytes / 2**20,
        "measured_mib": measured_bytes / 2**20,
        "error": expected_bytes / measured_bytes - 1,
    }


def _report(name: str, rows: list[dict[str, Any]], targets: dict[str, str]) -> None:
    errors = [abs(row["error"]) for row in rows if not row.get("rough")]
    report(name, rows, ratios={"median": median(errors), "worst": max(errors)}, targets=targets)


if __name__ == "__main__":
    main()
