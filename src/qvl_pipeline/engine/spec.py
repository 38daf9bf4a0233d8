"""What one training run does: the frozen form of `train_spec.json`, shared by the train stage and the engine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSpec:
    """Where the run writes and how often.

    Attributes:
        output_dir: Folder of `metrics.jsonl`, `checkpoints/`, `errors/` and `result.json`.
        logging_steps: Steps between two rows of metrics.
        save_steps: Steps between two checkpoints; 0 keeps none but the one at the end.
        save_total_limit: Checkpoints kept.
        save_async: Write checkpoints in the background, where the optimizer's state allows it.
        resume_from: Checkpoint to start from when `output_dir` has none yet; empty starts from the base model. The
            newest complete checkpoint in `output_dir` itself is always continued.
        identity: What the run and a checkpoint it continues must agree in; written into every checkpoint.
        ddp_timeout: Seconds after which a collective fails, until the first step is done.
        step_timeout_s: Seconds that a later step may take; 0 does not watch.
        seed: Seed of everything random in training.
        profile_steps: First and last step that rank 0 traces; empty traces none.
        memory_snapshot_on_oom: Record GPU allocations, and write them when memory runs out.
        worst_case_first: Try the heaviest micro-batches before the first step.
        expected_peak_bytes: Peak of a rank's tensors that the preflight foretold; 0 where nothing was.
    """

    output_dir: str
    logging_steps: int
    save_steps: int
    save_total_limit: int
    save_async: bool
    resume_from: str
    identity: dict[str, str]
    ddp_timeout: float
    step_timeout_s: float
    seed: int
    profile_steps: tuple[int, ...]
    memory_snapshot_on_oom: bool
    worst_case_first: bool
    expected_peak_bytes: int


@dataclass(frozen=True)
class ModelSpec:
    """Which model is trained.

    Attributes:
        path: Folder or hub id for `from_pretrained`.
        processor: Folder or hub id of the processor that is exported along.
        family: Name of a module in `engine.families`.
        attn_implementation: Attention kernel of the language model, or `auto`.
        vit_attn_implementation: Attention kernel of the vision tower, or `auto`.
        linear_attn_implementation: Kernels of linear attention, or `auto`; only read where a family has any.
        experts_implementation: How experts are computed, or `auto`; only read where a family has any.
        ignore_empty_think: Empty thoughts before answers are not trained on; of a stream, which is tokenised here.
        freeze_modules: Short names or globs of parts that stay as they are.
        use_liger_kernel: Use Liger's fused kernels where they run; `auto` where blocks are not compiled.
        image_min_pixels: Fewest pixels of an image, as tokenised; the exported processor keeps to them too.
        image_max_pixels: Most pixels of an image.
        torch_compile: Compile decoder layers and vision blocks; `auto` where that was measured to be the fastest.
        torch_compile_backend: Backend of `torch.compile`.
        torch_compile_mode: Mode of `torch.compile`.
    """

    path: str
    processor: str
    family: str
    attn_implementation: str
    vit_attn_implementation: str
    linear_attn_implementation: str
    experts_implementation: str
    ignore_empty_think: bool
    freeze_modules: tuple[str, ...]
    use_liger_kernel: bool | str
    image_min_pixels: int
    image_max_pixels: int
    torch_compile: bool | str
    torch_compile_backend: str
    torch_compile_mode: str


@dataclass(frozen=True)
class RecomputeSpec:
    """Which activations are recomputed in the backward pass.

    Attributes:
        llm: Of the language model: `none`, `selective` (not those of matrix products and attention) or `full`.
        vit: Of the vision tower.
        every: Blocks from one that recomputes to the next.
        offload: Keep the inputs of recomputed blocks in the CPU's memory.
    """

    llm: str
    vit: str
    every: int
    offload: bool


@dataclass(frozen=True)
class DataSpec:
    """What it is trained on.

    Attributes:
        tokenized: Arrow file of `tokenized_samples`.
        pack_plan: Parquet file of `pack_plan`.
        video_frames: Folder of the frame store.
        packing_length: Token budget of a pack.
        per_device_train_batch_size: Packs of one forward pass of one rank.
        use_rmpad: Micro-batches are packs; otherwise a padded row for each sample.
        epochs: Passes over the data that the plan makes.
        dataloader_num_workers: Loader processes of each rank, or `auto`.
        dataloader_prefetch_factor: Micro-batches that each loader process prepares ahead.
        dataloader_pin_memory: Pin batches for copies to a GPU.
        on_bad_sample: `raise` or `skip` a sample whose media cannot be loaded.
    """

    tokenized: str
    pack_plan: str
    video_frames: str
    packing_length: int
    per_device_train_batch_size: int
    use_rmpad: bool
    epochs: float
    dataloader_num_workers: int | str
    dataloader_prefetch_factor: int
    dataloader_pin_memory: bool
    on_bad_sample: str


@dataclass(frozen=True)
class StreamSpec:
    """Training without a plan: samples are shuffled and packed as they are read.

    Attributes:
        samples: Parquet file of `stream_samples`.
        max_steps: Steps to train; 0 follows the plan instead.
        packs_per_step: Packs of one step over all ranks.
        packing: Several samples per pack; otherwise each is one.
        packing_strategy: `best_fit`, `first_fit` or `balanced`.
        packing_length: Token budget of a pack.
        packing_vit_patches: Patch budget of a pack.
        shuffle_buffer_size: Samples that the next one is drawn from, over all ranks.
        weights: How often a sample of each source is seen per pass.
        samples_per_epoch: Samples of one pass, those that are left out included.
        filter_overlong: Leave out samples that do not fit into a pack; otherwise the first is an error.
        seed: Seed of the order.
    """

    samples: str
    max_steps: int
    packs_per_step: int
    packing: bool
    packing_strategy: str
    packing_length: int
    packing_vit_patches: int | None
    shuffle_buffer_size: int
    weights: dict[str, float]
    samples_per_epoch: float
    filter_overlong: bool
    seed: int


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer and its schedule; names as in transformers' `TrainingArguments`.

    Attributes:
        optim: `adamw_torch_fused`, `adamw_torch`, `adamw_8bit`, `adamw_bf16` or `muon`.
        learning_rate: Peak rate of what `learning_rates` does not name.
        learning_rates: Peak rate by part of the model (`vit`, `merger`, …, or `visual`).
        weight_decay: Decay of matrices.
        adam_beta1: Decay of AdamW's first moment.
        adam_beta2: Decay of AdamW's second moment.
        adam_epsilon: Added to AdamW's denominator.
        max_grad_norm: Gradient norm clipped to; 0 does not clip.
        lr_scheduler_type: Name known to `transformers.get_scheduler`.
        lr_scheduler_kwargs: Its arguments.
        warmup_steps: Steps of warmup.
        ema_decay: Decay of the average of the weights; 0 keeps none.
        router_aux_loss_coef: Weight of the loss that balances experts; `None` takes the checkpoint's.
    """

    optim: str
    learning_rate: float
    learning_rates: dict[str, float]
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict[str, Any]
    warmup_steps: int
    ema_decay: float
    router_aux_loss_coef: float | None

    @property
    def in_bfloat16(self) -> bool:
        """Whether trained weights and their state are held in bfloat16 too, and not in float32."""
        return self.optim == "adamw_bf16"


