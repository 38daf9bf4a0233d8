"""Conversations whose answers were given to prompts of their own: one row for each of these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from transformers import ProcessorMixin

from qvl_pipeline.tokens.chat import prompts_of_turns
from qvl_pipeline.tokens.thoughts import thought, without_thoughts
from qvl_pipeline.tokens.unusable import UnusableSampleError

# Between the id of a sample and the number of the turn, from 1, whose answer a row of its own is trained on.
TURN_MARK = "#turn"


def with_prompts_of_turns(samples: pd.DataFrame, processor: ProcessorMixin, *, last_turn_only: bool) -> pd.DataFrame:
    """Give each answer a row of its own that the chat template renders in another way once the conversation goes on.

    Args:
        samples: Table `sampled_samples`.
        processor: Processor with the chat template.
        last_turn_only: Train on the last answer of such a conversation only, as is always so in the eval split.

    Returns:
        The table, its attributes kept; a row that ends earlier than its conversation has the turn in its id. The very
        table, where the template leaves earlier turns as they were.
    """
    if not _leaves_out_thoughts(processor):
        return samples
    rows = [
        row
        for sample in samples.to_dict("records")
        for row in _prompts(sample, processor, last_only=last_turn_only or sample["split"] != "train")
    ]
    divided = pd.DataFrame(rows, columns=samples.columns)
    divided.attrs = samples.attrs
    return divided


def divided_conversations(sample_ids: Sequence[str]) -> dict[str, int]:
    """Count the rows of their own that conversations have besides their last one, by sample id."""
    counts: dict[str, int] = {}
    for name, mark, _ in (sample_id.rpartition(TURN_MARK) for sample_id in sample_ids):
        if mark:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _leaves_out_thoughts(processor: ProcessorMixin) -> bool:
    """Try it on a conversation with thoughts, and on one without: a template may write empty ones before answers."""
    for said in ("b", f"{thought('t')}b"):
        turns = [("user", "a"), ("assistant", said), ("user", "c"), ("assistant", said)]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        try:
            if len(prompts_of_turns(processor, messages, "<two turns>")) > 1:
                return True
        except UnusableSampleError:  # such a template says of each sample what it minds
            continue
    return False


def _prompts(sample: Mapping[str, Any], processor: ProcessorMixin, *, last_only: bool) -> Iterator[dict[str, Any]]:
    messages = json.loads(sample["messages"])
    try:
        prompts = prompts_of_turns(processor, messages, sample["sample_id"])
    except UnusableSampleError:
        prompts = []
    if not prompts or prompts[0][0] == len(messages):
        yield dict(sample)
        return
    for length, trained in prompts[-1:] if last_only else prompts:
        turns = [turn if n in trained else _untrained(turn) for n, turn in enumerate(messages[:length])]
        media = sum(item["type"] != "text" for turn in turns for item in turn["content"])
        row = {**sample, "messages": json.dumps(turns, ensure_ascii=False), "media": list(sample["media"])[:media]}
        if length < prompts[-1][0]:
            said = "".join(item["text"] for item in turns[-1]["content"] if item["type"] == "text")
            row |= {"sample_id": f"{sample['sample_id']}{TURN_MARK}{length}", "answer": without_thoughts(said)}
        yield row


def _untrained(turn: dict[str, Any]) -> dict[str, Any]:
    return turn | {"trained": False} if turn["role"] == "assistant" else turn
