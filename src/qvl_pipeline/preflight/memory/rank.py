"""Memory of one rank over one optimizer step, part by part: where it is highest, and what is there then.

States and buffers of FSDP2 are arithmetic over its units, in the order in which torch 2.13 allocates and frees them
(`torch/distributed/fsdp/_fully_shard`). What blocks keep and need is from a rehearsal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.preflight.memory.rehearsal import Span
from qvl_pipeline.preflight.memory.units import BFLOAT16, FLOAT32, Unit

Place = tuple[str, int]
ROOT: Place = ("", -1)
TOWERS: Sequence[Place] = (("vit", -1), ("audio", -1))
# Parts, in the order in which they are shown.
PARTS = (
    "weights",
    "optimizer",
    "average",
    "gradients",
    "gathered weights",
    "exchange buffers",
    "activations of the language model",
    "activations of the vision tower",
    "activations of the audio tower",
    "batch, embeddings and logits",
    "one block at work",
)
_ACTIVATIONS = {"llm": PARTS[6], "vit": PARTS[7], "audio": PARTS[8], "": PARTS[9]}


class Peak(NamedTuple):
    """The highest point.

    Attributes:
        bytes: All of it.
        parts: Bytes of each part.
        moment: When that is.
    """

    bytes: int
    parts: dict[str, int]
    moment: str


@dataclass(frozen=True)
class Step:
    """What an optimizer step consists of, for one rank.

    Attributes:
        units: FSDP2's units of the model, cut.
        stands_for: For each block that is left, how many it stands for.
        spans: Timeline of the heaviest micro-batch.
        micro_batches: Micro-batches of the step.
    """

    units: Mapping[Place, Unit]
    stands_for: Mapping[Place, int]
    spans: Sequence[Span]
    micro_batches: int

    def total(self, name: str) -> int:
        """Add up an attribute of all units."""
        return sum(self.stands_for.get(place, 1) * getattr(unit, name) for place, unit in self.units.items())


def peak_of(step: Step, spec: TrainSpec, *, offloaded: bool) -> Peak:
    """Follow a step and return its highest point.

    Args:
        step: The step.
        spec: The run.
        offloaded: Weights, gradients and optimizer state are in the host's memory.
    """
    course = _Course(step, spec, offloaded=offloaded)
    course.run()
    return course.highest


def optimizer_bytes(step: Step, spec: TrainSpec) -> int:
    """Bytes of the optimizer's state on one rank."""
    trained, matrices = step.total("trained"), step.total("matrices")
    if spec.optim.optim == "adamw_8bit":  # one byte a number and a float32 scale for 256 of them, twice
        return round(2 * (1 + FLOAT32 / 256) * matrices) + 2 * FLOAT32 * (trained - matrices)
    if spec.optim.optim == "muon":
        hidden = matrices - step.units[ROOT].matrices
        return FLOAT32 * hidden + 2 * FLOAT32 * (trained - hidden)
    return 2 * (BFLOAT16 if spec.optim.in_bfloat16 else FLOAT32) * trained