@dataclass(frozen=True)
class ParallelSpec:
    """How the model is sharded.

    Attributes:
        transformer_layer_cls_to_wrap: Class names that FSDP2 shards one by one; empty takes the family's.
        reshard_after_forward: Free gathered parameters after a layer's forward.
        hsdp_shard_size: Ranks that share one copy of the model; 0 shards it over all of them.
        forward_prefetch: Layers gathered ahead in the forward pass; 0 leaves it to FSDP2.
        backward_prefetch: Layers gathered ahead in the backward pass; 0 leaves it to FSDP2.
        accumulate_sharded: Exchange gradients after every micro-batch instead of once a step.
        cpu_offload: Keep parameters, gradients and optimizer state in the CPU's memory.
        frozen_sharding: Frozen weights are `sharded`, or `replicated` on every rank.
        bf16: Compute in bfloat16.
        fp16: Compute in float16 with a dynamic loss scale.
        sp_ulysses_degree: Ranks that share the tokens of one micro-batch; the data-parallel ranks are fewer by it.
    """

    transformer_layer_cls_to_wrap: tuple[str, ...]
    reshard_after_forward: bool
    hsdp_shard_size: int
    forward_prefetch: int
    backward_prefetch: int
    accumulate_sharded: bool
    cpu_offload: bool
    frozen_sharding: str
    bf16: bool
    fp16: bool
    sp_ulysses_degree: int

    @property
    def half(self) -> bool:
        """Whether the model computes in 16 bits, as fused attention must."""
        return self.bf16 or self.fp16


