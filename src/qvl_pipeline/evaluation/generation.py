"""Answers of a model to the prompts of tokenized samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from qvl_pipeline.config.evaluate import EvaluateConfig
from qvl_pipeline.engine.model.weights import read_config
from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.evaluation.prompts import PromptCollator, batches_by_length
from qvl_pipeline.media.arrow_rows import TokenizedSamples

# Kernels that only training has, and their stand-in here.
ATTENTION = {"auto": "sdpa", "torch_varlen": "sdpa"}


def load_model(model_path: str, attn_implementation: str) -> PreTrainedModel:
    """Load a model for evaluation: in bfloat16 on the GPU when there is one, else in float32 on the CPU.

    Args:
        model_path: Folder or hub id of the model.
        attn_implementation: Attention kernel of training.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    attention = ATTENTION.get(attn_implementation, attn_implementation)
    config = read_config(model_path)
    options = {"dtype": dtype, "attn_implementation": attention}
    model = AutoModelForImageTextToText.from_pretrained(model_path, config=config, **options)
    return model.to(device).eval()


def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: TokenizedSamples,
    rows: Sequence[int],
    video_frames: Path,
    evaluate: EvaluateConfig,
    *,
    on_batch: Callable[[int], object] = lambda answered: None,
) -> list[str]:
    """Answer the prompts of some samples.

    Args:
        model: The model.
        processor: Its processor.
        samples: The tokenized samples.
        rows: Rows of `samples` to answer.
        video_frames: Folder of the frame store.
        evaluate: Batch size, longest answer and how tokens are chosen.
        on_batch: Called after every batch with the number of samples in it.

    Returns:
        The answers without special tokens, in the order of `rows`.
    """
    # Replaced as a whole: what is missing in an argument of `generate` is taken from here, and the published Qwen
    # models come with sampling and a repetition penalty.
    model.generation_config = _generation_config(processor.tokenizer, evaluate)
    collate = PromptCollator.create(processor, model.config, video_frames)
    torch.manual_seed(evaluate.seed)  # only sampling draws from it
    answers: dict[int, str] = {}
    for batch in batches_by_length(samples, rows, evaluate.batch_size, "prompt_length"):
        inputs = collate([samples.row(row) for row in batch])
        with torch.inference_mode():
            output = model.generate(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(
            new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answers.update(zip(batch, texts, strict=True))
        on_batch(len(batch))
    return [answers[row] for row in rows]


def check_generation(evaluate: EvaluateConfig) -> None:
    """Refuse arguments that transformers does not know: it would keep them, and never look at them.

    Raises:
        UserError: `evaluate.generation` has such a key; the message names the nearest that is known.
    """
    known = set(vars(GenerationConfig()))
    for key in sorted(set(evaluate.generation) - known):
        remedy = did_you_mean(key, known, "see transformers.GenerationConfig for those that are")
        raise UserError(f"evaluate.generation.{key} is no argument of generation: {remedy}")


def _generation_config(tokenizer: PreTrainedTokenizerBase, evaluate: EvaluateConfig) -> GenerationConfig:
    """Greedy, without any penalty, unless `evaluate.generation` says otherwise."""
    defaults = {
        "do_sample": False,
        "max_new_tokens": evaluate.max_new_tokens,
        # The end of a turn and the end of a text, as in the published Qwen models' own configuration.
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GenerationConfig(**defaults | evaluate.generation)
