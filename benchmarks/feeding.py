"""Do its loader processes feed a GPU? `python -m benchmarks.feeding [--ranks 8] [--cores 1] [--batches 40] [--quick]`.

Eight ranks, each with a fake device that sleeps as long as a GPU would compute at 20,000 tokens a second, and with the
loader processes that `dataloader_num_workers: auto` gives it. What loading takes is CPU time, measured on one batch:
`cores_a_gpu` at full speed follows from it. Few cores cannot load so much: then all devices are slower, so that loading
takes `--cores` in all, which must be less than other programs leave. `waits` is the `data_wait_share` of the rank that
waits most.

The last rows are a rank whose packs are a picture each but for every tenth, a clip as long as 64 of them: loaded in
pieces by two processes, and whole by one of them. Loading sleeps there too, as if each process had a core that loads
half as much again as the device computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_models import MODELS
from benchmarks.loader import photo, store_clip
from benchmarks.report import report
from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.feed.batch_loader import LoaderOptions, load_batches
from qvl_pipeline.engine.feed.loader_processes import ASSUMED_MFU, processes_needed
from qvl_pipeline.engine.feed.steps import MicroBatch
from qvl_pipeline.engine.parallel.sequence_parallel import temporal_patches
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.loading import PatchLoader

TOKENS_PER_SECOND = 20_000  # of a GPU
CONFIG = MODELS["qwen3_vl_4b"]
PATCH_SIZE = CONFIG.vision_config.patch_size
PATCH_BYTES = 3 * 2 * PATCH_SIZE**2
FRAMES, SIDE, TEXT = 32, 448, 64
WARM_UP = 3  # batches for which loader processes start
# The long clip: its pairs of frames, of 16 x 16 patches each, and its pieces, as many as 256K tokens have in training.
LONG_PAIRS, PIECES, LONG_EVERY = 64, 12, 10
LONG_TOKENS_PER_SECOND = 2_000


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--cores", type=float, default=1.0)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    options = parser.parse_args()
    sizes = (2, 0.5, 6, 8) if options.quick else (options.ranks, options.cores, options.batches, 1)
    rows = measure(*sizes)
    waits = {f"{row['case']}: waits": row["waits"] for row in rows}
    report("feeding", rows, ratios=waits, targets={case: "<= 0.02" for case in waits if "whole" not in case})


def measure(ranks: int, cores: float, batches: int, smaller: int) -> list[dict[str, Any]]:
    """Measure all cases.

    Args:
        ranks: How many there are.
        cores: Cores that all their loader processes may take.
        batches: Batches of each rank.
        smaller: By how much to divide the sides of pictures.

    Returns:
        A row for each case.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            cases = _cases(Path(folder), smaller)
            fed = [_feed(case, feed, ranks, cores, batches) for case, feed in cases.items()]
            loaded = {"in pieces": PIECES, "whole": 1}.items()
            return fed + [_long(how, pieces) for how, pieces in loaded]
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Feed:
    """A micro-batch to be loaded over and over, and what builds it."""

    micro_batch: MicroBatch
    builder: BatchBuilder

    @property
    def tokens(self) -> int:
        return sum(len(sample["input_ids"]) for sample in self.micro_batch.samples)


