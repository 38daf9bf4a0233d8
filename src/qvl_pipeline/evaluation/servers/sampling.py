"""What a server is told beside the messages: how tokens are chosen, and how clips are sampled.

A server without word of it takes the model's own `generation_config.json`, with the sampling and the repetition penalty
of the published models, and of a clip as many frames as it likes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin

from qvl_pipeline.config import EvaluateConfig, ServerConfig
from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.training.card.model_card import vllm_sampling

# Of `GenerationConfig`, what a request can say, by what the server is.
_OPENAI = ("do_sample", "temperature", "top_p")
_MORE = (*_OPENAI, "top_k", "min_p", "repetition_penalty")
# What transformers takes where nothing is said.
_TOP_K = 50


def choice_of_tokens(evaluate: EvaluateConfig, server: ServerConfig) -> dict[str, Any]:
    """Return the fields of a request that say how tokens are chosen, as `evaluate.generation` does.

    Raises:
        UserError: It has an argument that this server knows no field for.
    """
    given = dict(evaluate.generation)
    if server.engine == "transformers":
        greedy = {"do_sample": False, "repetition_penalty": 1.0}
        return {"max_tokens": evaluate.max_new_tokens, "generation_config": json.dumps(greedy | given)} | _seed(
            evaluate, sampled=given.get("do_sample", False)
        )
    known = _OPENAI if server.engine == "openai" else _MORE
    for key in sorted(given.keys() - set(known)):
        remedy = did_you_mean(key, known, f"those are {', '.join(known)}")
        raise UserError(
            f"evaluate.generation.{key} is nothing that a server of the kind {server.engine} knows: {remedy}"
        )
    sampled = given.pop("do_sample", False)
    fields: dict[str, Any] = {"max_tokens": evaluate.max_new_tokens, "temperature": 0.0}
    if server.engine != "openai":
        fields["repetition_penalty"] = given.pop("repetition_penalty", 1.0)
    if sampled:
        defaults = {"temperature": 1.0, "top_p": 1.0} | ({"top_k": _TOP_K} if server.engine != "openai" else {})
        fields |= defaults | given
    return fields | _seed(evaluate, sampled=sampled)


def _seed(evaluate: EvaluateConfig, *, sampled: bool) -> dict[str, Any]:
    return {"seed": evaluate.seed} if sampled else {}


def sampling_of_clips(processor: ProcessorMixin) -> dict[str, Any]:
    """Return how the exported processor samples clips, in the keys of `training.card.model_card.sampling_item`."""
    video = processor.video_processor
    if (frames := getattr(video, "num_frames", None)) is not None:
        return {"nframes": frames}
    return {key: getattr(video, key) for key in ("fps", "min_frames", "max_frames")}


def told_of_clips(
    engine: str, family: str, sampling: Mapping[str, Any], times: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the fields of a request with clips, by what the server understands.

    Args:
        engine: What the server is.
        family: Family of the model.
        sampling: What `sampling_of_clips` returns.
        times: What vLLM is told of the frames, where it is sent these.
    """
    if engine == "transformers":
        # It takes 32 frames where nothing is said of their number.
        return {"chat_template_kwargs": {"num_frames": sampling.get("nframes")} | _without(sampling, "nframes")}
    if engine != "vllm":
        return {}
    if times is None:
        return vllm_sampling(family, sampling)
    if FAMILIES[family].limits_are_per_clip:
        return {"media_io_kwargs": {"video": times}}
    # A model that is told one interval: vLLM computes it from the rate of frames.
    rate = len(times["frames_indices"]) / times["duration"]
    return {"media_io_kwargs": {"video": times}, "mm_processor_kwargs": {"fps": round(rate, 6)}}


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}
