"""Teacher-forced losses: how likely a model finds the dataset's own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ProcessorMixin

from qvl_pipeline.evaluation.prompts import PromptCollator
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
    *,
    on_sample: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """Compute the mean cross-entropy of each sample's supervised tokens, in nats a token.

    Only the logits of these tokens are computed. Samples are taken one by one: nothing is padded.

    Args:
        model: The model.
        processor: Its processor.
        samples: The tokenized samples.
        rows: Rows of `samples`.
        video_frames: Folder of the frame store.
        on_sample: Called with 1 after every sample.

    Returns:
        Losses in the order of `rows`.
    """
    collate = PromptCollator.create(processor, model.config, video_frames)
    losses = []
    for row in rows:
        sample = samples.row(row)
        targets = np.concatenate([np.arange(start, end) for start, end in sample["label_spans"]])
        inputs = {name: tensor.to(model.device) for name, tensor in collate.whole(sample).items()}
        # The logits that predict a token are those of the position before it.
        before = torch.from_numpy(targets - 1).to(model.device)
        logits = model(**inputs, use_cache=False, logits_to_keep=before).logits[0]
        losses.append(cross_entropy(logits.float(), inputs["input_ids"][0, before + 1]).item())
        on_sample(1)
    return losses
