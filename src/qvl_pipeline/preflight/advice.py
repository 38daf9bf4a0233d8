"""The smallest changes that make a training fit, in order of what they cost, each with its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qvl_pipeline.engine.spec import RecomputeSpec, TrainSpec
from qvl_pipeline.preflight.estimate import Estimate
from qvl_pipeline.preflight.hardware import Hardware
from qvl_pipeline.preflight.packs import Heavy

Estimator = Callable[[TrainSpec, Sequence[Heavy]], Estimate]


@dataclass(frozen=True)
class Change:
    """A change, on top of those before it.

    Attributes:
        what: What it is, for people.
        parameters: What to set, as given to `--params`.
        costs: What it costs.
        estimate: What is then needed.
        fits: Whether that fits, the error of the estimate included.
    """

    what: str
    parameters: str
    costs: str
    estimate: Estimate
    fits: bool


def changes(
    spec: TrainSpec, config: Any, heaviest: Sequence[Heavy], hardware: Hardware, needed: Estimate, estimate: Estimator
) -> list[Change]:
    """Make changes one after the other until the run fits.

    Args:
        spec: The run.
        config: Configuration of its model.
        heaviest: Its heaviest micro-batches.
        hardware: Where it is to fit.
        needed: What it needs as it is.
        estimate: From a run and micro-batches to what it needs.

    Returns:
        The changes, in order, without those that save nothing. If the last does not fit, nothing that is known does.
    """
    made: list[Change] = []
    for what, parameters, costs, apply, lighter in _ladder(spec, config, heaviest, hardware):
        changed, packs = apply(spec), lighter or heaviest
        less = estimate(changed, packs)
        if less.bytes >= needed.bytes:
            continue
        spec, heaviest, needed = changed, packs, less
        change = Change(what, parameters, costs, needed, needed.high <= hardware.memory)
        # More of one thing takes the place of less of it.
        made = [old for old in made if _kind(old) != _kind(change)] + [change]
        if change.fits:
            break
    return made


def _kind(change: Change) -> str:
    """What a change is more or less of: the parameter that it sets, without keys of it."""
    return ".".join(change.parameters.split("=")[0].split(".")[:2])


def _ladder(
    spec: TrainSpec, config: Any, heaviest: Sequence[Heavy], hardware: Hardware
) -> Iterator[tuple[str, str, str, Callable[[TrainSpec], TrainSpec], list[Heavy] | None]]:
    if not spec.parallel.accumulate_sharded:
        yield (
            "gradients added up in shards",
            "train.fsdp_config.accumulate_sharded=true",
            "an exchange after every micro-batch, in place of one a step",
            _parallel(accumulate_sharded=True),
            None,
        )
    recompute = {spec.recompute.llm, spec.recompute.vit}
    rungs = [("selective", "norms and activation functions are computed twice, a few percent of time")]
    rungs += [("full", "a second forward pass, about a third more time")]
    for kind, costs in rungs:
        if recompute == {"full"} or (kind == "selective" and "none" not in recompute):
            continue
        parameters = (
            "train.gradient_checkpointing=true"
            if kind == "full"
            else "train.gradient_checkpointing.llm=selective,train.gradient_checkpointing.vit=selective"
        )
        yield f"{kind} recomputation of both towers", parameters, costs, _recomputing(kind), None
    heads = config.text_config.num_attention_heads
    for degree in (2, 4, 8):
        possible = hardware.ranks % degree == 0 and heads % degree == 0 and spec.data.use_rmpad
        if degree > spec.parallel.sp_ulysses_degree and possible:
            yield (
                f"{degree} ranks share a pack (sequence parallelism)",
                f"train.sp_ulysses_degree={degree}",
                "exchanges around attention; more micro-batches for each rank",
                _parallel(sp_ulysses_degree=degree),
                None,
            )
    if spec.optim.optim != "adamw_8bit":
        yield (
            "optimizer state of 8 bits",
            "train.optim=adamw_8bit",
            "another optimizer, which rounds its state",
            lambda old: replace(old, optim=replace(old.optim, optim="adamw_8bit")),
            None,
        )
    if not spec.adapter.used:
        yield (
            "an adapter in place of the model (LoRA)",
            "adapter.type=lora",
            "a low-rank update is trained, not the model",
            lambda old: replace(
                old, adapter=replace(old.adapter, type="lora"), model=replace(old.model, freeze_modules=())
            ),
            None,
        )
    if hardware.device == "cuda" and not spec.parallel.cpu_offload:
        yield (
            "weights and optimizer state in the host's memory",
            "train.fsdp_config.cpu_offload=true",
            "the optimizer steps on the CPU, several times slower",
            _parallel(cpu_offload=True),
            None,
        )
    for parts in (2, 4, 8):
        lighter = [
            Heavy(f"1/{parts} of {heavy.why}", _first(heavy.samples, heavy.tokens // parts)) for heavy in heaviest
        ]
        yield (
            f"1/{parts} of the tokens: shorter packs, fewer pixels and frames",
            f"batching.packing_length={max(16, spec.data.packing_length // parts)}",
            "longer samples are left out; fewer details, or fewer frames",
            lambda old: old,
            lighter,
        )


def _recomputing(kind: str) -> Callable[[TrainSpec], TrainSpec]:
    return lambda old: replace(old, recompute=RecomputeSpec(kind, kind, every=1, offload=old.recompute.offload))


def _parallel(**values: Any) -> Callable[[TrainSpec], TrainSpec]:
    return lambda old: replace(old, parallel=replace(old.parallel, **values))


def _first(samples: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Take samples until there are so many tokens; at least one."""
    taken: list[dict[str, Any]] = []
    for sample in samples:
        if taken and sum(len(s["input_ids"]) for s in taken) + len(sample["input_ids"]) > tokens:
            break
        taken.append(sample)
    return taken


def least_recomputation(
    spec: TrainSpec, heaviest: Sequence[Heavy], hardware: Hardware, estimate: Estimator
) -> tuple[TrainSpec, Estimate]:
    """Choose the least recomputation with which a run fits, for `gradient_checkpointing: auto`; else the most."""
    for kind in ("none", "selective", "full"):
        chosen = _recomputing(kind)(spec)
        needed = estimate(chosen, heaviest)
        if needed.high <= hardware.memory:
            break
    return chosen, needed
