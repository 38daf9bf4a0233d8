"""Noticing a loss or gradient that is not a number without waiting for the device at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from qvl_pipeline.engine.parallel.fetching import OnItsWay, gather_on_hosts

_NEVER = 2**62


class NonFiniteError(RuntimeError):
    """A loss or gradient is not a number.

    Attributes:
        rank: Rank on which it was seen first.
        step: Optimizer step, 1-based.
        sample_ids: Samples of the micro-batch whose loss it is; of the whole step, when it is the gradient.
    """

    def __init__(self, message: str, *, rank: int, step: int, sample_ids: list[str]) -> None:
        """Say what was seen where."""
        super().__init__(message)
        self.rank = rank
        self.step = step
        self.sample_ids = sample_ids


@dataclass(frozen=True)
class Mark:
    """What a watch has seen up to some moment: the first bad values of this rank, and how many micro-batches."""

    first: OnItsWay
    micro_batches: int


class FiniteWatch:
    """Remembers on the device the first micro-batch with a loss, and the first step with a norm, that is not finite.

    Looking at a value on the host makes it wait for the device. So training goes on after a bad step, on weights that
    are lost, until `check` is called: with every row of metrics, and before every checkpoint, evaluation and export.
    What is on disk is never from after a bad step, and the first bad micro-batch is still known.
    """

    def __init__(self, device: torch.device, losses: str = "a loss") -> None:
        """Watch nothing yet.

        Args:
            device: This rank's device.
            losses: What to call a loss in an error.
        """
        self._losses = losses
        self._micro_batches: list[tuple[int, list[str]]] = []
        self._checked = 0  # micro-batches before the first in the list
        # Number of the first bad micro-batch; first step with a bad gradient norm.
        self._first = torch.full((2,), _NEVER, dtype=torch.int64, device=device)

    def add_losses(self, step: int, sample_ids: list[str], losses: torch.Tensor) -> None:
        """Note the token losses `[S]` of one micro-batch."""
        self._note(0, self._checked + len(self._micro_batches), losses.detach().sum())
        self._micro_batches.append((step, sample_ids))

    def add_gradient_norm(self, step: int, norm: torch.Tensor) -> None:
        """Note the gradient norm of a step."""
        self._note(1, step, norm)

    def _note(self, slot: int, number: int, value: torch.Tensor) -> None:
        self._first[slot] = torch.where(torch.isfinite(value), self._first[slot], self._first[slot].clamp(max=number))

    def mark(self) -> Mark:
        """Note what was seen up to here, without waiting for it."""
        return Mark(OnItsWay(self._first), self._checked + len(self._micro_batches))

    def check(self, mark: Mark | None = None) -> None:
        """Stop the run if anything since the last check was not finite; called by all ranks, which raise the same.

        Args:
            mark: Up to where to look; all that was noted if `None`, which waits for the device.

        Raises:
            NonFiniteError: It was; the error names the first step, rank and samples.
        """
        mark = mark or self.mark()
        firsts = gather_on_hosts(mark.first.arrived()).tolist()
        if any(number != _NEVER for rank in firsts for number in rank):
            raise self._error(firsts)
        del self._micro_batches[: mark.micro_batches - self._checked]
        self._checked = mark.micro_batches

    def _error(self, firsts: list[list[int]]) -> NonFiniteError:
        """Find the earliest. Once weights are lost all ranks have bad losses, so a later step says nothing."""
        seen: list[list[tuple[int, list[str]]]] = [[] for _ in firsts]
        dist.all_gather_object(seen, self._micro_batches)
        bad_losses = [
            (*seen[rank][number - self._checked], rank) for rank, (number, _) in enumerate(firsts) if number != _NEVER
        ]
        step, sample_ids, rank = min(bad_losses, key=lambda bad: (bad[0], bad[2]), default=(_NEVER, [], 0))
        remedy = "nothing after the last checkpoint was kept: lower learning_rate, or look at the samples named here"
        bad_gradient = min(number for _, number in firsts)
        if step <= bad_gradient:
            message = f"{self._losses} of step {step} on rank {rank} is not finite; {remedy}"
            return NonFiniteError(message, rank=rank, step=step, sample_ids=sample_ids)
        sample_ids = [name for rank_ in seen for step_, names in rank_ if step_ == bad_gradient for name in names]
        message = f"the gradient of step {bad_gradient} is not finite, though all its losses are; {remedy}"
        return NonFiniteError(message, rank=0, step=bad_gradient, sample_ids=sample_ids)
