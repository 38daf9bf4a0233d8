"""Training speed: our engine, a bare loop over the same packs, and transformers' Trainer over the same padded samples.

`python -m benchmarks.train_step [--samples 2000] [--rounds 4] [--packing-length 2048 …] [--quick]`: a tiny Qwen3-VL on
two gloo ranks of one thread each. All contenders train on the same samples, with skewed lengths and images, in float32,
with the same clipping and fused AdamW, as many steps and as many samples a step, and load their images inside the timed
loop. They take turns, in an order that reverses every round; each round is on samples of its own, and the first steps
of a turn are not timed. Only real tokens count, never padding. Ratios are medians over rounds of turns that follow each
other, of CPU time as well as of wall time: the former does not mind what else the machine does.

Two more figures say what the ratios are made of: the bare loop with its batches loaded beforehand, and the Trainer with
our patch embedding and batches of like lengths. The Trainer needs the package accelerate.

With several packing lengths, all is measured at each, on as many more samples as the packs are longer; ratios end in
the length. `--contenders` leaves some out: "ours", "bare loop" and "Trainer at its best" are what lengths are compared
by.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from qvl_pipeline.config import BatchingConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.data.plan.steps import make_plan
from qvl_pipeline.data.plan.tokenization import SCHEMA
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.feed.steps import MicroBatch, Step, read_plan
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.optim.optimization import make_optimizers
from qvl_pipeline.engine.run.metrics import MetricsWindow
from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStoreWriter
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.ports import free_port

RANKS = 2
PACKING_LENGTH = 2048
WARMUP_STEPS = 2
TARGETS = {"bare_loop_over_ours": "<= 1.03", "ours_over_trainer": ">= 3", "ours_over_trainer_at_its_best": ">= 1.15"}


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--packing-length", type=int, nargs="+", default=[PACKING_LENGTH])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.rounds = 120, 1
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    targets: dict[str, str] = {}
    several = len(options.packing_length) > 1
    for length in options.packing_length:
        samples = options.samples * length // PACKING_LENGTH
        of_length, found = compare(samples, options.rounds, tuple(options.contenders), length)
        rows += [{"packing_length": length, **row} for row in of_length]
        suffix = f"_at_{length}" if several else ""
        ratios |= {f"{key}{suffix}": value for key, value in found.items()}
        targets |= {f"{key}{suffix}": target for key, target in TARGETS.items()}
        # After each length: a run that is cut off leaves those before.
        report("train_step_lengths" if several else "train_step", rows, ratios=ratios, targets=targets)


@dataclass(frozen=True)
class _Turn:
    """What one contender did behind its warm-up: tokens of all ranks, wall time, and CPU time of all ranks."""

    tokens: int
    wall_s: float
    cpu_s: float


def compare(
    samples: int, rounds: int, contenders: tuple[str, ...] | None = None, packing_length: int = PACKING_LENGTH
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure all contenders, in turns.

    Args:
        samples: Samples of all rounds together.
        rounds: Turns of each contender.
        contenders: Which take part; all of them if `None`.
        packing_length: Tokens of a pack.

    Returns:
        One row for each contender, and the ratios: medians over rounds, of tokens a second and a CPU second.
    """
    torch.set_num_threads(1)
    names = contenders or tuple(CONTENDERS)
    turns: dict[str, list[_Turn]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            training = make_training(Path(folder) / str(number), samples // rounds, number, packing_length)
            for name in names if number % 2 == 0 else names[::-1]:
                turns[name].append(on_ranks(CONTENDERS[name], training))
    rows = [
        {
            "contender": name,
            "tokens_per_second": median(turn.tokens / turn.wall_s for turn in done),
            "slowest": min(turn.tokens / turn.wall_s for turn in done),
            "fastest": max(turn.tokens / turn.wall_s for turn in done),
            "tokens_per_cpu_second": median(turn.tokens / turn.cpu_s for turn in done),
        }
        for name, done in turns.items()
    ]
    ratios = {}
    for key, (faster, slower) in _RATIOS.items():
        if faster in turns and slower in turns:
            pairs = list(zip(turns[faster], turns[slower], strict=True))
            ratios[key] = median(a.tokens / a.wall_s * b.wall_s / b.tokens for a, b in pairs)
            ratios[f"{key}_cpu"] = median(a.tokens / a.cpu_s * b.cpu_s / b.tokens for a, b in pairs)
    return rows, ratios


def make_training(
    folder: Path, count: int, seed: int, packing_length: int = PACKING_LENGTH, micro_batches: int = 1
) -> Path:
    """Write model, samples, images and plan, with so many micro-batches a step; return the path of the spec."""
    from qvl_pipeline.training.scratch import PACK_PLAN
    from qvl_pipeline.training.spec import Inputs, make_spec

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
    batching = BatchingConfig(
        packing_length=packing_length, data_parallel_size=RANKS, gradient_accumulation_steps=micro_batches
    )
    plan, summary = make_plan(tokenized, batching, {"benchmark": 1.0})
    run = folder / "run"
    run.mkdir()
    plan.to_parquet(run / PACK_PLAN, index=False)
    spec = make_spec(
        Inputs(model, tokenized, folder / "no_stream.parquet", folder / "video_frames", summary),
        sample=SampleConfig(),
        model=ModelConfig(processor_type="qwen3_vl"),
        batching=batching,
        weights={"benchmark": 1.0},
        train=TrainConfig(learning_rate=1e-4, report_to=["none"]),
        output_dir=run,
        identity={},
        resume_from="",
    )
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
        grid = {"grid_t": 1, "grid_h": height, "grid_w": width, "seconds_per_grid": 0.0}
        media = [{"type": "image", "key": key, "spectra": 0, **grid}]
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
        "spectra": 0,
        "prompt_length": len(ids) - supervised,
        "media": media,
    }


class _Clock:
    """Times the steps of one rank behind the warm-up: wall time, and CPU time of all threads."""

    def __init__(self, steps: int) -> None:
        self._steps_left, self._warmup_left = steps, WARMUP_STEPS
        self._tokens, self._begun, self.turn = 0, (0.0, 0.0), _Turn(0, 0.0, 0.0)

    def end_step(self, tokens: int) -> None:
        """Count a finished step and the tokens that this rank trained on; the last one is waited for by all ranks."""
        now = time.perf_counter(), time.process_time()
        self._steps_left -= 1
        if self._warmup_left:
            self._warmup_left -= 1
            self._begun = now
            return
        self._tokens += tokens
        if not self._steps_left:
            wall_s, cpu_s = (end - begin for end, begin in zip(now, self._begun, strict=True))
            everyone = [torch.zeros(3, dtype=torch.float64) for _ in range(RANKS)]
            dist.all_gather(everyone, torch.tensor([self._tokens, wall_s, cpu_s], dtype=torch.float64))
            tokens_, walls, cpus = torch.stack(everyone).T
            self.turn = _Turn(int(tokens_.sum()), float(walls.max()), float(cpus.sum()))


class _ClockedTrainer(Trainer):
    """The engine's trainer, whole, with a clock beside it."""

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__(spec, StopRequest(), Watchdog(spec.run.ddp_timeout, lambda *_: None))
        self.clock = _Clock(self.feed.max_steps)

    def _train_step(self, step: Step, batches: Iterator[Batch], window: MetricsWindow) -> torch.Tensor:
        norm = super()._train_step(step, batches, window)
        self.clock.end_step(step.tokens / RANKS)
        return norm


def _ours(spec_path: Path) -> _Turn:
    """The engine, from reading images to writing a row of metrics every step."""
    trainer = _ClockedTrainer(TrainSpec.load(spec_path))
    trainer.run()
    return trainer.clock.turn


def _bare_loop(spec_path: Path, *, ready: bool = False) -> _Turn:
    """Load, forward, backward, clip and step with the model and batches of the engine, and nothing else of it.

    Args:
        spec_path: The run.
        ready: Load all batches before the first step.
    """
    spec = TrainSpec.load(spec_path)
    made = _ClockedTrainer(spec)
    model, (optimizer,) = made.model, make_optimizers(made.model, spec.optim)
    samples = TokenizedSamples(Path(spec.data.tokenized))

    def load(micro_batch: MicroBatch) -> Batch:
        return made.builder.build([samples.row(row) for row in micro_batch.sample_rows], vision=micro_batch.vision)

    steps = list(made.feed.steps_after(0))
    batches = map(load, (micro_batch for step in steps for micro_batch in step.micro_batches))
    batches = iter(list(batches)) if ready else batches
    for step in steps:
        for _ in step.micro_batches:
            (model(next(batches)).sum() / step.supervised_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made.clock.end_step(step.tokens / RANKS)
    return made.clock.turn


def _trainer(spec_path: Path, *, at_its_best: bool = False) -> _Turn:
    """Trainer of transformers (DDP) on padded batches, with as many samples a step.

    Args:
        spec_path: The run.
        at_its_best: Give it our linear patch embedding in place of its Conv3d, and samples of like lengths in a batch.
    """
    from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
    from transformers import Trainer as HFTrainer

    spec = TrainSpec.load(spec_path)
    config = AutoConfig.from_pretrained(spec.model.path)
    model = AutoModelForImageTextToText.from_pretrained(
        spec.model.path, dtype=torch.float32, attn_implementation="sdpa"
    )
    if at_its_best:
        use_linear_patch_embedding(model)
    samples = TokenizedSamples(Path(spec.data.tokenized))
    steps = len(read_plan(Path(spec.data.pack_plan)))
    collate, clock = _PaddedBatches(config, PatchLoader(patch_size=16, frame_store=None)), _Clock(steps)

    class Clock(TrainerCallback):
        def on_step_end(self, _: TrainingArguments, state: TrainerState, *__: Any, **___: Any) -> None:
            clock.end_step(collate.tokens[state.global_step - 1])  # the next batch is loaded already

    arguments = TrainingArguments(
        output_dir=str(spec_path.parent / "trainer"),
        per_device_train_batch_size=max(1, round(len(samples) / (steps * RANKS))),
        max_steps=steps,
        learning_rate=spec.optim.learning_rate,
        max_grad_norm=spec.optim.max_grad_norm,
        optim="adamw_torch_fused",
        use_cpu=True,
        train_sampling_strategy="group_by_length" if at_its_best else "random",
        length_column_name="length",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    rows = [samples.row(number) for number in range(len(samples))]
    trainer = HFTrainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.turn


class _PaddedBatches:
    """Pads samples to the longest of the batch, as the usual collators do; counts the real tokens of each batch."""

    def __init__(self, config: Any, loader: PatchLoader) -> None:
        self._config, self._loader = config, loader
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
        self.tokens.append(int(mask.sum()))
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch["mm_token_type_ids"] = (ids == self._config.image_token_id).int()
        if media := [item for sample in samples for item in sample["media"]]:
            batch["pixel_values"] = self._loader.load(media).float() / 127.5 - 1
            batch["image_grid_thw"] = torch.tensor([[1, item["grid_h"], item["grid_w"]] for item in media])
        return batch


CONTENDERS: dict[str, Callable[[Path], _Turn]] = {
    "ours": _ours,
    "bare loop": _bare_loop,
    "bare loop, batches ready": partial(_bare_loop, ready=True),
    "Trainer": _trainer,
    "Trainer at its best": partial(_trainer, at_its_best=True),
}
_RATIOS = {
    "bare_loop_over_ours": ("bare loop", "ours"),
    "ready_bare_loop_over_ours": ("bare loop, batches ready", "ours"),
    "ours_over_trainer": ("ours", "Trainer"),
    "ours_over_trainer_at_its_best": ("ours", "Trainer at its best"),
}


def on_ranks(run: Callable[[Path], Any], spec_path: Path) -> Any:
    """Fork the ranks, with everything imported, and return what the first one measured."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(run, spec_path, rank, port, results)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{run} failed; exit codes {[process.exitcode for process in ranks]}")
    return results.get()


def _rank(run: Callable[[Path], Any], spec_path: Path, rank: int, port: int, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0")
    measured = run(spec_path)
    dist.destroy_process_group()
    if rank == 0:
        results.put(measured)


if __name__ == "__main__":
    main()
