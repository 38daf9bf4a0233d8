"""Samples as requests: the turns before the last answer, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import ProcessorMixin

from qvl_pipeline.config import EvaluateConfig, ServerConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.servers.media import MediaParts
from qvl_pipeline.evaluation.servers.sampling import choice_of_tokens, sampling_of_clips, told_of_clips
from qvl_pipeline.media.arrow_rows import TokenizedSamples

_ABOUT_A_TURN = ("tool_call_id", "name")


@dataclass(frozen=True)
class Questions:
    """Makes the request of each sample.

    Attributes:
        samples: The tokenized samples.
        sampled: Their conversations and media: table `sampled_samples`, by sample id.
        server: Who is asked.
        model: Name of the model at the server.
        family: Family of the trained model.
        parts: Makes the parts of media.
        choice: Fields that say how tokens are chosen.
        sampling: How the exported processor samples clips.
    """

    samples: TokenizedSamples
    sampled: pd.DataFrame
    server: ServerConfig
    model: str
    family: str
    parts: MediaParts
    choice: dict[str, Any]
    sampling: dict[str, Any]

    @classmethod
    def create(
        cls,
        tokenized: Path,
        sampled: pd.DataFrame,
        video_frames: Path,
        processor: ProcessorMixin,
        evaluate: EvaluateConfig,
        server: ServerConfig,
        model: str,
        family: str,
    ) -> Questions:
        """Set up for one server.

        Raises:
            UserError: `evaluate.generation` has what this server has no field for.
        """
        parts = MediaParts(server, video_frames, processor.video_processor.temporal_patch_size)
        choice, sampling = choice_of_tokens(evaluate, server), sampling_of_clips(processor)
        by_id = sampled.set_index("sample_id")
        return cls(TokenizedSamples(tokenized), by_id, server, model, family, parts, choice, sampling)

    def body(self, row: int) -> bytes:
        """Return the body of a request, the same bytes for the same sample.

        Args:
            row: Row of the tokenized samples.

        Raises:
            NotAskableError: The server cannot be sent it.
            UserError: A medium is not the one that was validated, or `sampled_samples` has no such sample.
        """
        tokens = self.samples.row(row)
        name = tokens["sample_id"]
        if name not in self.sampled.index:
            raise UserError(f"sampled_samples has no sample '{name}', which was tokenised: run the pipeline 'tokenize'")
        sample = self.sampled.loc[name]
        turns, media = _before_the_answer(json.loads(sample["messages"])), list(sample["media"])
        planned = tokens["media"][: len(_media(turns))]
        messages = self._messages(turns, list(zip(media, planned, strict=False)))
        fields = {"model": self.model, "messages": messages} | self.choice
        if tools := turns[0].get("tools"):
            fields["tools"] = tools
        if any(item["type"] == "video" for item in planned) and self.server.clips != "images":
            times = self.parts.times(planned) if self.server.clips == "frames" else None
            fields |= told_of_clips(self.server.engine, self.family, self.sampling, times)
        fields = {key: value for key, value in (fields | self.server.extra).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()

    def _messages(self, turns: Sequence[Mapping[str, Any]], media: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
        left = iter(media)
        messages = []
        for turn in turns:
            parts: list[dict[str, Any]] = []
            for item in turn["content"]:
                parts += [item] if item["type"] == "text" else self.parts.parts(*next(left))
            # Of one text, as itself: not every server knows a list of parts in every role.
            content = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
            message = {"role": turn["role"], "content": content or ""}
            message |= {key: turn[key] for key in _ABOUT_A_TURN if key in turn}
            if calls := turn.get("tool_calls"):
                message["tool_calls"] = [_in_text(call) for call in calls]
            messages.append(message)
        return messages


def _before_the_answer(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    return turns[: answers[-1]]


def _media(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [item for turn in turns for item in turn["content"] if item["type"] != "text"]


def _in_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as JSON in a text, as OpenAI has them."""
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
