"""Greedy answers of a model to the prompts of tokenized samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from qvl_pipeline.config.evaluate import EvaluateConfig
from qvl_pipeline.evaluation.prompts import PromptCollator
from qvl_pipeline.media.arrow_rows import TokenizedSamples

# Kernels that only training has, and their stand-in here.
ATTENTION = {"auto": "sdpa", "torch_varlen": "sdpa"}


def base_model_path(folder: Path) -> str:
    """Read where the base model lies.

    Args:
        folder: The catalog entry `base_model`.

    Returns:
        Folder or hub id for `from_pretrained`.
    """
    path = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["path"]
    return str(folder) if path == "." else path


def generate_answers(
    model_path: str,
    processor: ProcessorMixin,
    samples: TokenizedSamples,
    rows: Sequence[int],
    video_frames: Path,
    evaluate: EvaluateConfig,
    *,
    attn_implementation: str = "auto",
    on_batch: Callable[[int], object] = lambda answered: None,
) -> list[str]:
    """Answer the prompts of some samples, greedily: the likeliest token at every step, without any penalty.

    Runs in bfloat16 on the GPU when there is one, else in float32 on the CPU.

    Args:
        model_path: Folder or hub id of the model.
        processor: Its processor.
        samples: The tokenized samples.
        rows: Rows of `samples` to answer.
        video_frames: Folder of the frame store.
        evaluate: Batch size and longest answer.
        attn_implementation: Attention kernel.
        on_batch: Called after every batch with the number of samples in it.

    Returns:
        The answers without special tokens, in the order of `rows`.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    attention = ATTENTION.get(attn_implementation, attn_implementation)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype, attn_implementation=attention)
    model.to(device).eval()
    # Replaced as a whole: what is missing in an argument of `generate` is taken from here, and the published Qwen
    # models come with sampling and a repetition penalty.
    model.generation_config = _greedy(processor.tokenizer, evaluate.max_new_tokens)
    collate = PromptCollator.create(processor, model.config, video_frames)
    answers: dict[int, str] = {}
    for batch in _batches(samples, rows, evaluate.batch_size):
        inputs = collate([samples.row(row) for row in batch])
        with torch.inference_mode():
            output = model.generate(**{name: tensor.to(device) for name, tensor in inputs.items()})
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(
            new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answers.update(zip(batch, texts, strict=True))
        on_batch(len(batch))
    return [answers[row] for row in rows]


def _greedy(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        # The end of a turn and the end of a text, as in the published Qwen models' own configuration.
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(samples: TokenizedSamples, rows: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield rows in batches of similar prompt length, so that little is padded."""
    lengths = samples.columns(["prompt_length"]).column("prompt_length").to_numpy()
    by_length = sorted(rows, key=lambda row: (lengths[row], row))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]
