"""The pack plan: what training will do, step by step, decided before it starts and the same on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from qvl_pipeline.config import BatchingConfig, IngestConfig
from qvl_pipeline.data.plan.packing import Packs, balanced, best_fit, first_fit, one_each
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.storage.tables import read_table
from qvl_pipeline.tokens.work import llm_cost, vision_cost

# Changed whenever the same inputs would give another plan.
PLAN_VERSION = 7

logger = logging.getLogger(__name__)

_WITHOUT = {
    "train": "nothing would be trained",
    "eval": "set train.eval_strategy to 'no', or give a source 'split: eval' or set ingest.eval_fraction",
}
_NO_WEIGHT = "the weights of the sources leave no sample to train on: raise ingest.datasets[].weight"
_STRATEGIES = {"best_fit": best_fit, "first_fit": first_fit, "balanced": balanced}


@dataclass(frozen=True)
class _Samples:
    """One split as arrays `[N]`, over-long samples left out; `sources` are numbers of `names`, which are sorted."""

    rows: np.ndarray
    names: list[str]
    sources: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    spectra: np.ndarray
    supervised: np.ndarray


def make_plan(
    tokenized_path: Path, batching: BatchingConfig, weights: Mapping[str, float]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Plan every optimizer step of a training run.

    Samples are drawn by the weight of their source, packed epoch by epoch, and the packs dealt out to steps in random
    order. Epochs follow each other without a seam, so only the last step of the run can be smaller than the others.

    Args:
        tokenized_path: File of `tokenized_samples`.
        batching: Parameters of the plan.
        weights: How often each sample of a source is seen per epoch; see `DatasetSource.weight`.

    Returns:
        The tables `pack_plan` and `plan_summary` of the contract. `samples` counts the different samples that are
        trained on; `epochs` is the number of passes over them, a fraction when `max_steps` ends inside of one.

    Raises:
        UserError: There is nothing to train on, a source is not declared any more, or samples are longer than a pack
            while `filter_overlong` is false.
    """
    samples, overlong = _samples(TokenizedSamples(tokenized_path), "train", batching)
    _refuse_undeclared(samples.names, weights)
    weight_of = np.array([weights[name] for name in samples.names])
    # One after the other, as Python sums: the figure is in the summary to the last bit.
    per_epoch = sum(weight for part in _parts(samples.sources) for weight in weight_of[part].tolist())
    packs = _run_packs(samples, batching, weights) if per_epoch >= 1 else None
    if not packs:
        raise UserError(_NO_WEIGHT)
    plan, work = _plan_table(packs, samples, batching.packs_per_step)
    tokens = int(plan["tokens"].sum())
    return plan, {
        "steps": int(plan["step"].iloc[-1]) + 1,
        "packs": len(plan),
        "samples": len(np.unique(packs.samples)),
        "tokens": tokens,
        "supervised_tokens": int(plan["supervised_tokens"].sum()),
        "fill": tokens / (len(plan) * batching.packing_length),
        "imbalance": {part: imbalance(plan, values, batching.data_parallel_size) for part, values in work.items()},
        "epochs": len(packs.samples) / per_epoch,
        "packing_length": batching.packing_length,
        "samples_per_epoch": per_epoch,
        "fingerprint": plan_fingerprint([tokenized_path], batching, weights),
        "overlong": overlong,
    }


def make_eval_plan(tokenized_path: Path, batching: BatchingConfig) -> pd.DataFrame:
    """Pack the eval split, every sample once, for its loss during training.

    Returns:
        A table like `pack_plan`, with all packs in step 0.

    Raises:
        UserError: The eval split is empty, or has samples longer than a pack while `filter_overlong` is false.
    """
    samples, overlong = _samples(TokenizedSamples(tokenized_path), "eval", batching)
    if overlong:
        logger.warning(
            "the loss over the eval split leaves out %d samples that are too long, the first is %s",
            len(overlong),
            overlong[0],
        )
    packs = _pack(samples.tokens, samples.patches, batching, epoch=0, begun=0)
    return _plan_table(packs, samples, packs_per_step=len(packs))[0]


