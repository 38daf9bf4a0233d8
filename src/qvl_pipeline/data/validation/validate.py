"""Which samples are valid, and what is wrong with each of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.batches import TableWriter, read_batches
from qvl_pipeline.data.made_with import attrs_of, made_with, with_attrs
from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.rejection import REJECT_RULES
from qvl_pipeline.data.tables import QUARANTINE, SAMPLES, WARNINGS
from qvl_pipeline.data.validation.media_index import index_media, probe_files
from qvl_pipeline.data.validation.put_aside import count_put_aside
from qvl_pipeline.data.validation.rules import (
    FINGERPRINT_BYTES,
    RULES,
    Broken,
    Probes,
    Sample,
    broken_by_sample,
    duplicate,
    first_error,
    leakage,
    warnings,
)
from qvl_pipeline.errors import UserError

_REASONS_NAMED = 3


class TooManyRejectsError(UserError):
    """More rows are rejected or quarantined than `max_reject_fraction` allows."""


class Validation(NamedTuple):
    """What validation hands over.

    Attributes:
        quarantine: Samples that broke a rule which is an error, each with the first of them.
        warnings: Rules that the other samples broke, but only with a warning; a sample may be in it more than once.
        media_index: Every media file as probed.
        report: `counts` of rows, `rules` with how many rows were lost to each, `warnings` with how many each warned of,
            and by source the columns that were put aside, as `count_put_aside` counts them.
    """

    quarantine: pa.Table
    warnings: pa.Table
    media_index: pa.Table
    report: dict[str, dict[str, Any]]


class _Judged(NamedTuple):
    """What is known of the samples by themselves.

    Attributes:
        broken: By number of the sample, what it breaks; those that break nothing are not in it.
        fingerprints: Fingerprint of every sample, one after the other; zeros of those that are not valid.
        held_out: By content hash of a file, the first valid sample of the eval split or a benchmark that uses it.
    """

    broken: dict[int, list[Broken]]
    fingerprints: bytes
    held_out: dict[str | None, str]


def validate_samples(
    samples: pq.ParquetFile,
    rejects: pa.Table,
    config: ValidateConfig,
    batch_rows: int,
    folders: Sequence[str] | None = None,
) -> Validation:
    """Apply every rule to every sample.

    The samples are read four times, a batch at a time: for the files that they use, for what each of them breaks by
    itself, for what it breaks because of the others, and for the columns that nothing reads. What stays in memory is
    what was found in the files, what is wrong, and a fingerprint of each sample.

    Args:
        samples: Table `samples`.
        rejects: Table `rejects`; only counted.
        config: Limits.
        batch_rows: Rows of a batch.
        folders: Real paths of the folders that media must be inside of; `None` where they may be anywhere.

    Returns:
        The tables, in the order of `samples`, and the report.
    """
    read = partial(read_batches, samples, batch_rows=batch_rows)
    uses = (use for batch in read(["media"]) for uses in batch["media"].to_pylist() for use in uses)
    probes = probe_files((Media(**use) for use in uses), config, folders)
    judged = _judge_alone(_parsed(read(["sample_id", "split", "messages", "media"]), probes), config)
    quarantine, warned = _judge_together(read([*QUARANTINE.names[:-2], "media"]), probes, judged, config)
    total = samples.metadata.num_rows
    counts = {
        "ingested": total + rejects.num_rows,
        "valid": total - quarantine.num_rows,
        "quarantined": quarantine.num_rows,
        "rejected": rejects.num_rows,
    }
    found = Counter(rejects["rule"].to_pylist() + quarantine["rule"].to_pylist())
    noted = Counter(warned["rule"].to_pylist())
    report = {
        "counts": counts,
        "rules": {rule: found[rule] for rule in (*REJECT_RULES, *RULES)},
        "warnings": {rule: noted[rule] for rule in RULES if noted[rule]},
        "put_aside": count_put_aside(read(["source", "metadata"])),
    }
    return Validation(quarantine, warned, index_media(probes, config), report)


def write_valid(
    samples: pq.ParquetFile, quarantine: pa.Table, config: ValidateConfig, path: Path, batch_rows: int
) -> None:
    """Write the samples that are not in quarantine.

    Args:
        samples: Table `samples`.
        quarantine: Table `quarantine`.
        config: Limits; only recorded.
        path: File to write: the table `valid_samples`.
        batch_rows: Rows read at a time.
    """
    lost = quarantine["sample_id"].combine_chunks()
    attrs = made_with(attrs_of(samples.schema_arrow), validate=config)
    with TableWriter(path, with_attrs(SAMPLES, attrs)) as table:
        for batch in read_batches(samples, SAMPLES.names, batch_rows):
            valid = batch.filter(pc.invert(pc.is_in(batch["sample_id"], lost)))
            table.write(pa.Table.from_batches([valid], SAMPLES))


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
    folder = "; media that are missing may lie elsewhere than ingest.datasets[].data_folder says"
    dataset = config.dataset or "<dataset>"
    advice = folder if report["rules"].get("missing_media", 0) > lost / 2 else ""
    raise TooManyRejectsError(
        f"{lost} of {ingested} rows ({lost / ingested:.1%}) are rejected or quarantined, more than the "
        f"{config.max_reject_fraction:.1%} that validate.max_reject_fraction allows; most of them by "
        f"{', '.join(reasons)}: mend the rows, which data/08_reporting/{dataset}/validation.html shows (all of "
        f"them: data/03_primary/{dataset}/quarantine.parquet, data/02_intermediate/{dataset}/"
        f"rejects.parquet), or raise the limit{advice}"
    )


def _parsed(batches: Iterable[pa.RecordBatch], probes: Probes) -> Iterator[Sample]:
    for batch in batches:
        for row in batch.to_pylist():
            uses = [Media(**use) for use in row["media"]]
            yield Sample(row["sample_id"], row["split"], orjson.loads(row["messages"]), uses, probes)


def _judge_alone(samples: Iterable[Sample], config: ValidateConfig) -> _Judged:
    broken, held_out, fingerprints = {}, {}, bytearray()
    for number, sample in enumerate(samples):
        if found := broken_by_sample(sample, config):
            broken[number] = found
        if first_error(found, config):
            fingerprints += bytes(FINGERPRINT_BYTES)
            continue
        fingerprints += sample.fingerprint
        if sample.split != "train":
            for content_hash in sample.content_hashes:
                held_out.setdefault(content_hash, sample.sample_id)
    return _Judged(broken, bytes(fingerprints), held_out)


def _judge_together(
    batches: Iterable[pa.RecordBatch], probes: Probes, judged: _Judged, config: ValidateConfig
) -> tuple[pa.Table, pa.Table]:
    """Add what samples break because of others; the tables `quarantine` and `validation_warnings`."""
    fingerprints = np.frombuffer(judged.fingerprints, f"V{FINGERPRINT_BYTES}")
    values, counts = np.unique(fingerprints, return_counts=True)
    # Of each fingerprint that several samples have, the id of the first, once it is known.
    first: dict[bytes, str | None] = {value.tobytes(): None for value in values[counts > 1]}
    lost, warned = [QUARANTINE.empty_table()], [WARNINGS.empty_table()]
    numbers = count()
    for batch in batches:
        errors, others = [], []
        for row, number in zip(batch.to_pylist(), numbers, strict=False):
            sample = Sample(row["sample_id"], row["split"], [], [Media(**use) for use in row.pop("media")], probes)
            found = judged.broken.get(number, [])
            found = _add_others(sample, found, fingerprints[number].tobytes(), judged.held_out, first, config)
            if error := first_error(found, config):
                errors.append(row | {"rule": error[0], "detail": error[1]})
            else:
                others += [row | {"rule": rule, "detail": detail} for rule, detail in warnings(found, config)]
        lost.append(pa.Table.from_pylist(errors, QUARANTINE))
        warned.append(pa.Table.from_pylist(others, WARNINGS))
    return pa.concat_tables(lost), pa.concat_tables(warned)


def _add_others(
    sample: Sample,
    found: list[Broken],
    fingerprint: bytes,
    held_out: dict[str | None, str],
    first: dict[bytes, str | None],
    config: ValidateConfig,
) -> list[Broken]:
    """Add to what a sample breaks: it shares a file with a valid eval sample, or repeats an earlier valid sample."""
    if not first_error(found, config) and (detail := leakage(sample, held_out)):
        found = [*found, (leakage.__name__, detail)]
    if fingerprint in first and not first_error(found, config):
        first[fingerprint] = first[fingerprint] or sample.sample_id
        if detail := duplicate(sample, first[fingerprint]):
            found = [*found, (duplicate.__name__, detail)]
    return found
