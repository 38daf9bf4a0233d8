"""Nodes of the `validate` stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qvl_pipeline.config import DataEngineConfig, IngestConfig, ValidateConfig


def validate_rows(
    samples: pq.ParquetFile,
    rejects: pd.DataFrame,
    validate: ValidateConfig,
    ingest: IngestConfig,
    data_engine: DataEngineConfig,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Apply every rule to every sample, and print what came of it.

    Args:
        samples: Rows that could be read.
        rejects: Rows that could not.
        validate: Limits.
        ingest: Declared sources; media outside of their folders are not opened.
        data_engine: Where to work, and how many rows at a time.

    Returns:
        The tables `quarantine`, `validation_warnings` and `media_index`, and the report.
    """
    from qvl_pipeline.data.runner import use_runner
    from qvl_pipeline.data.tables import REJECTS, from_frame, to_frame
    from qvl_pipeline.data.validation.validate import validate_samples

    use_runner(data_engine)
    outcome = validate_samples(
        samples, from_frame(rejects, REJECTS), validate, data_engine.batch_rows, ingest.media_folders()
    )
    quarantine, warnings = to_frame(outcome.quarantine), to_frame(outcome.warnings)
    Console().print(summarize(outcome.report, quarantine, rejects, warnings))
    return quarantine, warnings, to_frame(outcome.media_index), outcome.report


def write_page(
    samples: pq.ParquetFile,
    rejects: pd.DataFrame,
    quarantine: pd.DataFrame,
    validation_warnings: pd.DataFrame,
    media_index: pd.DataFrame,
    validation_report: dict[str, Any],
    validate: ValidateConfig,
    data_engine: DataEngineConfig,
) -> str:
    """Write the validation page.

    Args:
        samples: Rows that could be read.
        rejects: Rows that could not.
        quarantine: Samples that broke a rule.
        validation_warnings: Valid samples that broke a rule which only warns.
        media_index: Every media file as probed.
        validation_report: Report of the validation.
        validate: With the name of the dataset.
        data_engine: How many rows to read at a time.

    Returns:
        HTML.
    """
    from qvl_pipeline.data.batches import read_batches
    from qvl_pipeline.reports.pictures import image_uri
    from qvl_pipeline.reports.validation_page import render_validation

    # Only of files that were decoded within the limits: a broken one may hang or bring down its decoder.
    sound = media_index[(media_index["type"] == "image") & media_index["rule"].isna()]
    decodable = set(sound["path"])
    return render_validation(
        dataset=validate.dataset,
        report=validation_report,
        samples=read_batches(samples, ["sample_id", "source", "split", "messages", "media"], data_engine.batch_rows),
        rejects=rejects,
        quarantine=quarantine,
        warnings=validation_warnings,
        media_index=media_index,
        thumbnail=lambda kind, path: image_uri(path) if kind == "image" and path in decodable else None,
    )


def keep_valid(
    samples: pq.ParquetFile,
    quarantine: pd.DataFrame,
    validation_report: dict[str, Any],
    validation_page: str,
    validate: ValidateConfig,
    data_engine: DataEngineConfig,
) -> Callable[[Path], None]:
    """Take the samples that broke no rule. The list of those that did is on disk by now, also when this refuses.

    Args:
        samples: Rows that could be read.
        quarantine: Samples that broke a rule.
        validation_report: Report of the validation.
        validation_page: The page, which is thereby written first.
        validate: Limits.
        data_engine: How many rows to read at a time.

    Returns:
        A writer of the table `valid_samples`.

    Raises:
        TooManyRejectsError: Too much of the dataset is unusable.
    """
    from qvl_pipeline.data.tables import QUARANTINE, from_frame
    from qvl_pipeline.data.validation.validate import check_reject_fraction, write_valid

    check_reject_fraction(validation_report, validate)
    return partial(
        write_valid, samples, from_frame(quarantine, QUARANTINE), validate, batch_rows=data_engine.batch_rows
    )


def summarize(report: dict[str, Any], quarantine: pd.DataFrame, rejects: pd.DataFrame, warnings: pd.DataFrame) -> Group:
    """Make the block that is printed: the counts, and each broken rule with an example.

    Args:
        report: Report of the validation.
        quarantine: Samples that broke a rule.
        rejects: Rows that could not be read.
        warnings: Valid samples that broke a rule which only warns.
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
    parts = [line, *([table] if table.row_count else [])]
    noted = warnings.groupby("rule").first()
    for rule, count in report["warnings"].items():
        example = f"{noted.loc[rule, 'sample_id']}: {noted.loc[rule, 'detail']}"
        parts.append(Text(f"used, with a warning: {rule} ({count:,}), for example {example}"))
    for source, columns in report["put_aside"].items():
        named = ", ".join(f"{column} ({count:,})" for column, count in columns.items())
        parts.append(Text(f"columns of {source} that nothing reads, put aside in metadata: {named}"))
    return Group(*parts)
