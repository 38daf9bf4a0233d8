"""A forward and backward pass on the meta device: how much memory each block keeps and needs, without a weight.

The engine's own code runs, on a model of the true widths with a few blocks of each kind and on a batch of the true
lengths, so that what is counted cannot grow old: adapters, frozen parts, recomputation, DeepStack, windows, sequence
parallelism and chunked logits are whatever the engine makes of them. Only kernels of a GPU have stand-ins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.preflight.memory.blocks import blocks_of
from qvl_pipeline.preflight.memory.ledger import Ledger


@dataclass(frozen=True)
class Span:
    """A stretch of the timeline: one pass through one block, or what lies between two.

    Attributes:
        tower: `vit`, `audio` or `llm`; empty between blocks.
        block: Number of the block in its tower, or of the one that was passed last.
        backward: Whether it is of the backward pass.
        kept: Bytes that it leaves, less those that it frees.
        peak: Most bytes on top of those at its start.
    """

    tower: str
    block: int
    backward: bool
    kept: int
    peak: int


def rehearse(model: PackedVLM, batch: Batch, device: str) -> list[Span]:
    """Run one forward and backward pass and return its timeline.

    Args:
        model: The model on the meta device, in the type of the computation, prepared for training.
        batch: A micro-batch on the CPU, but for its patches and spectra, which are on the meta device.
        device: Type of the device that is stood in for, `cuda` or `cpu`.

    Returns:
        Spans in order. Gradients of a block's parameters are in its peak and not in what it leaves, because they are
        then exchanged; those of other parameters are in what is left.
    """
    with Ledger([*model.parameters(), *model.buffers()], device) as ledger:
        values = [*vars(batch).values(), *batch.sound_inputs.values()]
        ledger.live += sum(value.nbytes for value in values if isinstance(value, Tensor))
        timeline = _Timeline(ledger)
        handles = [handle for place in blocks_of(model) for handle in timeline.watch(*place)]
        losses = model(batch)
        timeline.turn()
        losses.sum().backward()
        del losses
        timeline.end()
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
    return timeline.spans


class _Timeline:
    """Cuts the ledger's course at the bounds of blocks, by hooks."""

    def __init__(self, ledger: Ledger) -> None:
        self.spans: list[Span] = []
        self._ledger, self._start = ledger, 0
        self._backward, self._place = False, ("", -1)
        self._block: nn.Module | None = None

    def watch(self, tower: str, number: int, block: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if not self._backward:
                self._cut(tower, number, entering=True)
                if args[0].requires_grad:
                    args[0].register_hook(lambda _: self._leave_backward(block))
            # As FSDP2 does with what a unit is given.
            dtype = next(p.dtype for p in block.parameters() if p.is_floating_point())
            return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))

        def after(_: nn.Module, _args: Any, output: Tensor | tuple[Tensor]) -> None:
            if self._backward:
                return
            if isinstance(output, tuple):  # layers of the audio tower
                (output,) = output
            if output.requires_grad:
                output.register_hook(lambda _: self._enter_backward(tower, number, block))
            self._cut(tower, number, entering=False)

        return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]

    def turn(self) -> None:
        """Begin the backward pass."""
        self._close(*self._place)
        self._backward = True

    def end(self) -> None:
        """Close the last span."""
        self._close(*self._place)

    def _enter_backward(self, tower: str, number: int, block: nn.Module) -> None:
        if self._block is not None:  # what this block put out is what the next took in, and this hook is the first
            self._leave_backward(self._block)
        self._block = block
        self._cut(tower, number, entering=True)

    def _leave_backward(self, block: nn.Module) -> None:
        if self._block is block:
            self._block = None
            block.zero_grad(set_to_none=True)
            self._cut(*self._place, entering=False)

    def _cut(self, tower: str, number: int, *, entering: bool) -> None:
        self._close(*(("", self._place[1]) if entering else (tower, number)))
        self._place = (tower, number) if entering else ("", number)

    def _close(self, tower: str, number: int) -> None:
        ledger = self._ledger
        self.spans.append(Span(tower, number, self._backward, ledger.live - self._start, ledger.peak - self._start))
        self._start = ledger.live
        ledger.restart()
