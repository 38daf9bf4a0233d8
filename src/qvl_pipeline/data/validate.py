"""Which samples are valid, and what is wrong with each of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.media_index import index_media, probe_files
from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.rejection import REJECT_RULES
from qvl_pipeline.data.rules import (
    RULES,
    Broken,
    Sample,
    broken_by_sample,
    duplicate,
    first_error,
    leakage,
    warnings,
)
from qvl_pipeline.data.tables import QUARANTINE, WARNINGS
from qvl_pipeline.errors import UserError

_REASONS_NAMED = 3


class TooManyRejectsError(UserError):
    """More rows are rejected or quarantined than `max_reject_fraction` allows."""


class Validation(NamedTuple):
    """What validation hands over.

    Attributes:
        valid_samples: Samples that broke no rule.
        quarantine: The others, each with the first rule that it broke.
        warnings: Rules that valid samples broke, but only with a warning; a sample may be in it more than once.
        media_index: Every media file as probed.
        report: `counts` of rows, `rules` with how many rows were lost to each, `warnings` with how many each warned of.
    """

    valid_samples: pa.Table
    quarantine: pa.Table
    warnings: pa.Table
    media_index: pa.Table
    report: dict[str, dict[str, int]]


def validate_samples(samples: pa.Table, rejects: pa.Table, config: ValidateConfig) -> Validation:
    """Apply every rule to every sample.

    Args:
        samples: Table `samples`.
        rejects: Table `rejects`; only counted.
        config: Limits.

    Returns:
        The tables, in the order of `samples`, and the report.
    """
    media = [[Media(**use) for use in uses] for uses in samples["media"].to_pylist()]
    probes = probe_files((use for uses in media for use in uses), config)
    messages = map(orjson.loads, samples["messages"].to_pylist())
    rows = samples.select(["sample_id", "split"]).to_pylist()
    parsed = [
        Sample(row["sample_id"], row["split"], turns, uses, probes)
        for row, turns, uses in zip(rows, messages, media, strict=True)
    ]
    broken = _add_leakage(parsed, [broken_by_sample(sample, config) for sample in parsed], config)
    broken = _add_duplicates(parsed, broken, config)
    errors = [first_error(found, config) for found in broken]
    valid = samples.filter(pa.array([error is None for error in errors], pa.bool_()))
    quarantine = _rows_of_rules(samples, [[error] if error else [] for error in errors], QUARANTINE)
    warned = [[] if error else warnings(found, config) for error, found in zip(errors, broken, strict=True)]
    warning_rows = _rows_of_rules(samples, warned, WARNINGS)
    counts = {
        "ingested": samples.num_rows + rejects.num_rows,
        "valid": valid.num_rows,
        "quarantined": quarantine.num_rows,
        "rejected": rejects.num_rows,
    }
    assert counts["ingested"] == counts["valid"] + counts["quarantined"] + counts["rejected"], counts
    found = Counter(rejects["rule"].to_pylist() + quarantine["rule"].to_pylist())
    noted = Counter(warning_rows["rule"].to_pylist())
    report = {
        "counts": counts,
        "rules": {rule: found[rule] for rule in (*REJECT_RULES, *RULES)},
        "warnings": {rule: noted[rule] for rule in RULES if noted[rule]},
    }
    return Validation(valid, quarantine, warning_rows, index_media(probes, config), report)


def check_reject_fraction(report: dict[str, Any], config: ValidateConfig) -> None:
    """Refuse a dataset of which too much is unusable.

    Args:
        report: Report of the validation.
        config: Limits.

    Raises:
        TooManyRejectsError: More rows than allowed are rejected or quarantined; the message names the top reasons.
    """
    ingested, lost = report["counts"]["ingested"], report["counts"]["quarantined"] + report["counts"]["rejected"]
    if lost <= config.max_reject_fraction * ingested:
        return
    reasons = [f"{rule} ({count})" for rule, count in Counter(report["rules"]).most_common(_REASONS_NAMED) if count]
    raise TooManyRejectsError(
        f"{lost} of {ingested} rows ({lost / ingested:.1%}) are rejected or quarantined, more than the "
        f"{config.max_reject_fraction:.1%} that validate.max_reject_fraction allows; most of them by "
        f"{', '.join(reasons)}: mend the rows, which are listed in quarantine.parquet (data/03_primary) and "
        "rejects.parquet (data/02_intermediate), or raise the limit"
    )


def _add_leakage(
    samples: Sequence[Sample], broken: Sequence[list[Broken]], config: ValidateConfig
) -> list[list[Broken]]:
    """Add the training samples that share a file with an eval sample, where both are valid but for that."""
    valid = [first_error(found, config) is None for found in broken]
    held_out: dict[str, str] = {}
    for sample in (sample for sample, ok in zip(samples, valid, strict=True) if ok and sample.split == "eval"):
        for content_hash in sample.content_hashes:
            held_out.setdefault(content_hash, sample.sample_id)
    return [
        [*found, (leakage.__name__, detail)] if ok and (detail := leakage(sample, held_out)) else found
        for sample, found, ok in zip(samples, broken, valid, strict=True)
    ]


def _add_duplicates(
    samples: Sequence[Sample], broken: Sequence[list[Broken]], config: ValidateConfig
) -> list[list[Broken]]:
    """Add the samples that repeat an earlier valid one."""
    valid = [first_error(found, config) is None for found in broken]
    first: dict[str, str] = {}
    for sample in (sample for sample, ok in zip(samples, valid, strict=True) if ok):
        first.setdefault(sample.fingerprint, sample.sample_id)
    return [
        [*found, (duplicate.__name__, detail)] if ok and (detail := duplicate(sample, first)) else found
        for sample, found, ok in zip(samples, broken, valid, strict=True)
    ]


def _rows_of_rules(samples: pa.Table, broken: Iterable[list[Broken]], schema: pa.Schema) -> pa.Table:
    columns = [name for name in schema.names if name in samples.column_names]
    rows = zip(samples.select(columns).to_pylist(), broken, strict=True)
    listed = [row | {"rule": rule, "detail": detail} for row, found in rows for rule, detail in found]
    return pa.Table.from_pylist(listed, schema)
