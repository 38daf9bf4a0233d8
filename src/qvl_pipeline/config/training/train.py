"""Parameters of the `train` stage: optimisation, parallelism, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from qvl_pipeline.config.base import Block, Indifferent
from qvl_pipeline.config.training.launch import LaunchConfig
from qvl_pipeline.config.training.recomputation import ALL_RECOMPUTED, NOTHING_RECOMPUTED, GradientCheckpointingConfig
from qvl_pipeline.config.training.schedules import check_schedule

Tracker = Literal["mlflow", "tensorboard", "wandb", "none"]
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bf16", "muon"]
Kept = Literal["best", "last"] | dict[Literal["every"], PositiveInt]
Part = Literal["vit", "merger", "deepstack", "visual", "llm", "embed", "head"]


class FSDPConfig(Block):
    """How FSDP2 shards the model.

    Attributes:
        transformer_layer_cls_to_wrap: Class names of the layers that are sharded one by one; empty takes the family's
            decoder layers and vision blocks. A name that no module has is an error.
        reshard_after_forward: Free a layer's gathered parameters after its forward: less memory, more communication.
        hsdp_shard_size: Neighbouring ranks that share one copy of the model, of which there are then several (HSDP):
            parameters are gathered inside a node only. It must divide the number of ranks; 0 shards over all of them.
        forward_prefetch: Layers of the same tower gathered ahead of the one that computes; more hides more
            communication and takes more memory. 0 leaves it to FSDP2, which gathers the next one.
        backward_prefetch: The same in the backward pass.
        accumulate_sharded: Exchange gradients after every micro-batch and add up shards, instead of once a step: more
            communication, and no rank holds the gradients of all trained parameters (4 bytes each) while it
            accumulates. The gradients are the same.
        cpu_offload: Keep parameters, gradients and optimizer state in the CPU's memory, and step there: much slower,
            for models that fit no other way. Without a GPU it changes nothing, and `result.json` says so.
        frozen_sharding: Frozen weights are `sharded` like the others, or `replicated`: every rank holds them whole and
            nothing of them is gathered, for frozen parts that fit beside all else. The results are the same.
    """

    transformer_layer_cls_to_wrap: list[str] = Field(default_factory=list)
    reshard_after_forward: bool = True
    hsdp_shard_size: int = Field(default=0, ge=0)
    forward_prefetch: int = Field(default=0, ge=0)
    backward_prefetch: int = Field(default=0, ge=0)
    accumulate_sharded: bool = False
    cpu_offload: bool = False
    frozen_sharding: Literal["sharded", "replicated"] = "sharded"

    @model_validator(mode="after")
    def _replicas_are_where_they_are_used(self) -> FSDPConfig:
        if self.frozen_sharding == "replicated" and self.cpu_offload:
            raise ValueError(
                "frozen_sharding 'replicated' keeps frozen weights on the GPU, and cpu_offload moves all of them off "
                "it: choose one"
            )
        return self


class TrainConfig(Block):
    """Parameters of training; names and meanings are those of transformers' `TrainingArguments`.

    Attributes:
        optim: `adamw_torch_fused`; `adamw_torch`, the same unfused; `adamw_8bit`, with 8-bit state (needs
            torchao); `adamw_bf16`, with weights and state in bfloat16, half the memory: steps are rounded up or down
            by chance, so that small ones count on average (needs torchao, and `bf16`); or `muon`, Muon for the
            matrices of hidden layers and AdamW for embeddings, head and vectors.
        learning_rate: Peak learning rate.
        learning_rates: Peak learning rate of single parts: `vit`, `merger`, `deepstack`, `visual` (these three), `llm`,
            `embed`, `head`; the others have `learning_rate`. A part that is not there or not trained is an error.
        weight_decay: Decay of matrices; norms, biases and other vectors never decay.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_epsilon: Added to the denominator.
        max_grad_norm: Gradient norm clipped to; 0 does not clip.
        lr_scheduler_type: Name known to `transformers.get_scheduler`; not those that depend on losses.
        lr_scheduler_kwargs: Arguments of that schedule, such as `min_lr_rate` or `num_decay_steps`.
        warmup_ratio: Share of the steps spent warming up.
        warmup_steps: Steps spent warming up; overrides `warmup_ratio` when positive.
        bf16: Compute in bfloat16; weights and optimizer state stay float32.
        fp16: Compute in float16, for GPUs without bfloat16: the loss is scaled so that small gradients do not vanish,
            and a step whose gradients overflow is skipped and counted. Weights and optimizer state stay float32.
        router_aux_loss_coef: Weight of the loss that keeps experts evenly used, over all tokens of a step and all
            layers at once; `None` takes the checkpoint's, 0 leaves it out. With several micro-batches a step it takes a
            forward pass more of each.
        ema_decay: Decay of a float32 moving average of the weights, such as 0.999; 0 keeps none.
        export_ema: Export that average instead of the last weights.
        export_dtype: Type of the exported weights: `fp32` as they were trained, or `bf16`, half the size.
        max_shard_size: Most bytes of one exported weights file, such as `5GB` or `500MB`.
        gradient_checkpointing: Recompute activations in the backward pass: those of all blocks, with a list `[llm]` or
            `[vit]` those of that tower, or as a block says; `auto` lets the preflight choose the least that fits the
            device. The gradients are the same.
        torch_compile: Compile each decoder layer and vision block; pays off over many steps. `auto` does so on CUDA
            where it was measured to be faster than Liger's kernels.
        torch_compile_backend: Backend of `torch.compile`.
        torch_compile_mode: Mode of `torch.compile`. Modes with CUDA graphs are not there: FSDP2 gathers weights into
            new memory each time.
        freeze_modules: Parts that stay bit-unchanged: `visual`, `merger`, `deepstack`, `llm`, `embed`, `head`, or a
            glob over parameter names. One that matches nothing is an error.
        use_liger_kernel: Fused Liger kernels on CUDA; on a CPU a warning says that they are not used. `auto` uses them
            on CUDA where blocks are not compiled.
        use_rmpad: Packs without padding. `false` is the reference to compare with: every sample a padded row, and
            transformers' own attention with a mask; the same losses, slower, and with far more memory.
        fsdp2: Shard with FSDP2, the only strategy.
        fsdp_config: How FSDP2 shards.
        sp_ulysses_degree: Processes that share the tokens, attention heads and media of one pack (Ulysses sequence
            parallelism), for samples too long for one GPU. It must divide the attention heads and the processes.
        nproc_per_node: Processes of this node; `auto` is one per GPU, and without GPUs
            `batching.data_parallel_size` times `sp_ulysses_degree`.
        launch: Nodes, rendezvous, restarts and timeouts.
        logging_steps: Steps between two rows of metrics.
        save_steps: Steps between two checkpoints; 0 saves only at the end.
        save_total_limit: Checkpoints kept. While training goes on two are, whatever it says: the newest may be damaged.
        save_async: Write checkpoints in the background; training waits only while they are copied to host memory. With
            `adamw_8bit` it waits until they are written, and says so.
        keep_checkpoints: Steps whose models are kept, each exported like the trained one to `checkpoints/step-<n>`
            beside it: `best` (lowest `eval_loss`), `last`, and `every: <steps>`, as in `[best, every: 500]`.
        resume_from_checkpoint: `auto` continues the newest complete checkpoint of the very same configuration and plan;
            `none` starts anew; a path starts from that checkpoint of another run. Base model, plan, frozen parts,
            optimizer and average must then be the same; rates, schedule, precision and processes may differ.
        report_to: Trackers that receive the metrics.
        eval_strategy: When to compute the loss over the eval split: `no`, every `eval_steps` `steps`, or after every
            `epoch`; with either, also at the end. (The `evaluate` stage, which lets the model answer, follows anyway.)
        eval_steps: Steps between two evaluations, for `eval_strategy: steps`.
        load_best_model_at_end: Export the weights of the best evaluation instead of the last. A checkpoint is saved at
            every evaluation that is the best so far, and kept beyond `save_total_limit`.
        metric_for_best_model: What is best: the lowest `eval_loss`.
        dataloader_num_workers: Loader processes of each rank, which live as long as the run; 0 loads in the training
            process; `auto` measures on some batches of the plan how many keep the device busy, and says so.
        dataloader_prefetch_factor: Micro-batches that each loader process prepares ahead.
        dataloader_pin_memory: On CUDA, load into pinned memory, from which copies overlap with computation.
        on_bad_sample: What happens when media that passed validation cannot be loaded: `raise` ends the run and names
            sample and file; `skip` trains its pack without the sample, counts it in `skipped_samples` and names it in
            `skipped.jsonl`. The loss stays exact: a sample that is left out is not counted. Evaluations leave theirs
            out in the same way, counted in `eval_skipped_samples`.
        profile_steps: First and last step (from 1) that rank 0 traces with `torch.profiler`; the Chrome trace goes to
            `profile/` in the run's folder. Empty traces nothing.
        memory_snapshot_on_oom: Record GPU allocations, and write them to `memory/` in the run's folder when memory
            runs out. Slows training a little.
        worst_case_first: Before the first step of a training with a plan, take one on the pack with most tokens and one
            on that with most patches, and undo them bit for bit: memory runs out at once or never. `result.json` has
            the measured peak and its ratio to what the preflight foretold.
        seed: Seed of everything random in training.
    """

    optim: Optimizer = "adamw_torch_fused"
    # What is above 1 is a slip of the exponent: 1e5 for 1e-5.
    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    learning_rates: dict[Part, PositiveFloat] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    bf16: bool = False
    fp16: bool = False
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    export_ema: bool = False
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    max_shard_size: str = Field(default="5GB", pattern=r"^[1-9]\d*(MB|GB)$")
    gradient_checkpointing: bool | Literal["auto"] | list[Literal["llm", "vit"]] | GradientCheckpointingConfig = False
    torch_compile: bool | Literal["auto"] = False
    torch_compile_backend: str = "inductor"
    torch_compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    freeze_modules: list[str] = Field(default_factory=list)
    use_liger_kernel: bool | Literal["auto"] = False
    use_rmpad: bool = True
    fsdp2: Literal[True] = True
    fsdp_config: Annotated[FSDPConfig, Indifferent()] = FSDPConfig()
    sp_ulysses_degree: Annotated[Literal[1, 2, 4, 8], Indifferent()] = 1
    nproc_per_node: Annotated[int | Literal["auto"], Indifferent()] = "auto"
    launch: Annotated[LaunchConfig, Indifferent()] = LaunchConfig()
    logging_steps: Annotated[int, Indifferent()] = Field(default=1, ge=1)
    save_steps: Annotated[int, Indifferent()] = Field(default=0, ge=0)
    save_total_limit: Annotated[int, Indifferent()] = Field(default=1, ge=1)
    save_async: Annotated[bool, Indifferent()] = True
    keep_checkpoints: Annotated[list[Kept], Indifferent()] = Field(default_factory=list)
    resume_from_checkpoint: str = Field(default="auto", min_length=1)
    report_to: Annotated[list[Tracker], Indifferent()] = Field(default_factory=lambda: ["mlflow"])
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int = Field(default=0, ge=0)
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["eval_loss"] = "eval_loss"
    dataloader_num_workers: Annotated[int | Literal["auto"], Indifferent()] = 0
    dataloader_prefetch_factor: Annotated[int, Indifferent()] = Field(default=2, ge=1)
    dataloader_pin_memory: Annotated[bool, Indifferent()] = True
    on_bad_sample: Annotated[Literal["raise", "skip"], Indifferent()] = "raise"
    profile_steps: Annotated[list[int], Indifferent()] = Field(default_factory=list)
    memory_snapshot_on_oom: Annotated[bool, Indifferent()] = False
    worst_case_first: Annotated[bool, Indifferent()] = False
    seed: int = Field(default=42, ge=0)

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return what decides the weights: a run may be resumed under other values of all else."""
        kept = super().decisive(of)
        if self.resume_from_checkpoint in ("auto", "none"):  # where a training starts: both start at the base model
            del kept["resume_from_checkpoint"]
        if not self.load_best_model_at_end:  # else evaluations choose what is exported
            kept = {key: value for key, value in kept.items() if key not in ("eval_strategy", "eval_steps")}
        return kept

    @field_validator("report_to", mode="before", json_schema_input_type=list[Tracker] | Tracker)
    @classmethod
    def _one_tracker_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("nproc_per_node")
    @classmethod
    def _at_least_one_process(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 1:
            raise ValueError("nproc_per_node must be 'auto' or at least 1")
        return value

    @field_validator("dataloader_num_workers")
    @classmethod
    def _no_fewer_than_none(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 0:
            raise ValueError("dataloader_num_workers must be 'auto' or at least 0")
        return value

    @field_validator("profile_steps")
    @classmethod
    def _first_and_last(cls, value: list[int]) -> list[int]:
        if value and not (len(value) == 2 and 1 <= value[0] <= value[1]):
            raise ValueError(f"profile_steps is {value}: give the first and the last step to trace, such as [10, 12]")
        return value

    @model_validator(mode="after")
    def _one_precision(self) -> TrainConfig:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true: choose one, bf16 where the GPU has it")
        return self

    @model_validator(mode="after")
    def _what_is_offloaded_is_not_compiled(self) -> TrainConfig:
        if self.torch_compile is True and self.recomputed.offload:
            raise ValueError(
                "gradient_checkpointing.offload copies from within blocks, and nobody has tried to compile that: set "
                "it, or torch_compile, to false"
            )
        return self

    @model_validator(mode="after")
    def _weights_in_bfloat16_compute_in_it(self) -> TrainConfig:
        if self.optim == "adamw_bf16" and not self.bf16:
            raise ValueError("optim 'adamw_bf16' holds weights in bfloat16, so set bf16 to true to compute in it too")
        return self

    @model_validator(mode="after")
    def _only_packs_are_shared(self) -> TrainConfig:
        if self.sp_ulysses_degree > 1 and not self.use_rmpad:
            raise ValueError(
                f"sp_ulysses_degree {self.sp_ulysses_degree} shares packs, which use_rmpad: false does not build: set "
                "use_rmpad to true, or sp_ulysses_degree to 1"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_is_complete(self) -> TrainConfig:
        if (self.eval_strategy == "steps") != (self.eval_steps > 0):
            raise ValueError(
                f"eval_strategy is '{self.eval_strategy}' and eval_steps {self.eval_steps}: 'steps' needs a positive "
                "number of steps, and nothing else has any"
            )
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end needs evaluations to compare: set eval_strategy to steps or epoch")
        if self.load_best_model_at_end and self.export_ema:
            raise ValueError(
                "load_best_model_at_end compares the trained weights, and export_ema exports their average: choose one"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> TrainConfig:
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate)
        if self.lr_scheduler_type == "constant" and (self.warmup_ratio or self.warmup_steps):
            raise ValueError(
                "lr_scheduler_type 'constant' has no warmup: use 'constant_with_warmup', or set warmup_ratio and "
                "warmup_steps to 0"
            )
        return self

    @model_validator(mode="after")
    def _exported_average_is_kept(self) -> TrainConfig:
        if self.export_ema and not self.ema_decay:
            raise ValueError("export_ema needs an average to export: set ema_decay, for example to 0.999")
        return self

    @model_validator(mode="after")
    def _what_is_kept_can_be_told(self) -> TrainConfig:
        if "best" in self.keep_checkpoints and self.eval_strategy == "no":
            raise ValueError(
                "keep_checkpoints names 'best', which evaluations tell: set eval_strategy to steps or epoch"
            )
        if self.keep_checkpoints and self.export_ema:
            raise ValueError(
                "keep_checkpoints keeps the trained weights, and export_ema exports their average: choose one"
            )
        if len({kind.partition(":")[0] for kind in self.kept}) < len(self.keep_checkpoints):
            raise ValueError(f"keep_checkpoints is {self.keep_checkpoints}: name each of best, last and every once")
        return self

    @property
    def kept(self) -> tuple[str, ...]:
        """`keep_checkpoints` as the engine has it: `best`, `last`, `every:<steps>`."""
        return tuple(kind if isinstance(kind, str) else f"every:{kind['every']}" for kind in self.keep_checkpoints)

    @model_validator(mode="after")
    def _compilation_is_asked_for(self) -> TrainConfig:
        for key in ("torch_compile_backend", "torch_compile_mode"):
            if key in self.model_fields_set and not self.torch_compile:
                raise ValueError(f"{key} is for torch_compile, which is false: set that to true, or drop {key}")
        return self

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return int(self.max_shard_size[:-2]) * {"MB": 10**6, "GB": 10**9}[self.max_shard_size[-2:]]

    @property
    def recomputed(self) -> GradientCheckpointingConfig:
        """`gradient_checkpointing`, however it was given; `auto`, until the preflight has chosen, as all of it."""
        given = self.gradient_checkpointing
        if given == "auto":
            return ALL_RECOMPUTED
        if isinstance(given, bool):
            return ALL_RECOMPUTED if given else NOTHING_RECOMPUTED
        return GradientCheckpointingConfig(**dict.fromkeys(given, "full")) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _prefetching_needs_workers(self) -> TrainConfig:
        if "dataloader_prefetch_factor" in self.model_fields_set and not self.dataloader_num_workers:
            raise ValueError(
                "dataloader_prefetch_factor is for loader processes: set dataloader_num_workers to at least 1"
            )
        return self

    @model_validator(mode="after")
    def _ranks_that_share_a_pack_skip_together(self) -> TrainConfig:
        if self.on_bad_sample == "skip" and self.sp_ulysses_degree > 1:
            raise ValueError(
                "on_bad_sample 'skip' needs sp_ulysses_degree 1: ranks that share a pack load different media of it "
                "and would disagree on what is left of it; use on_bad_sample 'raise'"
            )
        return self

    @model_validator(mode="after")
    def _every_tracker_once(self) -> TrainConfig:
        if doubled := [tracker for tracker in self.report_to if self.report_to.count(tracker) > 1]:
            raise ValueError(f"report_to names '{doubled[0]}' twice: it would get every number twice")
        return self

    @model_validator(mode="after")
    def _none_stands_alone(self) -> TrainConfig:
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to: 'none' excludes every other tracker, but got {self.report_to}")
        return self
