"""Loss over the eval split while training goes on, and which step was the best so far."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.feed.batch_loader import LoaderOptions, load_batches
from qvl_pipeline.engine.feed.steps import MicroBatch, SharedSteps, read_plan
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.optim.nonfinite import FiniteWatch
from qvl_pipeline.engine.run import checkpoints
from qvl_pipeline.engine.run.metrics import SourceLosses, read_rows
from qvl_pipeline.engine.run.skipped import SkippedSamples
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.storage.whole import write_whole

POSTPONED = "postponed.json"


class Validation:
    """Teacher-forced loss over a plan of the eval split, exact by token over all ranks; leaves no trace in training.

    Ranks run equally many micro-batches, with nothing in those for which they have no pack left: the forward pass of a
    sharded model is a collective.

    Attributes:
        best_step: Step with the lowest loss so far, of those that were evaluated.
        postponed: The row of metrics of the last step, when it still waits for its evaluation.
    """

    def __init__(
        self,
        spec: TrainSpec,
        builder: BatchBuilder,
        mesh: DeviceMesh,
        device: torch.device,
        skipped: SkippedSamples,
        watchdog: Watchdog,
    ) -> None:
        """Read the eval plan and take this rank's share."""
        self._spec = spec
        self._builder = builder
        self._device = device
        self._skipped = skipped
        self._watchdog = watchdog
        self._watched = False
        dp = mesh["dp"]
        packs = spec.data.per_device_train_batch_size
        self._steps = SharedSteps(read_plan(Path(spec.validation.plan)), dp.get_local_rank(), dp.size(), packs)
        self.best_step = 0
        self.postponed: dict[str, Any] | None = None
        self._postponed_path = Path(spec.run.output_dir) / POSTPONED
        self._best_loss = math.inf

    def is_due(self, step: int, max_steps: int) -> bool:
        """Say whether `step` is to be followed by an evaluation: as `eval_strategy` asks, and at the end."""
        if step == max_steps:
            return True
        if self._spec.validation.eval_strategy == "steps":
            return step % self._spec.validation.eval_steps == 0
        passed, before = (math.floor(self._spec.data.epochs * s / max_steps + 1e-9) for s in (step, step - 1))
        return passed > before

    def run(self, model: PackedVLM, step: int, at: Callable[[MicroBatch], None]) -> dict[str, Any]:
        """Evaluate the weights after `step`; called by all ranks, which return the same.

        Args:
            model: The model.
            step: Steps taken.
            at: Told of each micro-batch before it is loaded.

        Returns:
            `eval_loss` (none, if all samples had to be skipped), `eval_loss_by_source`, `eval_tokens` (supervised
            tokens), `eval_skipped_samples` and `eval_time_s`.

        Raises:
            NonFiniteError: A loss is not a number, so that no evaluation can be the best.
        """
        started = time.perf_counter()
        losses = SourceLosses(self._builder.sources, self._device)
        finite = FiniteWatch(self._device, "an evaluation loss")
        cuda = [self._device] if self._device.type == "cuda" else []
        # A data loader draws from the global generator, and training must not notice.
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            model.eval()
            options = LoaderOptions.from_spec(self._spec.data, cuda=bool(cuda))
            micro_batches = [micro_batch for step in self._steps for micro_batch in step.micro_batches]
            batches = iter(load_batches(micro_batches, Path(self._spec.data.tokenized), self._builder, options))
            for micro_batch in micro_batches:
                at(micro_batch)
                with self._watch(step):
                    with self._watchdog.load("its next batch of the evaluation"):
                        batch = next(batches)
                    self._skipped.add(step, batch.skipped, split="eval")
                    batch = batch.to(self._device)
                    of_tokens = model(batch)
                    losses.add(of_tokens, batch.target_source)
                    finite.add_losses(step, batch.sample_ids, of_tokens)
            model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward pass does it here
        finite.check()
        dist.all_reduce(losses.sums)
        loss, by_source, tokens = losses.means(losses.sums.cpu())
        if loss is not None and loss < self._best_loss:
            self._best_loss, self.best_step = loss, step
        return {
            "eval_loss": loss,
            "eval_loss_by_source": by_source,
            "eval_tokens": tokens,
            "eval_skipped_samples": self._skipped.report(),
            "eval_time_s": time.perf_counter() - started,
        }

    def _watch(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Watch a micro-batch as if it were a step; but not the very first, for which blocks may have to compile."""
        first, self._watched = not self._watched, True
        return contextlib.nullcontext() if first else self._watchdog.step(step)

    def postpone(self, row: dict[str, Any]) -> None:
        """Leave an evaluation to the run that goes on from here, as it may take longer than a stopping run has.

        The row waits in a file of its own, so that the rows that trackers follow are those of an undisturbed run.
        """
        self.postponed = row
        if dist.get_rank() == 0:
            write_whole(self._postponed_path, json.dumps(row) + "\n")

    def forget_postponed(self) -> None:
        """Note that the row is complete, and among the others."""
        self.postponed = None
        if dist.get_rank() == 0:
            self._postponed_path.unlink()

    def resume(self, output_dir: Path, done: int) -> None:
        """Find the best step of a run that is resumed after `done`, and the row that waits for its evaluation.

        The best is one of the rows left whose checkpoint is there.
        """
        saved = {step for step, _ in checkpoints.completed(output_dir / "checkpoints")}
        rows = read_rows(output_dir / "metrics.jsonl")
        for row in rows:
            loss = row.get("eval_loss")
            if row["step"] in saved and loss is not None and loss < self._best_loss:
                self._best_loss, self.best_step = loss, row["step"]
        for row in read_rows(self._postponed_path):
            # One of another step is of a stop whose checkpoint was not written, or that was completed since.
            if row["step"] == done and all(other["step"] != done for other in rows):
                self.postponed = row
