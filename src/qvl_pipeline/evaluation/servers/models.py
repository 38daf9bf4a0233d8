"""The models of an evaluation that servers answer for: one after the other, each with all questions."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import ProcessorMixin

from qvl_pipeline.config import EvaluateConfig, ServerConfig
from qvl_pipeline.config.evaluate import OWN_MODELS
from qvl_pipeline.engine.model.adapters import FOLDER as ADAPTER
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.servers.asking import Served, ask_all
from qvl_pipeline.evaluation.servers.client import ChatClient, ServerGoneError, authorization
from qvl_pipeline.evaluation.servers.kept import KeptAnswers
from qvl_pipeline.evaluation.servers.launched import find_vllm, vllm, with_processor
from qvl_pipeline.evaluation.servers.questions import Questions
from qvl_pipeline.evaluation.servers.sampling import choice_of_tokens, sampling_of_clips
from qvl_pipeline.storage.digests import DIGESTS
from qvl_pipeline.tracking.lineage.digests import weights_digest
from qvl_pipeline.training.card.model_card import vllm_options


@dataclass(frozen=True)
class Asked:
    """What is asked of servers.

    Attributes:
        evaluate: Parameters of the stage.
        family: Family of the model.
        processor: Processor of the trained model.
        trained: Folder of the trained model.
        base: Folder or hub id of the untrained one.
        tokenized: Arrow file of the samples.
        sampled: Their conversations and media: table `sampled_samples`.
        video_frames: Folder of the frame store.
        rows: Rows of `tokenized` to answer.
        scratch: Folder for answers as they arrive, and logs of launched servers.
    """

    evaluate: EvaluateConfig
    family: str
    processor: ProcessorMixin
    trained: Path
    base: str
    tokenized: Path
    sampled: pd.DataFrame
    video_frames: Path
    rows: tuple[int, ...]
    scratch: Path


def served_models(evaluate: EvaluateConfig) -> list[str]:
    """Return the names of the models that servers answer for, own ones first."""
    own = [name for name in OWN_MODELS if evaluate.backend == "openai" and (name != "base" or evaluate.compare_base)]
    return [*own, *(name for name in evaluate.servers if name not in OWN_MODELS)]


def check_servers(evaluate: EvaluateConfig) -> None:
    """Refuse what no server could be asked, before anything is: nothing is sent.

    Raises:
        UserError: vLLM is to be launched and not installed, a key is not in the environment, or `evaluate.generation`
            has what a request cannot say.
    """
    for name in served_models(evaluate):
        server = evaluate.server_of(name)
        assert server is not None
        choice_of_tokens(evaluate, server)
        authorization(name, server)
        if server.launch:
            find_vllm(name)


def ask_servers(asked: Asked, on_done: Callable[[int], object]) -> dict[str, Served]:
    """Let servers answer, model by model.

    Args:
        asked: What is asked.
        on_done: Called with a number of answers whenever they are there.

    Returns:
        By name of the model, what came of it.

    Raises:
        UserError: A server does not start, is gone, refuses all, or leaves more without an answer than it may.
    """
    found = {}
    for name in served_models(asked.evaluate):
        server = asked.evaluate.server_of(name)
        assert server is not None  # the parameters were checked for it
        kept = KeptAnswers(_kept_file(asked, name))
        with _running(asked, name, server) as url, contextlib.closing(ChatClient(name, server, url)) as client:
            model = server.model or (name if server.launch else _only_model(name, client))
            where = (asked.tokenized, asked.sampled, asked.video_frames, asked.processor)
            questions = Questions.create(*where, asked.evaluate, server, model, asked.family)
            own = name in OWN_MODELS
            found[name] = ask_all(
                name, questions, client, asked.rows, kept, _identity(asked, name, url), on_done, own=own
            )
    return found


def forget_answers(asked: Asked) -> None:
    """Remove the answers that were kept, once the evaluation has them all."""
    for name in served_models(asked.evaluate):
        KeptAnswers(_kept_file(asked, name)).remove()


def _kept_file(asked: Asked, name: str) -> Path:
    return asked.scratch / f"{name}.jsonl"


def _only_model(name: str, client: ChatClient) -> str:
    models = client.models()
    if len(models) != 1:
        listed = ", ".join(models) or "none"
        raise ServerGoneError(f"evaluate.servers.{name}.model: {client.url} lists {listed}: name the one to ask")
    return models[0]


def _identity(asked: Asked, name: str, url: str) -> str:
    """Return what answers depend on beside the request: the weights of an own model, the address of another."""
    if name not in OWN_MODELS:
        return url
    folder = asked.trained if name == "trained" else Path(asked.base)
    if not folder.is_dir():
        return asked.base
    digests = folder / DIGESTS
    return hashlib.sha256(digests.read_bytes()).hexdigest() if digests.exists() else weights_digest(folder)


@contextlib.contextmanager
def _running(asked: Asked, name: str, server: ServerConfig) -> Iterator[str]:
    """Yield the address of a server: its own, or that of one that runs until it is left."""
    if server.url is not None:
        yield server.url
        return
    if (asked.trained / ADAPTER).is_dir():
        raise UserError(
            f"evaluate.servers.{name}.launch: the trained model is an adapter: set adapter.export to merged and "
            "train, or start a server with it yourself (--lora-modules) and give its url"
        )
    model = asked.trained
    if name == "base":
        model = with_processor(asked.base, asked.trained, asked.scratch / "base")
    options = vllm_options(asked.family, sampling_of_clips(asked.processor))
    log = asked.scratch / f"vllm-{name}.log"
    with vllm(name, server, model, options, _media_folder(asked, server), log) as url:
        yield url


def _media_folder(asked: Asked, server: ServerConfig) -> Path | None:
    """Return the folder that all media are in, where they are named by path."""
    if server.media == "data":
        return None
    paths = {os.path.realpath(Path(item["path"]).parent) for media in asked.sampled["media"] for item in media}
    return Path(os.path.commonpath(paths)) if paths else None
