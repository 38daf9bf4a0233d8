"""What would fail in the first second of every rank, checked once before any of them starts."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.training.space import check_space

if TYPE_CHECKING:
    import torch

    from qvl_pipeline.engine.spec import TrainSpec

logger = logging.getLogger(__name__)


def check_before_launch(spec: TrainSpec, steps: int | None, ranks: int) -> str:
    """Run the engine's own checks of parts, rates, schedule, kernels and ranks on a model without weights.

    Args:
        spec: The run.
        steps: Optimizer steps of its plan; `None` while there is no plan, and what depends on it cannot be checked.
        ranks: Processes of the whole job.

    Returns:
        The kernels of attention that will be used in the language model and in the vision tower, and those of experts
        and of linear attention where the model has any, as people are told.

    Raises:
        UserError: A name in `freeze_modules`, `adapter.targets`, `learning_rates`, `transformer_layer_cls_to_wrap` or
            `torch_compile_backend` fits nothing that is there, the schedule is impossible, there is no step to profile,
            a package is missing, the machine cannot run it as asked, or the disk has no room for what it leaves.
    """
    import torch

    from qvl_pipeline.engine.model.adapters.injection import inject
    from qvl_pipeline.engine.model.adapters.start import check_start
    from qvl_pipeline.engine.model.attention.kernels import choose_kernels
    from qvl_pipeline.engine.model.attention.linear import choose_linear_kernel
    from qvl_pipeline.engine.model.freezing import freeze
    from qvl_pipeline.engine.model.kernels import fused_blocks, use_liger_kernels
    from qvl_pipeline.engine.model.routing import choose_experts_kernel
    from qvl_pipeline.engine.model.sharded import frozen_parameters, layers_to_wrap
    from qvl_pipeline.engine.model.weights import build_skeleton
    from qvl_pipeline.engine.optim.optimization import learning_rate_schedule, peak_rates, trained_parts
    from qvl_pipeline.engine.parallel.sequence_parallel import check_degree
    from qvl_pipeline.engine.parallel.sharding import check_shard_size
    from qvl_pipeline.families import FAMILIES, divided_heads

    _check_settings(spec, steps)
    family, device = FAMILIES[spec.model.family], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _warn(spec, device)
    names = spec.model.attn_implementation, spec.model.vit_attn_implementation
    try:
        half, chosen = spec.parallel.half, spec.model.linear_attn_implementation
        text, vision = choose_kernels(*names, device, half=half, rmpad=spec.data.use_rmpad)
        kernels = f"{text} in the language model, {vision} in the vision tower"
        if family.experts:
            kernels += f"; experts: {choose_experts_kernel(spec.model.experts_implementation, device)}"
        if family.linear_attention:
            kernels += f"; linear attention: {choose_linear_kernel(chosen, device, half=half)}"
        check_shard_size(spec.parallel.hsdp_shard_size, ranks)
        model = build_skeleton(spec.model.path)
        check_degree(spec.parallel.sp_ulysses_degree, ranks, divided_heads(model.config.text_config))
        layers_to_wrap(model, family, spec.parallel.transformer_layer_cls_to_wrap)
        freeze(model, family, spec.model.freeze_modules)
        if spec.adapter.used:
            inject(model, family, spec.adapter)
            check_start(model, spec.adapter)
        if spec.parallel.frozen_sharding == "replicated":
            frozen_parameters(model)
        peak_rates(spec.optim, trained_parts(model, family, spec.optim))
        if steps is not None:
            learning_rate_schedule(spec.optim, steps)
        if fused_blocks(spec, device)[0]:
            use_liger_kernels(model, family, device)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_space(spec, steps, model)
    return kernels


def _check_settings(spec: TrainSpec, steps: int | None) -> None:
    """Refuse what can be told without the model: packages, precision, and what the plan does not have."""
    import torch

    if (optim := spec.optim.optim) in ("adamw_8bit", "adamw_bf16") and find_spec("torchao") is None:
        raise UserError(
            f"optim '{optim}' needs the package torchao: install it (uv pip install torchao), or choose another"
        )
    if spec.optim.in_bfloat16 and spec.adapter.used:
        raise UserError(
            "optim 'adamw_bf16' saves next to nothing where an adapter is all that is trained: choose another optim"
        )
    if spec.parallel.fp16 and not torch.cuda.is_available():
        raise UserError("fp16 needs a GPU, and this machine has none: set it to false to train in float32")
    if spec.parallel.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"bf16 is not what {torch.cuda.get_device_name()} computes in: set bf16 to false, fp16 to true")
    if spec.stream.max_steps and spec.validation.eval_strategy == "epoch":
        raise UserError("eval_strategy 'epoch' needs a plan, which iterable dataset types do not have: use 'steps'")
    if steps is not None and (profiled := spec.run.profile_steps) and profiled[0] > steps:
        raise UserError(
            f"profile_steps {list(profiled)} begin after the last step of the plan, {steps}: nothing would be traced"
        )
    if steps is not None and spec.optim.warmup_steps > steps:
        raise UserError(
            f"warmup_steps is {spec.optim.warmup_steps}, but there are {steps} steps: the learning rate would never "
            "reach its peak; lower train.warmup_steps, or use train.warmup_ratio"
        )
    if spec.adapter.used and spec.model.freeze_modules:
        raise UserError(
            f"train.freeze_modules means nothing with adapter.type '{spec.adapter.type}', which freezes all that "
            "adapter.targets and adapter.train_fully do not name: take it out"
        )
    if spec.model.torch_compile:
        _check_backend(spec.model.torch_compile_backend)


def _warn(spec: TrainSpec, device: torch.device) -> None:
    """Say what will not be as the parameters let one expect."""
    from qvl_pipeline.engine.model.kernels import fused_blocks, why_not_liger
    from qvl_pipeline.engine.optim.optimization import SAVED_BLOCKING

    if spec.run.save_async and spec.optim.optim in SAVED_BLOCKING:
        logger.warning(
            "save_async is not used: the state of optim '%s' cannot be copied aside, so training waits until a "
            "checkpoint is written",
            spec.optim.optim,
        )
    if spec.run.worst_case_first and spec.stream.max_steps:
        logger.warning("worst_case_first is not used: without a plan, nobody knows the heaviest pack beforehand")
    if spec.model.use_liger_kernel is True and (why_not := why_not_liger(device)):
        logger.warning("use_liger_kernel is %s", why_not)
    if spec.model.use_liger_kernel == "auto" and device.type == "cuda" and not any(fused_blocks(spec, device)):
        logger.warning(
            "use_liger_kernel: auto finds no liger-kernel, and steps are slower: uv pip install liger-kernel"
        )


def _check_backend(name: str) -> None:
    from torch._dynamo import list_backends

    if name not in (known := list_backends(exclude_tags=None)):
        hint = did_you_mean(name, known, f"known are {', '.join(known)}")
        raise UserError(f"torch_compile_backend '{name}' is not there: {hint}")
