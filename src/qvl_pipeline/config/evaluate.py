"""Parameters of the `evaluate` stage."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block
from qvl_pipeline.config.server import ServerConfig

# The models that are this profile's own: the untrained and the trained one.
OWN_MODELS = ("base", "trained")
_SERVER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class EvaluateConfig(Block):
    """Generation on the eval split with the base and the trained model.

    Attributes:
        backend: Who answers for the trained and the untrained model: `transformers` in processes of this run, which
            compute losses too, or `openai`, the `servers` of these names, which tell none.
        servers: By name of the model: a server that answers as `trained` or as `base` (`backend: openai`); any other
            name is one more model beside them, such as that of an API.
        batch_size: Samples whose answers, and whose losses, are computed together (left-padded).
        nproc_per_node: Processes that share the samples; `auto` is one a GPU, and one without GPUs.
        max_new_tokens: Longest answer in tokens.
        generation: Arguments of `transformers.GenerationConfig` that replace greedy decoding, such as
            `{do_sample: true, temperature: 0.7}` or `{num_beams: 4}`.
        seed: Seed of sampled answers, which depend on the number of processes too.
        max_samples: Most samples evaluated, spread evenly over the eval split; `None` takes all of it.
        task_by_source: Task of all samples of a source, by its name, instead of what its rows say (where they say
            nothing, `rouge_l` if half of its answers are of more than 10 words, else `exact_match`): `exact_match`,
            `multiple_choice`, `relaxed_accuracy`, `anls`, `iou`, `grounding`, `rouge_l`, `bleu` or `cider`.
        must_not_regress: By sample kind, or `overall`, how much lower than the base model's a score of the trained
            model may be, as `{overall: 0.0, video: 0.02}`: else the pipeline fails with the table. Losses do not count.
        must_not_regress_by: What counts as lower: `difference`, any drop beyond what is allowed, or `significant`, one
            that 95 % of the paired bootstrap's draws of the samples have too. A few samples let much pass as chance.
        compare_base: Evaluate the untrained base model too, for the gain.
        checkpoint: Kept checkpoint to evaluate instead of the trained model, such as `step-300`.
        average: Kept checkpoints, two at least, whose averaged weights are evaluated instead.
        lmms_eval: Tasks of lmms-eval, where it is installed, that it measures the exported model by, such as
            `[chartqa, mmmu_val]`: beside the eval split, in rows of their own.
        lmms_eval_model_args: Arguments of lmms-eval's model, such as `{max_num_frames: 64, fps: 2.0}`; images get the
            limits of `model`.
        browsed_samples: Most samples on the page by which answers are browsed, evenly of all kinds and sources, right
            and wrong ones; 0 shows none.
        report_title: Heading of the report; `None` takes the name of the model.
        dataset: Name of the dataset, to whose validation page the report has a link; `None` has none.
    """

    backend: Literal["transformers", "openai"] = "transformers"
    servers: dict[str, ServerConfig] = Field(default_factory=dict)
    batch_size: int = Field(default=16, ge=1)
    nproc_per_node: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_new_tokens: int = Field(default=64, ge=1)
    generation: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    task_by_source: dict[str, str] = Field(default_factory=dict)
    must_not_regress: dict[str, float] = Field(default_factory=dict)
    must_not_regress_by: Literal["difference", "significant"] = "difference"
    max_samples: int | None = Field(default=None, ge=1)
    compare_base: bool = True
    checkpoint: str | None = None
    average: list[str] = Field(default_factory=list)
    lmms_eval: list[str] = Field(default_factory=list)
    lmms_eval_model_args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    browsed_samples: int = Field(default=1000, ge=0)
    report_title: str | None = None
    dataset: str | None = None

    @model_validator(mode="after")
    def _gate_needs_the_base_model(self) -> EvaluateConfig:
        if self.must_not_regress and not self.compare_base:
            raise ValueError("must_not_regress compares with the base model: set compare_base to true, or leave it out")
        if negative := [kind for kind, drop in self.must_not_regress.items() if drop < 0]:
            raise ValueError(f"must_not_regress.{negative[0]} is an allowed drop and must be at least 0")
        return self

    @model_validator(mode="after")
    def _one_model(self) -> EvaluateConfig:
        if self.average and self.checkpoint:
            raise ValueError("checkpoint and average are both set: evaluate one or the other")
        if len(self.average) == 1 or len(set(self.average)) < len(self.average):
            raise ValueError(f"average is {self.average}: name at least two checkpoints, each once")
        return self

    @model_validator(mode="after")
    def _arguments_are_of_tasks(self) -> EvaluateConfig:
        if self.lmms_eval_model_args and not self.lmms_eval:
            raise ValueError("lmms_eval_model_args are for the tasks of lmms_eval, and there are none: name some")
        return self

    @model_validator(mode="after")
    def _servers_answer_for_models(self) -> EvaluateConfig:
        for name, server in self.servers.items():
            if not _SERVER_NAME.fullmatch(name):
                raise ValueError(f"servers.{name}: a name is of letters, digits, '_', '-' and '.'")
            if name not in OWN_MODELS and server.launch:
                raise ValueError(
                    f"servers.{name}.launch starts the trained or the untrained model: give the url of another"
                )
        own = [name for name in OWN_MODELS if name in self.servers]
        if self.backend == "transformers" and own:
            raise ValueError(
                f"servers.{own[0]} is given, and backend is transformers: set it to openai, or drop the server"
            )
        if self.backend == "openai":
            if "trained" not in self.servers:
                raise ValueError("backend is openai, and servers.trained, which is to answer, is not given")
            if self.compare_base and self.server_of("base") is None:
                raise ValueError(
                    "compare_base needs a server of the untrained model, servers.base: give it, or set "
                    "compare_base to false"
                )
        return self

    def server_of(self, model: str) -> ServerConfig | None:
        """Return who answers as a model; who is launched for the trained one can be for the untrained one too."""
        trained = self.servers.get("trained")
        return self.servers.get(model) or (trained if model == "base" and trained and trained.launch else None)

    @property
    def evaluated(self) -> str:
        """Name of the evaluated model: `trained`, `step-300`, `average of step-200, step-300`."""
        return f"average of {', '.join(self.average)}" if self.average else self.checkpoint or "trained"

    @model_validator(mode="after")
    def _generation_keys_are_known(self) -> EvaluateConfig:
        reserved = {"max_new_tokens": "max_new_tokens", "max_length": "max_new_tokens", "seed": "seed"}
        for key in self.generation:
            if key in reserved:
                raise ValueError(f"generation.{key}: set evaluate.{reserved[key]} instead")
        return self