class _Course:
    """Follows one step; `held` are the bytes of each part now."""

    def __init__(self, step: Step, spec: TrainSpec, *, offloaded: bool) -> None:
        self._step, self._spec, self._offloaded = step, spec, offloaded
        self._reshards = spec.parallel.reshard_after_forward
        self._prefetched: dict[Place, int] = {}
        self.held: Counter[str] = Counter()
        self.highest = Peak(0, {}, "")
        self._flat = self._summed = 0  # of the last unit: gathered in one piece, and gradients on their way
        self._open: Counter[Place] = Counter()  # a block that stands for several is gathered as often
        self._tower = ""

    def run(self) -> None:
        step, spec = self._step, self._spec
        accumulates = step.micro_batches > 1
        if not self._offloaded:
            self.held["weights"] = step.total("weights")
            self.held["optimizer"] = optimizer_bytes(step, spec)
            self.held["average"] = FLOAT32 * step.total("trained") if spec.optim.ema_decay else 0
        self._whole = accumulates and not spec.parallel.accumulate_sharded
        self._added = accumulates and spec.parallel.accumulate_sharded
        if self._whole:
            self.held["gradients"] = step.total("summed")
        elif self._added and not self._offloaded:
            self.held["gradients"] = step.total("gradients")
        for moment, place, span in self._expanded():
            if span.backward:
                self._backward(moment, place, span)
            else:
                self._forward(moment, place, span)
        for place in (*(tower for tower in TOWERS if tower in step.units), ROOT):
            self._reduce(place, "the end of the backward pass", in_ledger=True)
        self.held["exchange buffers"] = self.held["gathered weights"] = 0
        for part in _ACTIVATIONS.values():
            self.held[part] = 0
        temporary = step.total("gradients") if spec.optim.optim == "adamw_torch" and not self._offloaded else 0
        self._see("the optimizer's step", temporary)

    def _expanded(self) -> Iterator[tuple[str, Place, Span]]:
        """Yield the spans of the whole model: a block, and what follows it, as often as there are such blocks."""
        spans = self._step.spans
        index = 0
        while index < len(spans):
            span = spans[index]
            moment = f"the {'backward' if span.backward else 'forward'} pass"
            if not span.tower:
                yield moment, ("", span.block), span
                index += 1
                continue
            place = (span.tower, span.block)
            row = [span, *([spans[index + 1]] if index + 1 < len(spans) and not spans[index + 1].tower else [])]
            for _ in range(self._step.stands_for.get(place, 1)):
                for part in row:
                    yield moment, (part.tower, part.block), part
            index += len(row)

    def _forward(self, moment: str, place: Place, span: Span) -> None:
        if place == ROOT and not self._open[ROOT]:
            for outer in (ROOT, *self._called_towers()):
                self._gather(outer, moment)
        if place[0] == "llm" and self._reshards:
            for tower in self._called_towers():
                if self._open[tower]:
                    self._free(tower)
        if place[0]:
            self._gather(place, moment)
        self._pass(moment, place, span)
        if place[0] and self._reshards:
            self._free(place)

    def _called_towers(self) -> list[Place]:
        called = {span.tower for span in self._step.spans}
        return [tower for tower in TOWERS if tower[0] in called]

    def _gather(self, place: Place, moment: str) -> None:
        unit = self._step.units[place]
        if unit.shards > 1:
            self._see(moment, unit.gathered + self._sent(unit))
            self.held["exchange buffers"] += unit.gathered * (1 + self._spec.parallel.forward_prefetch) - self._flat
            self._flat = unit.gathered * (1 + self._spec.parallel.forward_prefetch)
        else:
            self._see(moment, unit.gathered + (unit.width * unit.largest if unit.width < unit.held else 0))
        self.held["gathered weights"] += unit.gathered
        self._open[place] += 1
        self._see(moment, 0)

    def _sent(self, unit: Unit) -> int:
        """Bytes of a rank's part that is cast before it is sent; of offloaded weights, all of it is copied."""
        return unit.sliced if self._offloaded else unit.width * unit.trained if unit.width < unit.held else 0

    def _free(self, place: Place) -> None:
        self.held["gathered weights"] -= self._step.units[place].gathered
        self._open[place] -= 1

    def _backward(self, moment: str, place: Place, span: Span) -> None:
        self.held["exchange buffers"] -= self._flat
        self._flat = 0
        if place == ("", 0) and self._tower == "llm":
            for tower in self._called_towers():
                if not self._open[tower]:
                    self._regather(tower)
        if not place[0]:
            self._pass(moment, place, span)
            return
        unit, ahead = self._step.units[place], 0
        if not self._open[place]:
            self._regather(place)
            if unit.shards > 1:  # and the next one is on its way, of the same size
                ahead = max(1, self._spec.parallel.backward_prefetch) * unit.gathered
                self.held["exchange buffers"] += ahead
                self._see(moment, self._sent(unit))
        self._pass(moment, place, span)
        self._free(place)
        self._reduce(place, moment, in_ledger=False)
        self.held["exchange buffers"] -= ahead

    def _regather(self, place: Place) -> None:
        self.held["gathered weights"] += self._step.units[place].gathered
        self._open[place] += 1

    def _reduce(self, place: Place, moment: str, *, in_ledger: bool) -> None:
        """Exchange the gradients of a unit; the ones before it are let go now."""
        unit = self._step.units[place]
        self.held["exchange buffers"] -= self._summed
        self._summed = unit.summed
        computed = 0 if in_ledger else unit.width * unit.shards * unit.trained
        self._see(moment, unit.summed + (0 if self._whole else computed))
        self.held["exchange buffers"] += unit.summed
        if self._whole:
            self.held["gradients"] -= unit.summed
        if not self._offloaded:
            if self._added:
                self._see(moment, unit.gradients)
            else:
                self.held["gradients"] += unit.gradients
        self._see(moment, 0)

    def _pass(self, moment: str, place: Place, span: Span) -> None:
        self._see(moment, span.peak)
        # What is kept between blocks embeds, merges and scores; what is let go there, a block has put out.
        self._tower = place[0] or self._tower
        self.held[_ACTIVATIONS[place[0] or (self._tower if span.kept < 0 else "")]] += span.kept

    def _see(self, moment: str, extra: int) -> None:
        total = sum(self.held.values()) + extra
        if total > self.highest.bytes:
            self.highest = Peak(total, _none_below_zero(self.held) | {PARTS[-1]: extra}, moment)


def _none_below_zero(held: Mapping[str, int]) -> dict[str, int]:
    """Take from what lies between blocks what a tower let go of it, beyond what its own blocks had kept."""
    parts = {name: held[name] for name in PARTS[:-1]}
    for tower in (part for name, part in _ACTIVATIONS.items() if name):
        parts[_ACTIVATIONS[""]] += min(0, parts[tower])
        parts[tower] = max(0, parts[tower])
    return parts
