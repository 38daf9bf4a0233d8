"""From the spec of a run to its steps, as one rank takes them: of the plan, or of a stream where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh
from transformers import ProcessorMixin

from qvl_pipeline.engine.feed.steps import PlannedFeed, SharedSteps, read_plan
from qvl_pipeline.engine.feed.stream import StreamedFeed, host_sum
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.tokens.raw_samples import RawSamples


def make_feed(
    spec: TrainSpec,
    processor: ProcessorMixin,
    hearing: Hearing | None,
    mesh: DeviceMesh,
    waiting: Callable[[], AbstractContextManager[None]],
    *,
    always_vision: bool,
    always_sound: bool,
) -> PlannedFeed | StreamedFeed:
    """Take this rank's share of the plan, or of the stream.

    Args:
        spec: The run.
        processor: Processor of the model, which tokenises a stream.
        hearing: What the model does with sound.
        mesh: The ranks, `dp` and `sp`.
        waiting: Within it, ranks wait for each other.
        always_vision: Call the vision tower in every micro-batch.
        always_sound: Call the audio tower in every micro-batch.
    """
    data, stream, dp = spec.data, spec.stream, mesh["dp"]
    share = dp.get_local_rank(), dp.size(), data.per_device_train_batch_size
    always = {"always_vision": always_vision, "always_sound": always_sound}
    if not stream.max_steps:
        return PlannedFeed(SharedSteps(read_plan(Path(data.pack_plan)), *share, **always, epochs=data.epochs))
    samples = RawSamples(
        Path(stream.samples),
        processor,
        Path(data.video_frames),
        hearing,
        skip_bad_samples=data.on_bad_sample == "skip",
        ignore_empty_think=spec.model.ignore_empty_think,
    )
    sums = host_sum(mesh["sp"].size(), spec.run.ddp_timeout)

    def exchange(values: Sequence[int]) -> list[int]:
        with waiting():
            return sums(values)

    return StreamedFeed(samples, stream, *share, exchange, **always, aside=data.dataloader_num_workers != 0)
