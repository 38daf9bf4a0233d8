"""Optimizers, their parameter groups, and the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from qvl_pipeline.engine.model.adapters.adapted import adapter_parameters
from qvl_pipeline.engine.model.freezing import ALIASES
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.optim.muon import ShardedMuon
from qvl_pipeline.engine.spec import OptimSpec
from qvl_pipeline.families import ModelFamily

# Second matrices of adapters, which may have a rate of their own (Hayou et al. 2024, LoRA+).
LORA_B = "lora_b"

# What a factor of exactly 1 may come out as.
_ROUNDING = 1e-9
# Optimizers whose state cannot be written in the background: torch copies it aside tensor by tensor, each into a new
# one like it, and torchao's 8-bit tensors (0.18) do not know how to make one (aten.new_empty).
SAVED_BLOCKING = frozenset({"adamw_8bit"})


def make_optimizers(model: PackedVLM, spec: OptimSpec) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a run: one, or with Muon two, as Muon is for the matrices of hidden layers only.

    A parameter group is a part of the model (`vit`, `llm`, …) with its learning rate. Matrices decay; vectors (norms,
    biases) do not. Groups carry their `name` and `peak_lr`, which `set_learning_rates` scales.

    Args:
        model: The model, frozen where it is to stay.
        spec: The optimizer and its rates.

    Returns:
        The optimizers; together they hold each trained parameter exactly once.

    Raises:
        ValueError: `learning_rates` names a part that the model has not or that is frozen.
        ImportError: `adamw_8bit` or `adamw_bf16` without torchao.
    """
    groups = _parameter_groups(model, spec)
    if spec.optim != "muon":
        return [make_adamw(groups, spec)]
    hidden = _hidden_matrices(model)
    muon = [group | {"params": [p for p in group["params"] if p in hidden]} for group in groups]
    adamw = [group | {"params": [p for p in group["params"] if p not in hidden]} for group in groups]
    muon, adamw = ([group for group in half if group["params"]] for half in (muon, adamw))
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        # Scaled to the size of AdamW's updates, so that one learning rate and one decay serve both
        # (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982).
        options = {"lr": spec.learning_rate, "adjust_lr_fn": "match_rms_adamw"}
        dtype = torch.float32 if adapter_parameters(model) else torch.bfloat16
        optimizers.append(ShardedMuon(muon, dtype=dtype, **options))
    return optimizers + ([make_adamw(adamw, spec)] if adamw else [])


