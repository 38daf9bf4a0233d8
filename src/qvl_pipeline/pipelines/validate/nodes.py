"""Nodes of the `validate` stage."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qvl_pipeline.config import ValidateConfig


def validate_rows(
    samples: pd.DataFrame, rejects: pd.DataFrame, validate: ValidateConfig
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Apply every rule to every sample, and print what came of it.

    Args:
        samples: Rows that could be read.
        rejects: Rows that could not.
        validate: Limits.

    Returns:
        The tables `valid_samples`, `quarantine` and `media_index`, and the report.

    Raises:
        TooManyRejectsError: Too much of the dataset is unusable.
    """
    from qvl_pipeline.data.tables import REJECTS, SAMPLES, from_frame, to_frame
    from qvl_pipeline.data.validate import check_reject_fraction, validate_samples

    outcome = validate_samples(from_frame(samples, SAMPLES), from_frame(rejects, REJECTS), validate)
    quarantine = to_frame(outcome.quarantine)
    Console().print(summarize(outcome.report, quarantine, rejects))
    check_reject_fraction(outcome.report, validate)
    return to_frame(outcome.valid_samples), quarantine, to_frame(outcome.media_index), outcome.report


def summarize(report: dict[str, Any], quarantine: pd.DataFrame, rejects: pd.DataFrame) -> Group:
    """Make the block that is printed: the counts, and each broken rule with an example.

    Args:
        report: Report of the validation.
        quarantine: Samples that broke a rule.
        rejects: Rows that could not be read.
    """
    counts = "ingested {ingested:,} = valid {valid:,} + quarantined {quarantined:,} + rejected {rejected:,}"
    line = counts.format(**report["counts"])
    ids = rejects["source"].astype(str) + "/" + rejects["row"].astype(str)
    examples = pd.concat([rejects.assign(sample_id=ids), quarantine]).groupby("rule").first()
    table = Table("rule", "rows", "for example")
    for rule, count in report["rules"].items():
        if count:
            example = examples.loc[rule]
            # `Text`, because a detail may hold what rich takes for markup.
            table.add_row(rule, f"{count:,}", Text(f"{example['sample_id']}: {example['detail']}"))
    return Group(line, table) if table.row_count else Group(line)
