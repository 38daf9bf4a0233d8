"""Teacher-forced losses: how likely a model finds the dataset's own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from qvl_pipeline.engine.model.loss import token_losses
from qvl_pipeline.evaluation.prompts import PromptCollator, batches_by_length
from qvl_pipeline.media.arrow_rows import TokenizedSamples


def supervised_tokens(sample: Mapping[str, Any]) -> int:
    """Count the tokens that a sample trains on: all answers of the assistant, each with its end token."""
    return sum(int(end - start) for start, end in sample["label_spans"])


@torch.inference_mode()
def sample_losses(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: TokenizedSamples,
    rows: Sequence[int],
    video_frames: Path,
    batch_size: int,
    *,
    on_batch: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """Compute the mean cross-entropy of each sample's supervised tokens, in nats a token.

    Args:
        model: The model.
        processor: Its processor.
        samples: The tokenized samples.
        rows: Rows of `samples`.
        video_frames: Folder of the frame store.
        batch_size: Samples in a forward pass.
        on_batch: Called after every batch with the number of samples in it.

    Returns:
        Losses in the order of `rows`.
    """
    collate = PromptCollator.create(processor, model.config, video_frames)
    losses: dict[int, float] = {}
    for batch in batches_by_length(samples, rows, batch_size, "length"):
        taken = [samples.row(row) for row in batch]
        inputs = {name: tensor.to(model.device) for name, tensor in collate.whole(taken).items()}
        index = _supervised_index(taken).to(model.device)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        # Of these tokens only: logits of all would be the largest tensor by far.
        targets, before = inputs["input_ids"].flatten()[index], hidden.flatten(0, 1)[index - 1]
        of_samples = token_losses(before, model.lm_head.weight, targets).split([*map(supervised_tokens, taken)])
        losses.update(zip(batch, [loss.mean().item() for loss in of_samples], strict=True))
        on_batch(len(batch))
    return [losses[row] for row in rows]


def _supervised_index(samples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return where the supervised tokens `[S]` of samples are in their flattened rows, padded on the left."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    starts = [number * longest - len(sample["input_ids"]) for number, sample in enumerate(samples, start=1)]
    spans = [span + start for sample, start in zip(samples, starts, strict=True) for span in sample["label_spans"]]
    return torch.from_numpy(np.concatenate([np.arange(*span) for span in spans]))