@dataclass(frozen=True)
class ValidationSpec:
    """Evaluation during training.

    Attributes:
        eval_strategy: `no`, `steps` or `epoch`.
        eval_steps: Steps between two evaluations, for `steps`.
        plan: Parquet file of packs of the eval split; empty without evaluation.
        load_best_model_at_end: Save a checkpoint at every evaluation that is the best so far, keep it, and export the
            best one.
    """

    eval_strategy: str
    eval_steps: int
    plan: str
    load_best_model_at_end: bool


@dataclass(frozen=True)
class SamplingSpec:
    """Which frames of a clip the samples were made of, and at which size: the exported processor is to do the same.

    Attributes:
        video_sampling_strategy: `fps` samples at a rate, `frame_num` takes a fixed number of frames.
        fps: Frames sampled per second of the clip.
        frame_num: Frames per clip, for `frame_num`.
        video_min_frames: Fewest frames per clip, for `fps`.
        video_max_frames: Most frames per clip, for `fps`.
        video_min_pixels: Fewest pixels per frame.
        video_max_pixels: Most pixels per frame.
        video_total_pixels: Most pixels per clip, all frames together.
    """

    video_sampling_strategy: str
    fps: float
    frame_num: int
    video_min_frames: int
    video_max_frames: int
    video_min_pixels: int
    video_max_pixels: int
    video_total_pixels: int


@dataclass(frozen=True)
class ExportSpec:
    """The trained model as a plain transformers folder.

    Attributes:
        output_dir: Where it goes.
        export_ema: Export the average of the weights instead of the last ones.
        dtype: Type of the weights, `float32` or `bfloat16`.
        max_shard_bytes: Most bytes of one weights file.
        keep_checkpoints: Steps whose models are exported too: `best`, `last`, `every:<steps>`.
    """

    output_dir: str
    export_ema: bool
    dtype: str
    max_shard_bytes: int
    keep_checkpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSpec:
    """A low-rank update that is trained in place of the model; names as in `config/training/adapter.py`.

    Attributes:
        type: `none`, `lora` or `dora`; with `none` nothing else here counts.
        r: Rank of the update.
        alpha: Factor on the update, before it is divided by the rank.
        rslora: Divide by the root of the rank instead.
        dropout: Share of the inputs of the update that are dropped.
        init: `zeros_b` or `pissa`.
        targets: For each part `all`, `none`, or a list of kinds and globs.
        train_fully: Short names or globs of parts that are trained beside it.
        start_from: Folder of an adapter to go on from; empty starts anew.
        quantize_base: `nf4` holds frozen matrices in four bits a number; `none` does not.
        double_quant: Hold the scales of their blocks in eight bits.
        quantize_parts: Parts whose linear layers are quantised.
        export: `adapter`, `merged` or `both`.
    """

    type: str
    r: int
    alpha: float
    rslora: bool
    dropout: float
    init: str
    targets: dict[str, str | list[str]]
    train_fully: tuple[str, ...]
    start_from: str
    quantize_base: str
    double_quant: bool
    quantize_parts: tuple[str, ...]
    export: str

    @property
    def used(self) -> bool:
        """Whether there is one."""
        return self.type != "none"

    @property
    def quantizes(self) -> bool:
        """Whether part of the model that it adapts is quantised."""
        return self.used and self.quantize_base != "none"


@dataclass(frozen=True)
class TrainSpec:
    """A whole training run."""

    run: RunSpec
    model: ModelSpec
    recompute: RecomputeSpec
    data: DataSpec
    stream: StreamSpec
    optim: OptimSpec
    parallel: ParallelSpec
    validation: ValidationSpec
    sampling: SamplingSpec
    export: ExportSpec
    adapter: AdapterSpec

    def save(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TrainSpec:
        """Read the spec.

        Raises:
            ValueError: A group or key is missing or unknown.
        """
        values = json.loads(path.read_text(encoding="utf-8"))
        groups = {field.name: globals()[field.type] for field in dataclasses.fields(cls)}
        if unknown := set(values) ^ set(groups):
            raise ValueError(f"{path}: the groups must be exactly {sorted(groups)}, differing: {sorted(unknown)}")
        return cls(**{name: _read_group(path, name, group, values[name]) for name, group in groups.items()})


def _read_group(path: Path, name: str, group: type, values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(group)}
    if differing := known ^ set(values):
        raise ValueError(f"{path}: keys of '{name}' are unknown or missing: {sorted(differing)}")
    return group(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
