"""Servers that answer the questions of an evaluation, in block `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block, Indifferent


class ServerConfig(Block):
    """A server with OpenAI's chat completions: vLLM, SGLang, `transformers serve`, or an API.

    Attributes:
        url: Its address up to the version, such as `http://localhost:8000/v1`; `None` where it is launched.
        launch: `vllm` starts vLLM on this machine with the evaluated model, and ends it when all is answered.
        launch_args: More arguments of `vllm serve`, such as `["--tensor-parallel-size", "4"]`.
        launch_timeout_s: Longest time in seconds until a launched server has loaded its model.
        model: Name of the model at the server; `None` takes the only one that it lists.
        engine: What the server is, which decides how it is told of sampling: `openai` gets no field but OpenAI's own.
        media: `data` sends images and clips with the request, `file` names their paths, which the server must be able
            and allowed to read. Images that servers show in different ways (turned by their header, transparent, of
            rare formats) are always sent, as the model sees them; `transformers` gets the path of a clip always.
        clips: `file` is the file of a clip as `video_url`, of which the server takes frames as the exported processor
            says; `frames` the very frames of training with their times (vLLM); `images` these frames as images, each
            behind its time, for servers that know no clips.
        api_key_env: Environment variable with the key that is sent as `Authorization`.
        concurrency: Requests at a time.
        timeout_s: Longest time in seconds that one request may take.
        retries: How often a request is sent again when the server is busy, fails, or does not answer in time.
        max_failures: Share of the samples that may stay without an answer, from 0 to 1. They are named, and in no
            score; more of them end the evaluation. Answers are kept: the next run asks for the missing ones only.
        prompt_tokens: What is done when the server counts other tokens in a prompt of the trained or untrained model
            than training saw, as it samples or resizes otherwise: `warn`, `error` (such answers count as failures), or
            `off`.
        extra: Fields of the request that replace these, such as `{chat_template_kwargs: {enable_thinking: false}}`;
            `null` leaves one out.
    """

    url: str | None = None
    launch: Literal["vllm"] | None = None
    launch_args: list[str] = Field(default_factory=list)
    launch_timeout_s: Annotated[float, Field(gt=0), Indifferent()] = 1200.0
    model: str | None = None
    engine: Literal["vllm", "sglang", "transformers", "openai"] = "vllm"
    media: Literal["data", "file"] = "data"
    clips: Literal["file", "frames", "images"] = "file"
    api_key_env: str | None = None
    concurrency: Annotated[int, Field(ge=1), Indifferent()] = 16
    timeout_s: Annotated[float, Field(gt=0), Indifferent()] = 600.0
    retries: Annotated[int, Field(ge=0), Indifferent()] = 5
    max_failures: float = Field(default=0.0, ge=0, le=1)
    prompt_tokens: Literal["warn", "error", "off"] = "warn"
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_place(self) -> ServerConfig:
        if (self.url is None) == (self.launch is None):
            raise ValueError("give one of url, where a server runs, and launch, which starts one")
        if self.launch and self.engine != self.launch:
            raise ValueError(f"launch is {self.launch} and engine {self.engine}: leave out engine")
        if self.launch_args and not self.launch:
            raise ValueError("launch_args are for launch: give them to the server where it is started")
        return self

    @model_validator(mode="after")
    def _address_is_one(self) -> ServerConfig:
        if self.url is None:
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url is no address of a server: it is like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "url has a login or a query, which would be recorded: name the key's variable, api_key_env"
            )
        return self

    @model_validator(mode="after")
    def _engine_knows_frames(self) -> ServerConfig:
        if self.clips == "frames" and self.engine != "vllm":
            raise ValueError(f"clips are frames, which {self.engine} does not know: set clips to file or images")
        return self