def _cases(folder: Path, smaller: int) -> dict[str, _Feed]:
    picture = photo(1024 // smaller, 768 // smaller)
    picture.save(folder / "picture.jpeg", quality=90)
    width, height = (side // PATCH_SIZE // 2 * 2 for side in picture.size)
    image = {"type": "image", "key": str(folder / "picture.jpeg"), "grid_t": 1, "seconds_per_grid": 0.0}
    image |= {"grid_h": height, "grid_w": width}
    side = SIDE // smaller // (2 * PATCH_SIZE) * 2 * PATCH_SIZE
    wide = np.asarray(photo(2 * side, side)).transpose(2, 0, 1)
    starts = [number * side // FRAMES for number in range(FRAMES)]
    frames = np.stack([np.ascontiguousarray(wide[:, :, start : start + side]) for start in starts])
    clip = store_clip(folder / "frames", Path("clip.mp4"), frames, "zstd")
    loader = PatchLoader(patch_size=PATCH_SIZE, frame_store=folder / "frames")
    return {
        "JPEG 1024 x 768": _Feed(_micro_batch([image] * 4), _builder(loader)),
        f"stored frames {SIDE} x {SIDE}": _Feed(_micro_batch([clip]), _builder(loader)),
    }


def _micro_batch(media: Sequence[dict[str, Any]]) -> MicroBatch:
    """A pack of samples of one medium and a text each."""
    samples = tuple(_sample(number, medium) for number, medium in enumerate(media))
    patches = sum(medium["grid_t"] * medium["grid_h"] * medium["grid_w"] for medium in media)
    return MicroBatch(tuple(range(len(media))), vision=True, samples=samples, patches=patches)


def _sample(number: int, medium: dict[str, Any]) -> dict[str, Any]:
    token = CONFIG.image_token_id if medium["type"] == "image" else CONFIG.video_token_id
    features = medium["grid_h"] * medium["grid_w"] // 4
    block = [CONFIG.vision_start_token_id, *[token] * features, CONFIG.vision_end_token_id]
    ids = np.array([*block * medium["grid_t"], *[9] * TEXT], dtype=np.int32)
    spans = np.array([[len(ids) - TEXT // 2, len(ids)]], dtype=np.int32)
    return {"sample_id": str(number), "source": "a", "input_ids": ids, "label_spans": spans, "media": [medium]}


def _builder(loader: Any) -> BatchBuilder:
    family = FAMILIES["qwen3_vl"]
    return BatchBuilder(
        loader=loader,
        patch_values=PATCH_BYTES,
        placeholder_ids=(CONFIG.image_token_id, CONFIG.video_token_id),
        tokens_per_second=None,
        vision_inputs=partial(family.vision_inputs, CONFIG.vision_config),
        sources=("a",),
    )


def _feed(case: str, feed: _Feed, ranks: int, cores: float, batches: int) -> dict[str, Any]:
    load_s = _cpu_seconds(lambda: feed.builder.build(feed.micro_batch.samples, vision=True))
    core = feed.tokens / load_s
    speed = min(TOKENS_PER_SECOND, core * cores / ranks)
    # A device that computes a token in an operation.
    flops = SimpleNamespace(count=lambda tokens: tokens)
    workers, _ = processes_needed(load_s, [feed.tokens], flops, speed / ASSUMED_MFU, cores=16)
    waits = _simulated(ranks, workers, speed, [feed.micro_batch] * batches, feed.builder)
    return _row(case, ranks, workers, speed, core, waits)


def _long(how: str, pieces: int) -> dict[str, Any]:
    light, long = (_micro_batch([_medium(pairs, 16, 16)]) for pairs in (1, LONG_PAIRS))
    speed, core = LONG_TOKENS_PER_SECOND, 1.5 * LONG_TOKENS_PER_SECOND
    built = [light if number % LONG_EVERY else long for number in range(1, 4 * LONG_EVERY + 1)]
    loaded = {"most_patches": long.patches, "piece_bytes": -(-LONG_PAIRS // pieces) * light.patches * PATCH_BYTES}
    waits = _simulated(1, 2, speed, built, _builder(_Sleeping(4 * core)), LONG_EVERY, **loaded)
    return _row(f"a long clip among pictures, {how}", 1, 2, speed, core, waits)


def _medium(pairs: int, height: int, width: int) -> dict[str, Any]:
    grid = {"grid_t": pairs, "grid_h": height, "grid_w": width}
    return {"type": "video" if pairs > 1 else "image", "key": "", "seconds_per_grid": 1.0, **grid}


@dataclass(frozen=True)
class _Sleeping:
    """Stands in for the patch loader: sleeps as long as loading takes on a core."""

    patches_per_second: float

    def load(self, media: Sequence[dict[str, Any]]) -> torch.Tensor:
        patches = sum(temporal_patches(item) * item["grid_h"] * item["grid_w"] for item in media)
        time.sleep(patches / self.patches_per_second)
        return torch.empty(patches, PATCH_BYTES, dtype=torch.uint8)


def _row(case: str, ranks: int, workers: int, speed: float, core: float, waits: float) -> dict[str, Any]:
    return {
        "case": case,
        "ranks": ranks,
        "loader_processes": workers,
        "tokens_per_second": speed,
        "tokens_a_core": core,
        "cores_a_gpu": TOKENS_PER_SECOND / core,
        "waits": waits,
    }


def _cpu_seconds(load: Callable[[], Any], times: int = 5) -> float:
    load()
    taken = []
    for _ in range(times):
        started = time.process_time()
        load()
        taken.append(time.process_time() - started)
    return min(taken)


def _simulated(
    ranks: int,
    workers: int,
    speed: float,
    micro_batches: list[MicroBatch],
    builder: BatchBuilder,
    warm_up: int = WARM_UP,
    **loaded: int,
) -> float:
    """Let ranks take batches, and sleep as long as devices of `speed` would; return the longest share waited."""
    context = get_context("fork")
    results = context.Queue()
    options = LoaderOptions(workers, 2, pin_memory=False, skip_bad_samples=False, **loaded)

    def rank() -> None:
        waited = computed = 0.0
        asked = time.perf_counter()
        for number, batch in enumerate(load_batches(micro_batches, Path(), builder, options)):
            came = time.perf_counter()
            time.sleep(batch.input_ids.numel() / speed)
            done = time.perf_counter()
            if number >= warm_up:
                waited, computed = waited + came - asked, computed + done - came
            asked = done
        results.put(waited / (waited + computed))

    processes = [context.Process(target=rank) for _ in range(ranks)]
    for process in processes:
        process.start()
    shares = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(shares)


if __name__ == "__main__":
    main()
