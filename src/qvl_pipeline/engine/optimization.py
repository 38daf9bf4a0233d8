"""AdamW and the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import get_scheduler

from qvl_pipeline.engine.spec import OptimSpec


def make_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """Make AdamW over the trained parameters; matrices decay, vectors (norms, biases) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.learning_rate,
        betas=(spec.adam_beta1, spec.adam_beta2),
        eps=spec.adam_epsilon,
        foreach=True,
    )


def learning_rate_schedule(spec: OptimSpec, max_steps: int) -> Callable[[int], float]:
    """Make the schedule: a function from the 1-based step to its learning rate.

    The shape is that of `transformers.get_scheduler`, except that warmup ends at its step and starts above zero: the
    first step of a `Trainer` run with warmup trains at a rate of exactly zero. Being a function of the step alone, the
    schedule has no state to save.
    """
    parameter = nn.Parameter(torch.zeros(1))
    scheduler = get_scheduler(
        spec.lr_scheduler_type,
        torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=spec.warmup_steps,
        num_training_steps=max_steps,
    )
    factor = scheduler.lr_lambdas[0]
    # Step s of the warmup has the rate that a Trainer reaches after s steps; after it, the two agree.
    return lambda step: spec.learning_rate * factor(step if step <= spec.warmup_steps else step - 1)
