"""The sections of `benchmarks.data`: a module each, with `measure(rows) -> Section`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Row(NamedTuple):
    """One measurement.

    Attributes:
        case: What was done, and to what.
        count: How many items (rows, images, frames, …).
        seconds: Wall-clock time.
        peak_gib: Peak resident memory of the process that did it, native code and all; `None` where it is not measured.
    """

    case: str
    count: int
    seconds: float
    peak_gib: float | None = None

    @property
    def per_second(self) -> float:
        """Items a second."""
        return self.count / self.seconds


class Section(NamedTuple):
    """What a section measured.

    Attributes:
        rows: The measurements.
        ratios: The figures the section is about.
        targets: For each ratio that has one, what it should be, such as `>= 5`.
    """

    rows: list[Row]
    ratios: Mapping[str, float]
    targets: Mapping[str, str]
