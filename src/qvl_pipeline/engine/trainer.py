"""The training loop."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.feed.batch_loader import LoaderOptions, load_batches
from qvl_pipeline.engine.feed.loader_processes import with_loaders
from qvl_pipeline.engine.feed.making import make_feed
from qvl_pipeline.engine.feed.steps import MicroBatch, PlannedFeed, Step
from qvl_pipeline.engine.feed.stream import StreamedFeed
from qvl_pipeline.engine.model.adapters.start import set_initial_values
from qvl_pipeline.engine.model.export.folder import export, exported_files
from qvl_pipeline.engine.model.flops import flops_of, peak_flops
from qvl_pipeline.engine.model.freezing import always_called
from qvl_pipeline.engine.model.loading import build_model, load_processor, make_builder
from qvl_pipeline.engine.model.routing import StepBalance, aux_loss_coef
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.model.weights import load_weights
from qvl_pipeline.engine.optim.ema import WeightAverage
from qvl_pipeline.engine.optim.loss_scale import LossScale
from qvl_pipeline.engine.optim.nonfinite import FiniteWatch, NonFiniteError
from qvl_pipeline.engine.optim.optimization import (
    SAVED_BLOCKING,
    clip_gradients,
    learning_rate_schedule,
    make_optimizers,
    set_learning_rates,
)
from qvl_pipeline.engine.parallel.fetching import OnItsWay
from qvl_pipeline.engine.parallel.sharding import offloads, sequence_group, sharding_mesh_of, start_process_group
from qvl_pipeline.engine.run.checkpoints import Checkpoints, ModelState, OptimizerState, RandomState
from qvl_pipeline.engine.run.kept import KeptModels
from qvl_pipeline.engine.run.metrics import MetricsWindow, append_row, keep_rows_until
from qvl_pipeline.engine.run.profiling import out_of_memory_explained, profiled
from qvl_pipeline.engine.run.result import write_result
from qvl_pipeline.engine.run.skipped import SkippedSamples
from qvl_pipeline.engine.run.stopping import StopRequest, write_stopped
from qvl_pipeline.engine.run.validation import Validation
from qvl_pipeline.engine.run.watchdog import Watchdog, collective_timeout_s, set_collective_timeout
from qvl_pipeline.engine.run.worst_case import WorstCase, try_worst_case
from qvl_pipeline.engine.spec import TrainSpec

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
        self.meshes = self.mesh, sharding_mesh_of(self.model)
        load_weights(self.model, spec.model.path, self.device, offload=offloads(spec.parallel, self.device))
        if spec.adapter.used:
            set_initial_values(self.model, spec.adapter, spec.model.path, spec.run.seed)
        self.builder = make_builder(spec, self.model, self.processor, self.mesh)
        self.optimizers = make_optimizers(self.model, spec.optim)
        self.average = WeightAverage(self.model, spec.optim.ema_decay) if spec.optim.ema_decay else None
        self.router_aux_loss_coef = aux_loss_coef(spec.optim.router_aux_loss_coef, self.model.hf, self.model.routing)
        self.finite = FiniteWatch(self.device)
        self.loss_scale = LossScale() if spec.parallel.fp16 else None
        waiting, always = watchdog.wait_for_ranks, always_called(self.model.hf, self.model.family)
        self.feed = make_feed(spec, self.processor, self.model.family.hearing, self.mesh, waiting, **always)
        data, why = with_loaders(spec.data, self.feed, self.builder, self.flops, peak_flops(self.device))
        if why and self.leads:
            logger.info("dataloader_num_workers: auto is %s", why)
        self.facts["dataloader_num_workers"] = data.dataloader_num_workers
        spec = self.spec = dataclasses.replace(spec, data=data)
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
        return self.micro_batch.sample_ids(Path(self.spec.data.tokenized))

    @property
    def best_step(self) -> int:
        """Step of the lowest loss of the evaluations; 0 before and without any."""
        return self.validation.best_step if self.validation else 0

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
        with (
            out_of_memory_explained(output_dir, dist.get_rank(), self.device, snapshot=spec.run.memory_snapshot_on_oom),
            profiled(spec.run.profile_steps if self.leads else (), done, output_dir) as end_profiled_step,
        ):
            if spec.run.worst_case_first and isinstance(self.feed, PlannedFeed) and not done:
                self._try_worst_case()
            batches = load_batches(micro_batches, Path(spec.data.tokenized), self.builder, options)
            try:
                if not self._evaluate_postponed():
                    self._train(steps, max_steps, batches, end_profiled_step)
            except NonFiniteError:  # which all ranks find together, so the save under way can still be published
                self.checkpoints.wait()
                raise
        set_collective_timeout(spec.run.ddp_timeout, *self.meshes)
        self._save()
        self.checkpoints.wait()
        if self.step < max_steps:
            if self.leads:
                write_stopped(output_dir, self.step)
            return
        self._evaluate_postponed()  # asked to stop in the last step, which leaves nothing to go on with but this
        exported_step = self.step
        best_step = self.best_step
        if self.kept.reasons(self.step, best_step, max_steps) and spec.validation.load_best_model_at_end:
            self._keep(self.step)  # before the best weights take the place of these
        if spec.validation.load_best_model_at_end and best_step:
            exported_step = self.checkpoints.load(output_dir / "checkpoints" / f"checkpoint-{best_step}")
        elif spec.validation.load_best_model_at_end:
            logger.warning("no evaluation had a sample left, so none is the best: the last weights are exported")
        if spec.export.export_ema:
            self.average.copy_to_weights()
        export(self.model, self.exported_files, spec)
        exported = {} if spec.export.export_ema else {exported_step: Path(spec.export.output_dir)}
        self.kept.finish(best_step, max_steps, exported, self._keep)
        if self.leads:
            kept = self.kept.facts(best_step, max_steps)
            steps_done = {"resumed_from": done, "exported_step": exported_step}
            write_result(output_dir, self.feed, self.device, **steps_done, kept=kept, facts=self.facts)
        dist.barrier()

    def _try_worst_case(self) -> None:
        """Take a step on the heaviest micro-batches of the plan, and undo it."""
        spec, alone = self.spec, LoaderOptions(0, 1, False, self.spec.data.on_bad_sample == "skip")
        shares = self.feed.shares

        def load(micro_batch: MicroBatch) -> Batch:
            self.micro_batch = micro_batch
            return next(load_batches([micro_batch], Path(spec.data.tokenized), self.builder, alone))

        heaviest = [shares[step].micro_batches[number] for step, number in shares.heaviest()]
        case = WorstCase(heaviest, shares.accumulates, load, spec.run.expected_peak_bytes)
        sharded = spec.parallel.accumulate_sharded
        self.facts["worst_case"] = try_worst_case(case, self.model, self.optimizers, self.device, sharded)

    def _train(
        self,
        steps: Iterator[Step],
        max_steps: int,
        batches: Iterator[Batch],
        end_profiled_step: Callable[[], None],
    ) -> None:
        """Take steps until there are no more or someone asks to stop; `self.step` is then the last one taken."""
        run, data, first = self.spec.run, self.spec.data, self.step + 1
        window = MetricsWindow(self.builder.sources, self.device, self.flops, packing_length=data.packing_length)
        late: Callable[[], dict[str, Any]] | None = None  # the row of the step before

        def write_late() -> None:
            nonlocal late
            if late:
                self._write(late())
            late = None

        for number in range(first, max_steps + 1):
            self.step, self.micro_batch = number, MicroBatch((), vision=False)
            learning_rates = set_learning_rates(self.optimizers, self.schedule(self.step))
            with self.watchdog.step(self.step):
                with self.watchdog.load("the samples of its next step"):
                    step = next(steps)  # of a stream, which reads and tokenises them here
                grad_norm = self._train_step(step, batches, window)
                write_late()
            end_profiled_step()
            window.add_step(step)
            self.skipped.add(step.number, step.left_out)
            self.feed.finish(step)
            stops = self.checkpoints.end_step(stop_requested=self.stop.requested)
            saves = stops or (bool(run.save_steps) and step.number % run.save_steps == 0)
            evaluates = self.validation is not None and self.validation.is_due(step.number, max_steps)
            # A row ends at every checkpoint too, so that a resumed run writes the same rows as an uninterrupted one.
            if step.number % run.logging_steps == 0 or saves or evaluates or step.number == max_steps:
                late = self._row(step, learning_rates, grad_norm, window)
            if saves or evaluates or step.number == max_steps:
                row, late = late(), None
                if evaluates and stops:
                    self.validation.postpone(row)
                else:
                    if evaluates:
                        self._evaluate(row)
                        window.exclude(row["eval_time_s"])
                        is_best = self.spec.validation.load_best_model_at_end and self.best_step == step.number
                        stops = self.checkpoints.end_step(stop_requested=self.stop.requested)
                        saves = stops or saves or is_best
                    self._write(row)
            if step.number < max_steps and self.kept.reasons(step.number, self.best_step, max_steps):
                write_late()
                window.exclude(self._keep(step.number))
            if saves:
                self._save()
            if stops:
                return
            if step.number == first:
                self.watchdog.timeout_s = run.step_timeout_s or float("inf")
                self._limit_waits()

    def _keep(self, step: int) -> float:
        """Export the weights as those of a step; return the seconds that it took."""
        started = time.perf_counter()
        run = self.spec.run
        self.finite.check()
        set_collective_timeout(run.ddp_timeout, *self.meshes)  # one rank writes, and the others wait
        export(self.model, self.exported_files, self.spec, self.kept.place(step))
        dist.barrier()
        self._limit_waits()
        return time.perf_counter() - started

    def _limit_waits(self) -> None:
        """From here on ranks wait for each other for as long as a step may take."""
        run = self.spec.run
        set_collective_timeout(collective_timeout_s(run.step_timeout_s) or run.ddp_timeout, *self.meshes)

    def _row(
        self, step: Step, learning_rates: dict[str, float], grad_norm: torch.Tensor, window: MetricsWindow
    ) -> Callable[[], dict[str, Any]]:
        """Close a row of metrics after a step; return what fetches it, best when the device has got that far.

        So even `logging_steps: 1` makes no host wait: while the row is fetched, the device has the next step to do.
        """
        seen, norm_on_its_way, closed = self.finite.mark(), OnItsWay(grad_norm), window.close()
        rate, skipped = self.spec.optim.learning_rate * self.schedule(self.step), self.skipped.report()
        scale = self.loss_scale.row() if self.loss_scale else {}

        def fetch() -> dict[str, Any]:
            self.finite.check(seen)
            norm = float(norm_on_its_way.arrived())
            return {
                "step": step.number,
                "max_steps": self.feed.max_steps,
                "epoch": step.epoch,
                "learning_rate": rate,
                "learning_rates": learning_rates,
                # An overflow in float16 is no number; that step was not taken.
                "grad_norm": norm if math.isfinite(norm) else None,
                **closed.row(),
                **scale,
                "skipped_samples": skipped,
            }

        return fetch

    def _write(self, row: dict[str, Any]) -> None:
        if self.leads:
            append_row(Path(self.spec.run.output_dir) / "metrics.jsonl", row)

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
        self._write(row)
        self.validation.forget_postponed()
        if self.step < self.feed.max_steps and self.kept.reasons(self.step, self.best_step, 0):
            self._keep(self.step)
        self._save()  # is done, but this step may be the best
        return self.checkpoints.end_step(stop_requested=self.stop.requested)

    def _save(self) -> None:
        self.finite.check()
        self.checkpoints.save(self.step)
        self.kept.forget_outdated(self.best_step, self.step)
        if self.spec.validation.load_best_model_at_end:
            self.checkpoints.protected_step = self.best_step

    def _train_step(self, step: Step, batches: Iterator[Batch], window: MetricsWindow) -> torch.Tensor:
        """Take one optimizer step; return the gradient norm."""
        balance = None
        if self.router_aux_loss_coef:
            balance = StepBalance(self.model.routing, lambda: self.skipped.tokens / step.supervised_tokens)
        loaded = (self._load(micro_batch, step, batches, window) for micro_batch in step.micro_batches)
        if balance and len(step.micro_batches) > 1:
            loaded = list(loaded)
            balance.count(self._forward_passes(step, loaded))
        for number, (batch, self.micro_batch) in enumerate(zip(loaded, step.micro_batches, strict=True), start=1):
            batch = batch.to(self.device)
            # Gradients are exchanged once a step, after its last micro-batch; or after each, to hold none whole.
            is_last = number == len(step.micro_batches)
            self.model.set_requires_gradient_sync(is_last or self.spec.parallel.accumulate_sharded)
            losses = self.model(batch)
            loss = losses.sum() / step.supervised_tokens
            if balance:
                loss = loss + self.router_aux_loss_coef * balance.loss()
            (loss * self.loss_scale.value if self.loss_scale else loss).backward()
            window.losses.add(losses, batch.target_source)
            self.finite.add_losses(step.number, batch.sample_ids, losses)
        if balance:
            window.choices.append(balance.totals)
        self.skipped.correct_gradients(self.model.parameters(), step.supervised_tokens)
        if self.loss_scale:
            self.loss_scale.unscale(self.model.parameters())
        grad_norm = clip_gradients(self.model.parameters(), self.spec.optim.max_grad_norm)
        if self.loss_scale is None or self.loss_scale.accepts(grad_norm):
            self.finite.add_gradient_norm(step.number, grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average:
                self.average.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _load(self, micro_batch: MicroBatch, step: Step, batches: Iterator[Batch], window: MetricsWindow) -> Batch:
        """Take the next micro-batch, in host memory."""
        self.micro_batch = micro_batch
        asked = time.perf_counter()
        with self.watchdog.load():
            batch = next(batches)
        window.add_batch(batch, waited_s=time.perf_counter() - asked)
        self.skipped.add(step.number, batch.skipped)
        return batch

    def _forward_passes(self, step: Step, loaded: Sequence[Batch]) -> Iterator[torch.Tensor]:
        for self.micro_batch, batch in zip(step.micro_batches, loaded, strict=True):
            yield self.model(batch.to(self.device))

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
            self.checkpoints.protected_step = self.best_step if self.spec.validation.load_best_model_at_end else 0
        return done
