"""Training speed: our engine, a bare loop over the same packs, and transformers' Trainer over the same padded samples.

`python -m benchmarks.train_step [--samples 2000] [--rounds 3] [--quick]`: a tiny Qwen3-VL on two gloo ranks of one
thread each. All contenders see the same samples, with skewed lengths and images, in float32, with the same fused AdamW
and as many samples a step. They take turns, in an order that reverses every round, and each round is on samples of its
own; the first steps of each turn are not timed. Only real tokens count, never padding. Both Trainer and we load images
inside the timed loop; the bare loop has its batches ready, clips no gradient and writes nothing. The Trainer needs the
package accelerate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.report import report
from qvl_pipeline.config import BatchingConfig, ModelConfig, TrainConfig
from qvl_pipeline.data.plan import make_plan
from qvl_pipeline.data.tokenization import SCHEMA
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.feed import load_batches, read_plan, share_out
from qvl_pipeline.engine.optimization import make_optimizers
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frame_store import FrameStoreWriter
from qvl_pipeline.media.loading import PatchLoader

RANKS = 2
PACKING_LENGTH = 2048
WARMUP_STEPS = 2
CONTENDERS = ("ours", "bare loop", "transformers Trainer")


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.rounds = 120, 1
    rows, ratios = compare(options.samples, options.rounds)
    report("train_step", rows, ratios=ratios, targets=TARGETS)


TARGETS = {"ours_to_trainer_tokens_per_second": ">= 1.5", "ours_to_bare_loop_time": "<= 1.10"}


def compare(
    samples: int, rounds: int, contenders: tuple[str, ...] = CONTENDERS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure all contenders, in turns.

    Args:
        samples: Samples of all rounds together.
        rounds: Turns of each contender.
        contenders: Which of `CONTENDERS` take part.

    Returns:
        One row for each contender, and the ratios of the medians over rounds.
    """
    torch.set_num_threads(1)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            training = _make_training(Path(folder) / str(number), samples // rounds, seed=number)
            for name in contenders if number % 2 == 0 else contenders[::-1]:
                speeds[name].append(_on_ranks(_RUNS[name], training))
    medians = {name: median(values) for name, values in speeds.items()}
    rows = [
        {"contender": name, "tokens_per_second": medians[name], "slowest": min(values), "fastest": max(values)}
        for name, values in speeds.items()
    ]
    ours = medians["ours"]
    ratios = {"ours_to_bare_loop_time": medians["bare loop"] / ours} if "bare loop" in medians else {}
    if "transformers Trainer" in medians:
        ratios["ours_to_trainer_tokens_per_second"] = ours / medians["transformers Trainer"]
    return rows, ratios


def _make_training(folder: Path, count: int, seed: int) -> Path:
    """Write model, samples, images and plan; return the path of the spec."""
    from qvl_pipeline.pipelines.train.spec import make_spec

    model = folder / "model"
    build_tiny_model(model, family="qwen3_vl", seed=0, corpus=["which digit is this?", "seven"])
    (model / "manifest.json").write_text(json.dumps({"path": ".", "family": "qwen3_vl"}))
    with FrameStoreWriter(folder / "video_frames"):
        pass
    rng = np.random.default_rng(seed)
    config = AutoConfig.from_pretrained(model)
    rows = [_sample(folder, config, rng, number) for number in range(count)]
    tokenized = folder / "tokenized.arrow"
    with pa.ipc.new_file(str(tokenized), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    batching = BatchingConfig(packing_length=PACKING_LENGTH, data_parallel_size=RANKS)
    plan, summary = make_plan(tokenized, batching, {"benchmark": 1.0})
    plan.to_parquet(folder / "pack_plan.parquet", index=False)
    spec = make_spec(
        base_model=model,
        tokenized_samples=tokenized,
        pack_plan=folder / "pack_plan.parquet",
        video_frames=folder / "video_frames",
        plan_summary=summary,
        model=ModelConfig(processor_type="qwen3_vl"),
        batching=batching,
        train=TrainConfig(learning_rate=1e-4, logging_steps=WARMUP_STEPS, report_to=["none"]),
        output_dir=folder / "run",
        identity={},
        resume_from="",
    )
    (folder / "run").mkdir()
    spec.save(folder / "spec.json")
    return folder / "spec.json"


def _sample(folder: Path, config: Any, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A sample of log-normal length, of which every second has an image of up to 8 x 12 patches."""
    length = int(np.clip(rng.lognormal(4.0, 0.9), 8, 1024))
    media, prompt = [], []
    if number % 2:
        height, width = (2 * int(n) for n in rng.integers((2, 2), (5, 7)))
        key = str(folder / f"{number}.png")
        pixels = rng.integers(0, 256, (height * 16, width * 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(key, compress_level=1)
        media = [{"type": "image", "key": key, "grid_t": 1, "grid_h": height, "grid_w": width, "seconds_per_grid": 0.0}]
        image = [config.image_token_id] * (height * width // 4)
        prompt = [config.vision_start_token_id, *image, config.vision_end_token_id]
    ids = [*prompt, *rng.integers(50, 250, size=length).tolist()]
    supervised = 1 + length // 2
    return {
        **{"sample_id": str(number), "source": "benchmark", "split": "train", "kind": "text", "task": "exact_match"},
        "answer": "",
        "input_ids": ids,
        "label_spans": [{"start": len(ids) - supervised, "end": len(ids)}],
        "length": len(ids),
        "supervised_tokens": supervised,
        "vit_patches": sum(item["grid_h"] * item["grid_w"] for item in media),
        "prompt_length": len(ids) - supervised,
        "media": media,
    }


def _ours(spec_path: Path) -> float:
    """Tokens a second of the engine, as it reports them; its first row is the warm-up."""
    if engine.main(spec_path):
        raise RuntimeError(f"the engine failed: {list(spec_path.parent.glob('run/errors/*'))}")
    lines = (spec_path.parent / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][1:]
    return sum(row["tokens"] for row in rows) / sum(row["tokens"] / row["tokens_per_second"] for row in rows)


class _Unstarted(Trainer):
    """The engine's model and batches without its loop."""

    def __init__(self, spec: TrainSpec) -> None:
        from qvl_pipeline.engine.stopping import StopRequest
        from qvl_pipeline.engine.watchdog import Watchdog

        super().__init__(spec, StopRequest(), Watchdog(spec.run.ddp_timeout, lambda *_: None))


def _bare_loop(spec_path: Path) -> float:
    """Tokens a second of forward, backward and optimizer step on batches that are ready, and nothing else."""
    spec = TrainSpec.load(spec_path)
    made = _Unstarted(spec)
    model, (optimizer,) = made.model, make_optimizers(made.model, spec.optim)
    steps = share_out(read_plan(Path(spec.data.pack_plan)), dist.get_rank(), RANKS, spec.data.packs_per_micro_batch)
    batches = list(load_batches(steps, Path(spec.data.tokenized), made.builder, num_workers=0, pin_memory=False))
    ready = iter(batches)
    for step in steps:
        if step.number == WARMUP_STEPS + 1:
            dist.barrier()
            started = time.perf_counter()
        for _ in step.micro_batches:
            (model(next(ready)).sum() / step.supervised_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    dist.barrier()
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    return sum(step.tokens for step in steps[WARMUP_STEPS:]) / seconds


def _trainer(spec_path: Path) -> float:
    """Tokens a second of transformers' Trainer (DDP): plain model, padded batches, as many samples a step."""
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    spec = TrainSpec.load(spec_path)
    config = AutoConfig.from_pretrained(spec.model.path)
    model = AutoModelForImageTextToText.from_pretrained(
        spec.model.path, dtype=torch.float32, attn_implementation="sdpa"
    )
    samples = TokenizedSamples(Path(spec.data.tokenized))
    plan = read_plan(Path(spec.data.pack_plan))
    batch_size = max(1, round(len(samples) / (len(plan) * RANKS)))
    collate = _PaddedBatches(config, PatchLoader(patch_size=16, frame_store=None))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            collate.tokens.append(collate.since)
            collate.since = 0

    arguments = TrainingArguments(
        output_dir=str(spec_path.parent / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=len(plan),
        learning_rate=spec.optim.learning_rate,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=WARMUP_STEPS,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    rows = [samples.row(number) for number in range(len(samples))]
    HFTrainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Clock()]).train()
    tokens = torch.tensor(float(sum(collate.tokens[WARMUP_STEPS:])))
    dist.all_reduce(tokens)
    dist.destroy_process_group()
    return float(tokens) / (times[-1] - times[WARMUP_STEPS - 1])


class _PaddedBatches:
    """Pads samples to the longest of the batch, as the usual collators do; counts the real tokens."""

    def __init__(self, config: Any, loader: PatchLoader) -> None:
        self._config, self._loader = config, loader
        self.since = 0
        self.tokens: list[int] = []

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids[row, :length] = torch.from_numpy(sample["input_ids"])
            mask[row, :length] = 1
            for start, end in sample["label_spans"].tolist():
                labels[row, start:end] = ids[row, start:end]
            self.since += length
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch["mm_token_type_ids"] = (ids == self._config.image_token_id).int()
        if media := [item for sample in samples for item in sample["media"]]:
            batch["pixel_values"] = self._loader.load(media).float() / 127.5 - 1
            batch["image_grid_thw"] = torch.tensor([[1, item["grid_h"], item["grid_w"]] for item in media])
        return batch


_RUNS: dict[str, Callable[[Path], float]] = dict(zip(CONTENDERS, (_ours, _bare_loop, _trainer), strict=True))


def _on_ranks(run: Callable[[Path], float], spec_path: Path) -> float:
    """Fork the ranks, with everything imported, and return what rank 0 measured."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(run, spec_path, rank, port, results)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{run.__name__} failed; exit codes {[process.exitcode for process in ranks]}")
    return results.get()


def _rank(run: Callable[[Path], float], spec_path: Path, rank: int, port: int, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0")
    tokens_per_second = run(spec_path)
    if rank == 0:
        results.put(tokens_per_second)


if __name__ == "__main__":
    main()