def make_adamw(groups: list[dict[str, Any]], spec: OptimSpec) -> torch.optim.Optimizer:
    """Make the AdamW that is asked for; `muon` has torch's fused one beside it."""
    options: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": (spec.adam_beta1, spec.adam_beta2),
        "eps": spec.adam_epsilon,
    }
    if spec.optim == "adamw_8bit":
        # torchao's state is made of DTensors, as FSDP2 needs it; that of bitsandbytes is not.
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    if spec.in_bfloat16:
        from torchao.optim import _AdamW

        return _AdamW(groups, bf16_stochastic_round=True, **options)
    if spec.optim == "adamw_torch":
        return torch.optim.AdamW(groups, foreach=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def _parameter_groups(model: PackedVLM, spec: OptimSpec) -> list[dict[str, Any]]:
    trained = trained_parts(model.hf, model.family, spec)
    rates = peak_rates(spec, trained)
    groups = []
    for name, parameters in trained.items():
        rate = {"name": name, "lr": rates[name], "peak_lr": rates[name]}
        matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups += [{**rate, "params": matrices, "weight_decay": spec.weight_decay}] if matrices else []
        groups += [{**rate, "params": vectors, "weight_decay": 0.0}] if vectors else []
    return groups


def trained_parts(model: nn.Module, family: ModelFamily, spec: OptimSpec) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters by what has a rate of its own: parts, and `lora_b` where a rate is given for it."""
    trained: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = LORA_B in spec.learning_rates and name.endswith(".lora_B")
            trained.setdefault(LORA_B if is_b else family.group_of(name), []).append(parameter)
    return trained


def peak_rates(spec: OptimSpec, trained: Collection[str]) -> dict[str, float]:
    """Return the peak rate of each trained part of a model.

    Args:
        spec: The rates; `visual` stands for its parts, of which one that is named itself goes first.
        trained: Parts that have trained parameters.

    Raises:
        ValueError: `learning_rates` names a part that has none.
    """
    rates = dict.fromkeys(trained, spec.learning_rate)
    for name, rate in sorted(spec.learning_rates.items(), key=lambda item: item[0] not in ALIASES):
        parts = [part for part in ALIASES.get(name, (name,)) if part in trained]
        if not parts:
            raise ValueError(
                f"learning_rates: '{name}' has no trained parameters in this run, which trains "
                f"{', '.join(sorted(trained))}: take it out, or do not freeze it"
            )
        rates.update(dict.fromkeys(parts, rate))
    return rates


def _hidden_matrices(model: PackedVLM) -> set[nn.Parameter]:
    """Weights of the linear layers between the embeddings and the head: what Muon is made for."""
    not_hidden = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    not_hidden.add(model.hf.lm_head.weight)
    return {parameter for parameter in model.parameters() if parameter.ndim == 2} - not_hidden


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> dict[str, float]:
    """Set each group's rate to `factor` times its peak; return the rates by part of the model."""
    rates = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates[group["name"]] = rate = group["peak_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers insist on it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
    return rates


def learning_rate_schedule(spec: OptimSpec, max_steps: int) -> Callable[[int], float]:
    """Make the schedule: a function from the 1-based step to the share of the peak rate.

    The shape is that of `transformers.get_scheduler`, except that a warmup ends at its step and starts above zero: the
    first step of a `Trainer` run with warmup trains at a rate of exactly zero. Being a function of the step alone, the
    schedule has no state to save.

    Raises:
        ValueError: transformers refuses the schedule's arguments, or takes them and would train at a rate above the
            peak, below zero, or of zero to the end; or the run ends before the schedule does.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=spec.learning_rate)
    try:
        scheduler = get_scheduler(
            spec.lr_scheduler_type,
            optimizer,
            num_warmup_steps=spec.warmup_steps,
            num_training_steps=max_steps,
            scheduler_specific_kwargs=spec.lr_scheduler_kwargs,
        )
        factor = scheduler.lr_lambdas[0]
        starts_at_zero = spec.warmup_steps > 0 and factor(0) == 0
        # Step s of the warmup has the rate that a Trainer reaches after s steps; after it, the two agree.
        shifted = spec.warmup_steps if starts_at_zero else 0
        factors = [factor(step if step <= shifted else step - 1) for step in range(1, max_steps + 1)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type '{spec.lr_scheduler_type}' over {max_steps} steps with {spec.warmup_steps} of warmup "
            f"and lr_scheduler_kwargs {spec.lr_scheduler_kwargs} is impossible: {error}"
        ) from error
    if spec.lr_scheduler_type == "warmup_stable_decay":
        _check_stages(spec, max_steps)
    _check_factors(spec, factors)
    return lambda step: factors[step - 1]


def _check_stages(spec: OptimSpec, max_steps: int) -> None:
    """Refuse stages longer than the run, which would end within its decay or before its peak."""
    given = spec.lr_scheduler_kwargs
    named = {"warmup": spec.warmup_steps} | {
        name: given[name] for name in ("num_stable_steps", "num_decay_steps") if given.get(name) is not None
    }
    if sum(named.values()) > max_steps:
        raise ValueError(
            f"lr_scheduler_type 'warmup_stable_decay' takes {sum(named.values())} steps "
            f"({', '.join(f'{name} {steps}' for name, steps in named.items())}), but the run has {max_steps}: shorten "
            f"them to {max_steps} steps together, or train for longer"
        )


def _check_factors(spec: OptimSpec, factors: Sequence[float]) -> None:
    """Refuse rates that no one asks for, but that transformers makes of some arguments without a word."""
    steps, schedule = len(factors), f"lr_scheduler_type '{spec.lr_scheduler_type}'"
    arguments = f"lr_scheduler_kwargs {spec.lr_scheduler_kwargs}"
    for step, factor in enumerate(factors, start=1):
        if not 0 <= factor <= 1 + _ROUNDING:
            raise ValueError(
                f"{schedule} would train step {step} of {steps} at {factor:.3g} times the peak rate: choose "
                f"{arguments} so that it stays between 0 and 1 times"
            )
    at_zero = steps - max((step for step, factor in enumerate(factors, start=1) if factor > 0), default=0)
    if at_zero > 1:
        raise ValueError(
            f"{schedule} would train the last {at_zero} of {steps} steps at a rate of 0, from step "
            f"{steps - at_zero + 1} on: choose {arguments} so that it falls to 0 at the last step"
        )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients to a norm over all ranks of at most `max_norm`, 0 being no limit; return their norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"), foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
