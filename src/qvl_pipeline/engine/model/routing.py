"""How tokens are shared out over experts: the kernel of experts, the balance loss of a whole step, and what is logged.

The loss is that of Switch Transformer (Fedus et al. 2021, equations 4 to 6) as transformers computes it: experts times
the sum over experts of (share of choices x mean probability), over all tokens and layers at once. It is no mean over
tokens: both factors are of the whole step. Choices have no gradient, so it is enough to know those of the whole step
before the backward pass of its first micro-batch; probabilities may then be added up one micro-batch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qvl_pipeline.families import ModelFamily


def choose_experts_kernel(name: str, device: torch.device) -> str:
    """Choose how experts are computed: `grouped_mm`, one product for all of them, or `eager`, one after the other.

    Args:
        name: `experts_implementation`; `auto` takes `grouped_mm` where it runs.
        device: Where the model runs.

    Raises:
        ValueError: It does not run here.
    """
    runs = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "grouped_mm" and not runs:
        raise ValueError("experts_implementation 'grouped_mm' needs an NVIDIA GPU from Ampere on: use 'auto'")
    return ("grouped_mm" if runs else "eager") if name == "auto" else name


def aux_loss_coef(given: float | None, hf: nn.Module, routing: object | None) -> float:
    """Weight of the balance loss: what the run was given, or else the checkpoint's; 0 of a model without experts.

    Args:
        given: `router_aux_loss_coef`.
        hf: The transformers model.
        routing: What records its routers; `None` without.
    """
    if routing is None:
        return 0.0
    return hf.config.text_config.router_aux_loss_coef if given is None else given


def use_experts_kernel(hf: nn.Module, name: str, device: torch.device) -> str:
    """Let the experts of a model compute as is chosen; return what was."""
    chosen = choose_experts_kernel(name, device)
    hf.config.text_config._experts_implementation_internal = chosen
    return chosen


class Routing:
    """What the routers of a model decided in its last forward pass.

    Attributes:
        counts: How often each expert was chosen, by layer `[layers, experts]`, float32.
        probabilities: Sum over real tokens and layers of the probability of each expert `[experts]`, float32.
        top_k: Experts of a token.
    """

    def __init__(self, hf: nn.Module, family: ModelFamily) -> None:
        """Listen to the routers of a model of a family that has some."""
        self._open: list[tuple[Tensor, Tensor]] | None = None
        routers = [module for module in hf.modules() if type(module).__name__ == family.router]
        for router in routers:
            router.register_forward_hook(self._listen)
        self.top_k, self.num_experts, self.num_layers = routers[0].top_k, routers[0].num_experts, len(routers)
        self.counts = self.probabilities = torch.zeros(0)

    def _listen(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._open is not None:  # otherwise activations are recomputed
            self._open.append((output[0], output[2]))

    @contextmanager
    def recorded(self, real: Tensor) -> Iterator[None]:
        """Sum up what routers decide inside of the block.

        Args:
            real: True where there is a token of a sample, and no filling, `[B, T]`.
        """
        self._open = []
        try:
            yield
            weights = real.flatten().float()
            # Compared with every expert instead of scattered: on a GPU that adds in any order.
            experts = torch.arange(self.num_experts, device=weights.device)
            self.counts = torch.stack(
                [((chosen[..., None] == experts).sum(1) * weights[:, None]).sum(0) for _, chosen in self._open]
            )
            sums = [(logits.float().softmax(-1) * weights[:, None]).sum(0) for logits, _ in self._open]
            self.probabilities = torch.stack(sums).sum(0)
        finally:
            self._open = None


class StepBalance:
    """The balance loss of one optimizer step.

    Attributes:
        totals: Choices of the whole step over all ranks, by layer `[layers, experts]`; `None` until they are known.
    """

    def __init__(self, routing: Routing, left_out: Callable[[], float] = lambda: 0.0) -> None:
        """Begin a step.

        Args:
            routing: What routers decide.
            left_out: Share of the step's supervised tokens that this rank could not load. Gradients will be divided by
                what is left of them, which this loss is no mean over.
        """
        self._routing, self._left_out = routing, left_out
        self.totals: Tensor | None = None
        self._weight: Tensor | float = 1.0

    def count(self, forwards: Iterable[object]) -> None:
        """Count the choices of all micro-batches, by a forward pass of each; called by all ranks.

        Args:
            forwards: Makes one forward pass for each item that is taken from it.
        """
        totals: Tensor | float = 0.0
        with torch.no_grad():
            for _ in forwards:
                totals = totals + self._routing.counts
        self._sum(totals)

    def loss(self) -> Tensor:
        """Return the share of the last forward pass in the loss of the step; the first call is one of all ranks.

        Without `count` before, that forward pass is taken to be this rank's only one of the step.
        """
        if self.totals is None:
            self._sum(self._routing.counts)
        chosen = self.totals.sum(0)
        rows = chosen.sum() / self._routing.top_k
        return self._weight * self._routing.num_experts * (chosen / rows * self._routing.probabilities / rows).sum()

    def _sum(self, counts: Tensor) -> None:
        """Add up over all ranks, in one exchange. A number is filled in: a copy from the host would be waited for."""
        lost = torch.full((1,), self._left_out(), device=counts.device)
        summed = torch.cat([counts.flatten(), lost])
        dist.all_reduce(summed)
        self.totals, self._weight = summed[:-1].view_as(counts), 1 - summed[-1]


def expert_load(totals: Tensor) -> dict[str, dict[str, float]]:
    """Describe how evenly experts were chosen.

    Args:
        totals: Choices by layer `[layers, experts]`, on the host.

    Returns:
        By layer, the choices of the most chosen expert over the mean, and the share of experts that were never chosen.
    """
    largest, dead = totals.max(1).values / totals.mean(1), (totals == 0).float().mean(1)
    return {
        "expert_max_over_mean": {f"layer_{n}": value for n, value in enumerate(largest.tolist())},
        "dead_experts": {f"layer_{n}": value for n, value in enumerate(dead.tolist())},
    }
