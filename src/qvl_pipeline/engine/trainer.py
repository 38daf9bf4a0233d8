"""The training loop."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.feed.batch_loader import LoaderOptions, load_batches
from qvl_pipeline.engine.feed.steps import MicroBatch, PlannedFeed, Step, read_plan, share_out
from qvl_pipeline.engine.feed.stream import StreamedFeed, host_sum
from qvl_pipeline.engine.model.adapters.start import set_initial_values
from qvl_pipeline.engine.model.export.folder import export, exported_files
from qvl_pipeline.engine.model.flops import flops_of
from qvl_pipeline.engine.model.freezing import OF_SOUND, OF_VISION
from qvl_pipeline.engine.model.loading import build_model, load_processor
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.model.weights import load_weights
from qvl_pipeline.engine.optim.ema import WeightAverage
from qvl_pipeline.engine.optim.loss_scale import LossScale
from qvl_pipeline.engine.optim.nonfinite import FiniteWatch, NonFiniteError
from qvl_pipeline.engine.optim.optimization import (
    SAVED_BLOCKING,
    learning_rate_schedule,
    make_optimizers,
    set_learning_rates,
)
from qvl_pipeline.engine.parallel.sequence_parallel import SequenceShare
from qvl_pipeline.engine.parallel.sharding import offloads, sequence_group, start_process_group
from qvl_pipeline.engine.run.checkpoints import Checkpoints, ModelState, OptimizerState, RandomState
from qvl_pipeline.engine.run.kept import KeptModels
from qvl_pipeline.engine.run.metrics import MetricsWindow, append_row, keep_rows_until, read_rows
from qvl_pipeline.engine.run.profiling import out_of_memory_explained, profiled
from qvl_pipeline.engine.run.skipped import SkippedSamples
from qvl_pipeline.engine.run.stopping import StopRequest, write_stopped
from qvl_pipeline.engine.run.validation import Validation
from qvl_pipeline.engine.run.watchdog import Watchdog, collective_timeout_s, set_collective_timeout
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.sound_store import SoundStore
from qvl_pipeline.storage.whole import write_whole
from qvl_pipeline.tokens.encoding import placeholder_ids
from qvl_pipeline.tokens.raw_samples import RawSamples

logger = logging.getLogger(__name__)


class Trainer:
    """One rank of a training run. `step` and `sample_ids` say where it is, for the error report."""

    def __init__(self, spec: TrainSpec, stop: StopRequest, watchdog: Watchdog) -> None:
        """Join the process group, then build, shard and fill the model: no rank ever holds all of it."""
        self.spec = spec
        self.stop, self.watchdog = stop, watchdog
        self.step = 0
        self.micro_batch = MicroBatch((), vision=False)
        self.mesh, self.device = start_process_group(spec.parallel.sp_ulysses_degree, spec.run.ddp_timeout)
        self.leads = dist.get_rank() == 0
        torch.manual_seed(spec.run.seed)
        self.processor = load_processor(spec)
        # Now, while a hub can be asked, and before anyone replaces the base model.
        self.exported_files = exported_files(self.processor, spec) if self.leads else {}
        self.model, self.facts = build_model(spec, self.processor, self.device, sequence_group(self.mesh))
        self.flops = flops_of(self.model)
        self.facts |= shard_model(self.model, self.device, spec.parallel)
        load_weights(self.model, spec.model.path, self.device, offload=offloads(spec.parallel, self.device))
        if spec.adapter.used:
            set_initial_values(self.model, spec.adapter, spec.model.path, spec.run.seed)
        self.builder = _make_builder(spec, self.model, self.processor, self.mesh)
        self.optimizers = make_optimizers(self.model, spec.optim)
        self.average = WeightAverage(self.model, spec.optim.ema_decay) if spec.optim.ema_decay else None
        self.finite = FiniteWatch(self.device)
        self.loss_scale = LossScale() if spec.parallel.fp16 else None
        self.feed = self._make_feed()
        self.skipped = SkippedSamples(
            Path(spec.run.output_dir) / "skipped.jsonl",
            allowed=spec.data.on_bad_sample == "skip",
            streamed=spec.stream.max_steps > 0,
        )
        self.checkpoints = self._make_checkpoints()
        self.kept = KeptModels(spec.export.keep_checkpoints, Path(spec.run.output_dir), leads=self.leads)
        evaluates = spec.validation.eval_strategy != "no"
        inputs = spec, self.builder, self.mesh, self.device, self.skipped, watchdog
        self.validation = Validation(*inputs) if evaluates else None

    def _make_feed(self) -> PlannedFeed | StreamedFeed:
        """Take this rank's share of the plan, or of the stream where there is none."""
        data, dp = self.spec.data, self.mesh["dp"]
        share = dp.get_local_rank(), dp.size(), data.per_device_train_batch_size
        always = _always_called(self.model)
        if self.spec.stream.max_steps:
            stream, skips = self.spec.stream, data.on_bad_sample == "skip"
            stores = Path(data.video_frames), self.model.family.hearing
            samples = RawSamples(Path(stream.samples), self.processor, *stores, skip_bad_samples=skips)
            sums, aside = host_sum(self.mesh["sp"].size(), self.spec.run.ddp_timeout), data.dataloader_num_workers > 0

            def exchange(values: Sequence[int]) -> list[int]:
                with self.watchdog.wait_for_ranks():
                    return sums(values)

            return StreamedFeed(samples, stream, *share, exchange, **always, aside=aside)
        plan = read_plan(Path(data.pack_plan))
        steps = share_out(plan, *share, **always, epochs=data.epochs)
        return PlannedFeed(steps)

    def _make_checkpoints(self) -> Checkpoints:
        run = self.spec.run
        state = {"model": ModelState(self.model), "optimizer": OptimizerState(self.model, self.optimizers)}
        if self.average:
            state["ema"] = self.average.state  # loading overwrites these very tensors
        if self.loss_scale:
            state["loss_scale"] = self.loss_scale
        if isinstance(self.feed, StreamedFeed):
            state["stream"] = self.feed
        self.facts["save_async"] = run.save_async and self.spec.optim.optim not in SAVED_BLOCKING
        return Checkpoints(
            Path(run.output_dir) / "checkpoints",
            state,
            rank_state={"random": RandomState(self.device)},
            identity=run.identity,
            keep=run.save_total_limit,
            asynchronous=self.facts["save_async"],
            timeout_s=run.ddp_timeout,
        )

    @property
    def sample_ids(self) -> list[str]:
        """Samples of the micro-batch that is loaded or computed."""
        if self.micro_batch.samples is not None:
            return [sample["sample_id"] for sample in self.micro_batch.samples]
        if not self.micro_batch.sample_rows:
            return []
        ids = TokenizedSamples(Path(self.spec.data.tokenized)).columns(["sample_id"])["sample_id"]
        return [ids[row].as_py() for row in self.micro_batch.sample_rows]

    def run(self) -> None:
        """Train to the end of the plan and export; or, on request, to the end of a step and no further."""
        spec, output_dir = self.spec, Path(self.spec.run.output_dir)
        max_steps = self.feed.max_steps
        self.schedule = learning_rate_schedule(spec.optim, max_steps)
        done = self._resume(output_dir)
        # A stream's steps come into being as they are loaded: trainer and loader read the same ones.
        steps, loaded = itertools.tee(self.feed.steps_after(done))
        micro_batches = (micro_batch for step in loaded for micro_batch in step.micro_batches)
        options = LoaderOptions.from_spec(spec.data, cuda=self.device.type == "cuda")
        traced = spec.run.profile_steps if self.leads else ()
        snapshot = spec.run.memory_snapshot_on_oom
        with (
            out_of_memory_explained(output_dir, dist.get_rank(), self.device, snapshot=snapshot),
            profiled(traced, done, output_dir) as end_profiled_step,
        ):
            batches = load_batches(micro_batches, Path(spec.data.tokenized), self.builder, options)
            try:
                if not self._evaluate_postponed():
                    self._train(steps, max_steps, batches, output_dir, end_profiled_step)
            except NonFiniteError:  # which all ranks find together, so the save under way can still be published
                self.checkpoints.wait()
                raise
        set_collective_timeout(spec.run.ddp_timeout, self.mesh)
        self._save()
        self.checkpoints.wait()
        if self.step < max_steps:
            if self.leads:
                write_stopped(output_dir, self.step)
            return
        self._evaluate_postponed()  # asked to stop in the last step, which leaves nothing to go on with but this
        exported_step = self.step
        best_step = self.validation.best_step if self.validation else 0
        if self.kept.reasons(self.step, best_step, max_steps) and spec.validation.load_best_model_at_end:
            self._keep(self.step)  # before the best weights take the place of these
        if spec.validation.load_best_model_at_end and self.validation.best_step:
            exported_step = self.checkpoints.load(
                output_dir / "checkpoints" / f"checkpoint-{self.validation.best_step}"
            )
        elif spec.validation.load_best_model_at_end:
            logger.warning("no evaluation had a sample left, so none is the best: the last weights are exported")
        if spec.export.export_ema:
            self.average.copy_to_weights()
        export(self.model, self.exported_files, spec)
        exported = {} if spec.export.export_ema else {exported_step: Path(spec.export.output_dir)}
        self.kept.finish(best_step, max_steps, exported, self._keep)
        if self.leads:
            self._write_result(output_dir, done, exported_step, self.kept.facts(best_step, max_steps))
        dist.barrier()

    def _train(
        self,
        steps: Iterator[Step],
        max_steps: int,
        batches: Iterator[Batch],
        output_dir: Path,
        end_profiled_step: Callable[[], None],
    ) -> None:
        """Take steps until there are no more or someone asks to stop; `self.step` is then the last one taken."""
        run, first = self.spec.run, self.step + 1
        window = MetricsWindow(
            self.builder.sources,
            self.device,
            self.flops,
            packing_length=self.spec.data.packing_length,
        )
        for number in range(first, max_steps + 1):
            self.step, self.micro_batch = number, MicroBatch((), vision=False)
            learning_rates = set_learning_rates(self.optimizers, self.schedule(self.step))
            with self.watchdog.step(self.step):
                with self.watchdog.load("the samples of its next step"):
                    step = next(steps)  # of a stream, which reads and tokenises them here
                grad_norm = self._train_step(step, batches, window)
            end_profiled_step()
            window.add_step(step)
            self.skipped.add(step.number, step.left_out)
            self.feed.finish(step)
            stops = self.checkpoints.end_step(stop_requested=self.stop.requested)
            saves = stops or (bool(run.save_steps) and step.number % run.save_steps == 0)
            evaluates = self.validation is not None and self.validation.is_due(step.number, max_steps)
            # A row ends at every checkpoint too, so that a resumed run writes the same rows as an uninterrupted one.
            if step.number % run.logging_steps == 0 or saves or evaluates or step.number == max_steps:
                self.finite.check()
                row = {"step": step.number, "max_steps": max_steps, "epoch": step.epoch}
                row |= self._row(learning_rates, grad_norm, window)
                if evaluates and stops:
                    self.validation.postpone(row)
                else:
                    if evaluates:
                        self._evaluate(row)
                        window.exclude(row["eval_time_s"])
                        is_best = (
                            self.spec.validation.load_best_model_at_end and self.validation.best_step == step.number
                        )
                        stops = self.checkpoints.end_step(stop_requested=self.stop.requested)
                        saves = stops or saves or is_best
                    if self.leads:
                        append_row(output_dir / "metrics.jsonl", row)
            best_step = self.validation.best_step if self.validation else 0
            if step.number < max_steps and self.kept.reasons(step.number, best_step, max_steps):
                window.exclude(self._keep(step.number))
            if saves:
                self._save()
            if stops:
                return
            if step.number == first:
                self.watchdog.timeout_s = run.step_timeout_s or float("inf")
                set_collective_timeout(collective_timeout_s(run.step_timeout_s) or run.ddp_timeout, self.mesh)

    def _keep(self, step: int) -> float:
        """Export the weights as those of a step; return the seconds that it took."""
        started = time.perf_counter()
        run = self.spec.run
        set_collective_timeout(run.ddp_timeout, self.mesh)  # one rank writes, and the others wait
        export(self.model, self.exported_files, self.spec, self.kept.place(step))
        dist.barrier()
        set_collective_timeout(collective_timeout_s(run.step_timeout_s) or run.ddp_timeout, self.mesh)
        return time.perf_counter() - started

    def _row(self, learning_rates: dict[str, float], grad_norm: torch.Tensor, window: MetricsWindow) -> dict[str, Any]:
        return {
            "learning_rate": self.spec.optim.learning_rate * self.schedule(self.step),
            "learning_rates": learning_rates,
            # An overflow in float16 is no number; that step was not taken.
            "grad_norm": float(grad_norm) if torch.isfinite(grad_norm) else None,
            **window.row(),
            **(self.loss_scale.row() if self.loss_scale else {}),
            "skipped_samples": self.skipped.report(),
        }

    def _evaluate(self, row: dict[str, Any]) -> None:
        """Add to a row the evaluation of the weights, which are those after its step."""

        def at(micro_batch: MicroBatch) -> None:
            self.micro_batch = micro_batch

        row |= self.validation.run(self.model, row["step"], at)
        self.micro_batch = MicroBatch((), vision=False)

    def _evaluate_postponed(self) -> bool:
        """Complete the row that waits for its evaluation, if one does; return whether to stop was asked meanwhile."""
        row = self.validation.postponed if self.validation else None
        if row is None:
            return False
        self._evaluate(row)
        if self.leads:
            append_row(Path(self.spec.run.output_dir) / "metrics.jsonl", row)
        self.validation.forget_postponed()
        if self.step < self.feed.max_steps and self.kept.reasons(self.step, self.validation.best_step, 0):
            self._keep(self.step)
        self._save()  # is done, but this step may be the best
        return self.checkpoints.end_step(stop_requested=self.stop.requested)

    def _save(self) -> None:
        self.finite.check()
        self.checkpoints.save(self.step)
        self.kept.forget_outdated(self.validation.best_step if self.validation else 0, self.step)
        if self.spec.validation.load_best_model_at_end:
            self.checkpoints.protected_step = self.validation.best_step

    def _train_step(self, step: Step, batches: Iterator[Batch], window: MetricsWindow) -> torch.Tensor:
        """Take one optimizer step; return the gradient norm."""
        for number, self.micro_batch in enumerate(step.micro_batches, start=1):
            asked = time.perf_counter()
            with self.watchdog.load():
                batch = next(batches)
            window.add_batch(batch, waited_s=time.perf_counter() - asked)
            self.skipped.add(step.number, batch.skipped)
            batch = batch.to(self.device)
            # Gradients are exchanged once a step, after its last micro-batch; or after each, to hold none whole.
            is_last = number == len(step.micro_batches)
            self.model.set_requires_gradient_sync(is_last or self.spec.parallel.accumulate_sharded)
            losses = self.model(batch)
            loss = losses.sum() / step.supervised_tokens
            (loss * self.loss_scale.value if self.loss_scale else loss).backward()
            window.losses.add(losses, batch.target_source)
            self.finite.add_losses(step.number, batch.sample_ids, losses)
        self.skipped.correct_gradients(self.model.parameters(), step.supervised_tokens)
        grad_norm = self._clip()
        if self.loss_scale is None or self.loss_scale.accepts(grad_norm):
            self.finite.add_gradient_norm(step.number, grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average:
                self.average.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _clip(self) -> torch.Tensor:
        if self.loss_scale:
            self.loss_scale.unscale(self.model.parameters())
        limit = self.spec.optim.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _resume(self, output_dir: Path) -> int:
        """Load the newest checkpoint of this run, or the one to start from; return the steps already done."""
        self.step = done = self.checkpoints.load_newest()
        if not done and self.spec.run.resume_from:
            self.step = done = self.checkpoints.load(Path(self.spec.run.resume_from))
        if done:
            logger.info("resumed after step %d", done)
        if self.leads:
            for name in ("metrics.jsonl", "skipped.jsonl"):
                keep_rows_until(output_dir / name, done)
        dist.barrier()
        if self.validation:
            self.validation.resume(output_dir, done)
            self.checkpoints.protected_step = (
                self.validation.best_step if self.spec.validation.load_best_model_at_end else 0
            )
        return done

    def _write_result(self, output_dir: Path, done: int, exported_step: int, kept: dict[str, list[str]]) -> None:
        skipped = read_rows(output_dir / "skipped.jsonl")
        result = {
            "steps": self.feed.max_steps,
            "resumed_from_step": done,
            "tokens": self.feed.tokens,
            "supervised_tokens": self.feed.supervised_tokens,
            "skipped_samples": sum(row.get("split") != "eval" for row in skipped),
            "world_size": dist.get_world_size(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "exported_step": exported_step,
            "kept_checkpoints": kept,
            **self.facts,
        }
        write_whole(output_dir / "result.json", json.dumps(result, indent=2) + "\n")  # a training is finished with it


def _always_called(model: PackedVLM) -> dict[str, bool]:
    """Which towers are called in every micro-batch, because nothing but towers is trained, and they are."""
    trained = {model.family.group_of(name) for name, p in model.hf.named_parameters() if p.requires_grad}
    only_towers = trained <= OF_VISION | OF_SOUND
    return {
        "always_vision": only_towers and bool(trained & OF_VISION),
        "always_sound": only_towers and bool(trained & OF_SOUND),
    }


def _make_builder(spec: TrainSpec, model: PackedVLM, processor: Any, mesh: DeviceMesh) -> BatchBuilder:
    config, image_processor = model.hf.config, processor.image_processor
    patch_size, temporal_patch_size = image_processor.patch_size, image_processor.temporal_patch_size
    sources = spec.stream.weights
    if not spec.stream.max_steps:
        sources = TokenizedSamples(Path(spec.data.tokenized)).columns(["source"])["source"].to_pylist()
    return BatchBuilder(
        loader=PatchLoader(
            patch_size=patch_size,
            temporal_patch_size=temporal_patch_size,
            merge_size=image_processor.merge_size,
            frame_store=Path(spec.data.video_frames),
        ),
        patch_values=3 * temporal_patch_size * patch_size**2,
        placeholder_ids=placeholder_ids(config),
        tokens_per_second=model.family.tokens_per_second(config),
        **_hearing(model, Path(spec.data.video_frames)),
        sources=tuple(sorted(set(sources))),
        rmpad=spec.data.use_rmpad,
        share=SequenceShare(mesh["sp"].get_local_rank(), mesh["sp"].size()),
    )


def _hearing(model: PackedVLM, frame_store: Path) -> dict[str, Any]:
    """What a builder of batches needs for sounds; nothing where the model does not hear."""
    hearing = model.family.hearing
    if hearing is None:
        return {}
    return {
        "sounds": SoundStore(frame_store, hearing),
        "mel_bins": hearing.mel_bins,
        "sound_chunk": hearing.chunk_of(model.hf.config),
    }