def plan_stream(
    stream_path: Path, tokenized_path: Path, batching: BatchingConfig, weights: Mapping[str, float]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Say what is known of a stream before it runs: all but what its tokens and packs would tell.

    Args:
        stream_path: File of `stream_samples`.
        tokenized_path: File of `tokenized_samples`, which has some of them, to be looked at.
        batching: Parameters of the stream.
        weights: How often each sample of a source is seen per pass.

    Returns:
        An empty `pack_plan`, and `plan_summary` with `None` for what is not known. `previewed` counts the training
        samples that are tokenised, and `overlong` is of those.

    Raises:
        UserError: As for a plan; samples that are too long are refused here when they are among those tokenised.
    """
    previewed, overlong = _samples(TokenizedSamples(tokenized_path), "train", batching)
    sources = Counter(read_table(stream_path, advice="run the pipeline 'tokenize' again")["source"].to_pylist())
    _refuse_undeclared(sources, weights)
    per_epoch = sum(weights[source] * samples for source, samples in sources.items())
    if per_epoch < 1:
        raise UserError(_NO_WEIGHT)
    nothing = Packs(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    return _plan_table(nothing, previewed, batching.packs_per_step)[0], {
        "steps": batching.max_steps,
        "packs": batching.max_steps * batching.packs_per_step,
        "samples": sources.total(),
        "previewed": len(previewed.rows) + len(overlong),
        **dict.fromkeys(["tokens", "supervised_tokens", "fill", "imbalance", "epochs"]),
        "packing_length": batching.packing_length,
        "samples_per_epoch": per_epoch,
        "fingerprint": plan_fingerprint([tokenized_path, stream_path], batching, weights),
        "overlong": overlong,
    }


def _refuse_undeclared(sources: Iterable[str], weights: Mapping[str, float]) -> None:
    if undeclared := sorted(set(sources) - set(weights)):
        raise UserError(f"source '{undeclared[0]}' is not declared in ingest.datasets any more: run 'ingest' and on")


def source_weights(ingest: IngestConfig) -> dict[str, float]:
    """How often each sample of a source is seen per epoch, by name of the source."""
    return {source.name: source.weight * source.repeat for source in ingest.datasets}


def plan_fingerprint(files: Sequence[Path], batching: BatchingConfig, weights: Mapping[str, float]) -> str:
    """Fingerprint of everything a plan depends on.

    Args:
        files: `tokenized_samples`, and for a stream `stream_samples` too; their content counts, not their place.
        batching: Parameters of the plan.
        weights: Weight of each source.

    Returns:
        Hexadecimal SHA-256.
    """
    content = "".join(_sha256(path) for path in files)
    parameters = batching.model_dump(mode="json", exclude={"max_reject_fraction"})
    settings = {"version": PLAN_VERSION, "batching": parameters, "weights": dict(weights)}
    return hashlib.sha256((content + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def check_plan(
    plan_summary: dict[str, Any],
    tokenized_samples: Path,
    stream_samples: Path,
    batching: BatchingConfig,
    weights: Mapping[str, float],
) -> None:
    """Refuse a plan that was made for other data or other parameters than a run has.

    Raises:
        UserError: It was; the message names the pipeline to run.
    """
    files = [tokenized_samples, stream_samples] if batching.streamed else [tokenized_samples]
    if plan_fingerprint(files, batching, weights) != plan_summary["fingerprint"]:
        raise UserError(
            "the pack plan was made for other data or other `batching` parameters than this run's: "
            "run `kedro run --pipelines tokenize` (with the same --env and --params) to make it anew"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _samples(tokenized: TokenizedSamples, split: str, batching: BatchingConfig) -> tuple[_Samples, list[str]]:
    """The samples of a split, and the ids of those that are too long for a pack."""
    names = ["source", "split", "length", "vit_patches", "spectra", "supervised_tokens"]
    table = tokenized.columns(names)
    rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())
    if not len(rows):
        raise UserError(f"there is no sample of the split '{split}': {_WITHOUT[split]}")
    length, patches, spectra, supervised = (table[name].to_numpy()[rows] for name in names[2:])
    too_long = length > batching.packing_length
    if batching.packing_vit_patches is not None:
        too_long |= patches > batching.packing_vit_patches
    overlong = _ids(tokenized, rows[too_long])
    if overlong and not batching.filter_overlong:
        raise UserError(
            f"{len(overlong)} samples do not fit into a pack (packing_length {batching.packing_length}, "
            f"packing_vit_patches {batching.packing_vit_patches}), the first is '{overlong[0]}': raise the budget, or "
            "set filter_overlong: true to leave them out"
        )
    if too_long.all():
        raise UserError(
            f"all {len(rows)} samples of the split '{split}' are longer than packing_length "
            f"({batching.packing_length}) or packing_vit_patches ({batching.packing_vit_patches}): raise the budget"
        )
    kept = ~too_long
    source = table["source"].filter(pa.array(_mask(rows[kept], len(table))))
    known = sorted(source.unique().to_pylist())
    numbers = pc.index_in(source, pa.array(known, pa.string())).to_numpy()
    counts = (values[kept] for values in (length, patches, spectra, supervised))
    return _Samples(rows[kept], known, numbers, *counts), overlong


def _ids(tokenized: TokenizedSamples, rows: np.ndarray) -> list[str]:
    """Ids of some rows; the column is not read when there are none."""
    return tokenized.columns(["sample_id"])["sample_id"].take(pa.array(rows)).to_pylist() if len(rows) else []


def _mask(rows: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def _parts(values: np.ndarray, size: int = 1 << 16) -> Iterator[np.ndarray]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _run_packs(samples: _Samples, batching: BatchingConfig, weights: Mapping[str, float]) -> Packs:
    """The packs of the whole run in training order, as positions in `samples`."""
    limit = batching.max_steps * batching.packs_per_step if batching.max_steps > 0 else None
    epochs: list[Packs] = []
    while len(epochs) < batching.num_train_epochs if limit is None else sum(map(len, epochs)) < limit:
        drawn = _draw(samples, weights, len(epochs), batching.seed)
        begun = sum(map(len, epochs))
        packs = _pack(samples.tokens[drawn], samples.patches[drawn], batching, len(epochs), begun)
        epochs.append(Packs(drawn[packs.samples], packs.bounds))
    sizes = np.concatenate([np.diff(packs.bounds) for packs in epochs])[:limit]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return Packs(np.concatenate([packs.samples for packs in epochs])[: bounds[-1]], bounds)


def _draw(samples: _Samples, weights: Mapping[str, float], epoch: int, seed: int) -> np.ndarray:
    """Positions of the samples of one epoch, each source by its weight.

    A source is an endless repetition of one shuffled order, of which each epoch takes the next `weight * N` samples: an
    integer weight repeats every sample so often, and a fraction reaches every sample in turn.
    """
    drawn = []
    for number, source in enumerate(samples.names):
        positions = np.flatnonzero(samples.sources == number)
        key = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8])
        order = np.random.default_rng([seed, key]).permutation(positions)
        per_epoch = weights[source] * len(order)
        drawn.append(order[np.arange(round(epoch * per_epoch), round((epoch + 1) * per_epoch)) % len(order)])
    return np.concatenate(drawn)


def _pack(tokens: np.ndarray, patches: np.ndarray, batching: BatchingConfig, epoch: int, begun: int) -> Packs:
    """Pack the samples of one epoch, which `begun` packs come before; the order of the packs is random."""
    rng = np.random.default_rng([batching.seed, epoch])
    if not batching.packing:
        grouped, group = batching.group_by_length, batching.packs_per_step
        return one_each(tokens, group_by_length=grouped, group=group, rng=rng, begun=begun)
    packs = _STRATEGIES[batching.packing_strategy](
        tokens, patches, max_tokens=batching.packing_length, max_patches=batching.packing_vit_patches, rng=rng
    )
    # Packing leaves its packs in order of sample length, or fuller ones first: training must not see that order.
    return packs.take(rng.permutation(len(packs)))


def _plan_table(packs: Packs, samples: _Samples, packs_per_step: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Number the packs, and say how much work each is.

    Within a step the heavy packs come first. Ranks take packs in turn, so what they do side by side are packs next to
    each other in this order, on any number of ranks: they weigh nearly the same.
    """
    step = (np.arange(len(packs)) // packs_per_step).astype(np.int32)
    work = {
        "language_model": packs.sums(llm_cost(samples.tokens)),
        "vision": packs.sums(vision_cost(samples.patches)),
    }
    work["together"] = work["language_model"] + work["vision"]
    order = np.lexsort([-work["together"], step])
    packs = packs.take(order)
    rows = samples.rows[packs.samples].astype(np.int32)
    table = pd.DataFrame(
        {
            "step": step,
            "pack": (np.arange(len(packs)) % packs_per_step).astype(np.int32),
            "sample_rows": list(Packs(rows, packs.bounds)),
            "tokens": packs.sums(samples.tokens),
            "vit_patches": packs.sums(samples.patches),
            "spectra": packs.sums(samples.spectra),
            "supervised_tokens": packs.sums(samples.supervised),
        }
    )
    return table, {part: values[order] for part, values in work.items()}


def imbalance(plan: pd.DataFrame, work: np.ndarray, ranks: int) -> float:
    """How much longer ranks that wait for each other take than if the work were spread evenly.

    Args:
        plan: The columns `step` and `pack` of a plan.
        work: Work of each pack `[packs]`.
        ranks: Data-parallel ranks; they take the packs of a step in turn and wait for each other after each.

    Returns:
        Work of the heaviest pack of those done side by side over the mean of the ranks, summed over the run; 1.0 is
        even. A rank that has no pack left in a step counts as idle.
    """
    turns = pd.DataFrame({"step": plan["step"], "turn": plan["pack"] // ranks, "work": work})
    side_by_side = turns.groupby(["step", "turn"])["work"]
    return float(side_by_side.max().sum() * ranks / max(side_by_side.sum().sum(), 1e-9))
