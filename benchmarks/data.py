"""Rates and memory of the data stages: `python -m benchmarks.data [section …] [--rows N]`; without sections, all."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

from benchmarks.report import RESULTS, machine, report

# Modules of `benchmarks.data_plane`, each with `measure(rows) -> Section`.
SECTIONS = ("ingest", "probe", "patches", "video", "tokenize")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write `results/data.json`; sections that were not asked for keep their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest dataset")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {sorted(unknown)[0]}; known are {', '.join(SECTIONS)}")
    rows, ratios, targets = _kept(options.sections or SECTIONS)
    for name in options.sections or SECTIONS:
        section = import_module(f"benchmarks.data_plane.{name}").measure(options.rows)
        rows += [
            {"section": name, "case": row.case, "count": row.count, "seconds": row.seconds}
            | {"per_second": row.per_second, "peak_gib": row.peak_gib}
            for row in section.rows
        ]
        ratios |= {f"{name}.{key}": value for key, value in section.ratios.items()}
        targets |= {f"{name}.{key}": value for key, value in section.targets.items()}
    rows.sort(key=lambda row: SECTIONS.index(row["section"]))
    report("data", rows, ratios=ratios, targets=targets)


def _kept(measured: tuple[str, ...] | list[str]) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, str]]:
    """Return what an earlier run on a machine like this found in the sections that are not measured now."""
    path = RESULTS / "data.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("machine") != machine():
        return [], {}, {}
    rows = [row for row in result["rows"] if row["section"] not in measured]
    ratios, targets = (
        {key: value for key, value in result[name].items() if key.partition(".")[0] not in measured}
        for name in ("ratios", "targets")
    )
    return rows, ratios, targets


if __name__ == "__main__":
    main()
