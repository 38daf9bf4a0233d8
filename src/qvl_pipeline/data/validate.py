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
from qvl_pipeline.data.rules import RULES, Broken, Sample, broken_by_sample, leakage
from qvl_pipeline.data.tables import QUARANTINE
from qvl_pipeline.errors import UserError

_REASONS_NAMED = 3


class TooManyRejectsError(UserError):
    """More rows are rejected or quarantined than `max_reject_fraction` allows."""


class Validation(NamedTuple):
    """What validation hands over.

    Attributes:
        valid_samples: Samples that broke no rule.
        quarantine: The others, each with the first rule that it broke.
        media_index: Every media file as probed.
        report: `counts` of rows and `rules` with how many rows broke each.
    """

    valid_samples: pa.Table
    quarantine: pa.Table
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
    broken = _add_leakage(parsed, [broken_by_sample(sample, config) for sample in parsed])
    valid = samples.filter(pa.array([found is None for found in broken], pa.bool_()))
    quarantine = _quarantine(samples, broken)
    counts = {
        "ingested": samples.num_rows + rejects.num_rows,
        "valid": valid.num_rows,
        "quarantined": quarantine.num_rows,
        "rejected": rejects.num_rows,
    }
    assert counts["ingested"] == counts["valid"] + counts["quarantined"] + counts["rejected"], counts
    found = Counter(rejects["rule"].to_pylist() + quarantine["rule"].to_pylist())
    report = {"counts": counts, "rules": {rule: found[rule] for rule in (*REJECT_RULES, *RULES)}}
    return Validation(valid, quarantine, index_media(probes, config), report)


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


def _add_leakage(samples: Sequence[Sample], broken: Sequence[Broken | None]) -> list[Broken | None]:
    """Add the training samples that share a file with an eval sample, where both are valid but for that."""
    pairs = list(zip(samples, broken, strict=True))
    held_out: dict[str, str] = {}
    for sample in (sample for sample, found in pairs if found is None and sample.split == "eval"):
        for content_hash in sample.content_hashes:
            held_out.setdefault(content_hash, sample.sample_id)
    return [
        (leakage.__name__, detail) if found is None and (detail := leakage(sample, held_out)) else found
        for sample, found in pairs
    ]


def _quarantine(samples: pa.Table, broken: Iterable[Broken | None]) -> pa.Table:
    columns = [name for name in QUARANTINE.names if name in samples.column_names]
    rows = zip(samples.select(columns).to_pylist(), broken, strict=True)
    return pa.Table.from_pylist(
        [row | {"rule": found[0], "detail": found[1]} for row, found in rows if found is not None], QUARANTINE
    )
