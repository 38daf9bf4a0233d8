"""Nodes of the `sample` stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qvl_pipeline.config import DataEngineConfig, ModelConfig, SampleConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.families import FAMILIES

if TYPE_CHECKING:
    from qvl_pipeline.media.frames.decode_worker import Failure

logger = logging.getLogger(__name__)


def sample_clips(
    valid_samples: pd.DataFrame,
    media_index: pd.DataFrame,
    sample: SampleConfig,
    model: ModelConfig,
    data_engine: DataEngineConfig,
) -> Callable[[Path], None]:
    """Sample the frames of every clip that any sample refers to.

    Args:
        valid_samples: Samples whose media are valid.
        media_index: Every media file as probed.
        sample: Which frames, and at which size.
        model: Model whose patch size the frames must fit.
        data_engine: Where to read clips.

    Returns:
        A writer of the frame store, with the sounds.

    Raises:
        UserError: There is no cluster, there are sounds and the model does not hear, too many clips are too short for
            the parameters, or the decoder cannot be loaded. Found before any decoding.
    """
    from qvl_pipeline.data.frames.clips import estimated_bytes, list_clips
    from qvl_pipeline.data.frames.sounds import list_sounds
    from qvl_pipeline.data.frames.writing import write_store
    from qvl_pipeline.data.made_with import made_with
    from qvl_pipeline.data.runner import join_cluster
    from qvl_pipeline.media.frames.backends import choose_backend
    from qvl_pipeline.media.frames.decode_worker import Failure

    join_cluster(data_engine)
    _check_hearing(valid_samples, model)
    sounds = list_sounds(valid_samples, media_index, sample) if model.family.hearing else []
    fit, unfit = [], []
    for clip in list_clips(valid_samples, media_index):
        try:
            estimated_bytes(clip, sample, model.family.patch_size)
            fit.append(clip)
        except ValueError as error:
            unfit.append((clip, Failure("clip_unfit", str(error))))
    lost = _lost_samples(valid_samples, {clip.name: failure for clip, failure in unfit})
    _check_reject_fraction(lost, len(valid_samples), sample)
    backend = choose_backend(sample.video_backend)
    attrs = made_with(valid_samples.attrs, sample=sample, model=model)
    reading = {"patch_size": model.family.patch_size, "backend": backend}
    return partial(
        write_store,
        clips=fit,
        unfit=unfit,
        sounds=sounds,
        hearing=model.family.hearing,
        sample=sample,
        engine=data_engine,
        attrs=attrs,
        **reading,
    )


def quarantine_samples(valid_samples: pd.DataFrame, video_frames: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """List the samples with a clip that could not be sampled, and say how many of each rule there are.

    Args:
        valid_samples: Samples whose media are valid.
        video_frames: Frame store.

    Returns:
        The tables `sample_quarantine` and `sample_report`.
    """
    from qvl_pipeline.media.frames.decode_worker import Failure
    from qvl_pipeline.media.frames.store import AGAIN, FrameStore
    from qvl_pipeline.storage.tables import read_table

    failed = read_table(video_frames / "failures.parquet", advice=AGAIN).to_pylist()
    lost = _lost_samples(valid_samples, {row["clip_id"]: Failure(row["rule"], row["detail"]) for row in failed})
    n_frames = FrameStore(video_frames).columns(["n_frames"])["n_frames"].to_pylist()
    counts = {
        "valid": len(valid_samples),
        "sampled": len(valid_samples) - len(lost),
        "quarantined": len(lost),
        "clips": len(n_frames),
        "failed_clips": len(failed),
        "frames": sum(n_frames),
    }
    line = "valid {valid:,} = sampled {sampled:,} + quarantined {quarantined:,}; {frames:,} frames of {clips:,} clips"
    logger.info(line.format(**counts))
    for rule, rows in lost.groupby("rule"):
        example = rows.iloc[0]
        logger.info("%s: %s, for example %s: %s", rule, f"{len(rows):,}", example["sample_id"], example["detail"])
    return lost, {"counts": counts, "rules": lost["rule"].value_counts().sort_index().to_dict()}


def keep_sampled(
    valid_samples: pd.DataFrame, sample_quarantine: pd.DataFrame, sample: SampleConfig, model: ModelConfig
) -> pd.DataFrame:
    """Take the samples whose clips are all there. The list of the others is on disk by now, also when this refuses.

    Args:
        valid_samples: Samples whose media are valid.
        sample_quarantine: Samples with a clip that could not be sampled.
        sample: Parameters.
        model: Model whose patch size the frames fit; only recorded.

    Returns:
        The table `sampled_samples`.

    Raises:
        UserError: Too many samples are lost.
    """
    from qvl_pipeline.data.made_with import made_with

    _check_reject_fraction(sample_quarantine, len(valid_samples), sample)
    kept = valid_samples[~valid_samples["sample_id"].isin(sample_quarantine["sample_id"])].reset_index(drop=True)
    kept.attrs = made_with(valid_samples.attrs, sample=sample, model=model)
    return kept


def _lost_samples(valid_samples: pd.DataFrame, failures: Mapping[str, Failure]) -> pd.DataFrame:
    """The samples with a failed clip, each with the first one; columns of the table `quarantine`."""
    from qvl_pipeline.data.tables import QUARANTINE
    from qvl_pipeline.media.frames.store import clip_id

    rows = []
    for sample in valid_samples.to_dict("records") if failures else ():
        names = [clip_id(item["path"], item["start"], item["end"]) for item in sample["media"]]
        if failed := next((name for name in names if name in failures), None):
            failure = failures[failed]
            facts = {name: sample[name] for name in ("sample_id", "source", "row", "split")}
            rows.append(facts | {"rule": failure.rule, "detail": f"clip '{failed}': {failure.detail}"})
    return pd.DataFrame(rows, columns=QUARANTINE.names)


def _check_hearing(valid_samples: pd.DataFrame, model: ModelConfig) -> None:
    """Refuse sounds for a model that does not hear; one that does is named."""
    heard = valid_samples["media"].map(lambda media: any(item["type"] == "audio" for item in media)).astype(bool)
    if model.family.hearing or not heard.any():
        return
    hearing = " or ".join(name for name, family in FAMILIES.items() if family.hearing)
    first = valid_samples.loc[heard, "sample_id"].iloc[0]
    raise UserError(
        f"{int(heard.sum()):,} samples hold a sound, the first is '{first}', and "
        f"model.processor_type {model.processor_type} does not hear: use {hearing}, or leave these samples out"
    )


def _check_reject_fraction(lost: pd.DataFrame, valid: int, sample: SampleConfig) -> None:
    if len(lost) <= sample.max_reject_fraction * valid:
        return
    first = lost.iloc[0]
    raise UserError(
        f"{len(lost)} of {valid} samples ({len(lost) / valid:.1%}) have clips that cannot be sampled, more than the "
        f"{sample.max_reject_fraction:.1%} that sample.max_reject_fraction allows; the first is {first['sample_id']}, "
        f"by {first['rule']}: {first['detail']}: mend the clips or the parameters, or raise the limit"
    )
