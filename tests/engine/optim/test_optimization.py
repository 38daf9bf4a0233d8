"""Optimizers, their groups and the learning rate (no process group)."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from qvl_pipeline.config.training.schedules import SCHEDULES
from qvl_pipeline.engine.model.freezing import freeze
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.optim.optimization import learning_rate_schedule, make_optimizers, set_learning_rates
from qvl_pipeline.engine.spec import OptimSpec

OPTIM = OptimSpec(
    optim="adamw_torch_fused",
    learning_rate=1e-3,
    learning_rates={},
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    lr_scheduler_type="cosine",
    lr_scheduler_kwargs={},
    warmup_steps=4,
    ema_decay=0.0,
    router_aux_loss_coef=None,
)
KWARGS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {"timescale": 10},
    "warmup_stable_decay": {"num_decay_steps": 6, "decay_type": "1-sqrt"},
}


def optim(**values: object) -> OptimSpec:
    return dataclasses.replace(OPTIM, **values)


def rates_of(model: PackedVLM, spec: OptimSpec) -> dict[str, set[float]]:
    """Peak rates of the parameters of each part of the model."""
    by_parameter = {
        parameter: group["peak_lr"]
        for optimizer in make_optimizers(model, spec)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found: dict[str, set[float]] = {}
    for name, parameter in model.hf.named_parameters():
        if parameter.requires_grad:
            found.setdefault(model.family.group_of(name), set()).add(by_parameter[parameter])
    return found


class TestGroups:
    @pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "muon"])
    def test_each_trained_parameter_is_in_one_group_and_only_matrices_decay(self, packed: PackedVLM, name: str) -> None:
        freeze(packed.hf, packed.family, ["merger"])
        groups = [group for optimizer in make_optimizers(packed, optim(optim=name)) for group in optimizer.param_groups]
        for group in groups:
            assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
        held = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(p) for p in packed.parameters() if p.requires_grad)

    def test_muon_takes_the_matrices_of_hidden_layers(self, packed: PackedVLM) -> None:
        muon, adamw = make_optimizers(packed, optim(optim="muon"))
        names = {parameter: name for name, parameter in packed.hf.named_parameters()}
        held = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
        assert all(name.endswith("weight") for name in held)
        assert not any(part in name for name in held for part in ("embed", "norm", "lm_head"))
        others = {names[parameter] for group in adamw.param_groups for parameter in group["params"]}
        assert {
            name for name in others if name.endswith(("_proj.weight", "qkv.weight", "mlp.linear_fc1.weight"))
        } == set()

    def test_named_parts_have_their_own_rate_and_a_part_goes_before_visual(self, packed: PackedVLM) -> None:
        rates = rates_of(packed, optim(learning_rates={"merger": 3e-4, "visual": 1e-6, "embed": 2e-5}))
        expected = {"vit": {1e-6}, "merger": {3e-4}, "llm": {1e-3}, "embed": {2e-5}}
        assert rates == expected | ({"deepstack": {1e-6}} if packed.family.name.startswith("qwen3_vl") else {})

    @pytest.mark.parametrize("part", ["vit", "head"])  # frozen; tied to the input embedding, so not there
    def test_rate_of_a_part_that_is_not_trained_is_refused(self, packed: PackedVLM, part: str) -> None:
        freeze(packed.hf, packed.family, ["vit"])
        with pytest.raises(ValueError, match=f"learning_rates: '{part}' has no trained parameters.*llm"):
            make_optimizers(packed, optim(learning_rates={part: 1e-4}))

    def test_schedule_scales_each_part_from_its_own_peak(self, packed: PackedVLM) -> None:
        optimizers = make_optimizers(packed, optim(optim="muon", learning_rates={"vit": 1e-5}))
        rates = set_learning_rates(optimizers, 0.5)
        assert rates["vit"] == pytest.approx(0.5e-5)
        assert rates["llm"] == rates["embed"] == pytest.approx(0.5e-3)
        assert {group["lr"] for o in optimizers for group in o.param_groups} == set(rates.values())


class TestSchedule:
    def test_warmup_starts_above_zero_and_ends_at_the_peak(self) -> None:
        factor = learning_rate_schedule(OPTIM, max_steps=20)
        assert [factor(step) for step in range(1, 5)] == pytest.approx([0.25, 0.5, 0.75, 1.0])

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_after_warmup_the_schedule_is_that_of_transformers(self, name: str) -> None:
        kwargs = KWARGS.get(name, {})
        factor = learning_rate_schedule(optim(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), max_steps=20)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = get_scheduler(name, optimizer, 4, 20, scheduler_specific_kwargs=kwargs)
        expected = []
        for _ in range(20):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert [1e-3 * factor(step) for step in range(5, 21)] == pytest.approx(expected[4:])
        assert all(0 < factor(step) <= 1 for step in range(1, 20))

    @pytest.mark.parametrize(
        ("name", "kwargs", "reason"),
        [
            ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
            ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "exponential"}, "Unknown decay type"),
            ("cosine", {"num_cycles": "two"}, "could not convert"),
        ],
    )
    def test_impossible_arguments_are_named(self, name: str, kwargs: dict, reason: str) -> None:
        with pytest.raises(ValueError, match=f"lr_scheduler_type '{name}'.*is impossible: .*{reason}"):
            learning_rate_schedule(optim(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), max_steps=20)

    @pytest.mark.parametrize(
        ("name", "kwargs", "sentence"),
        [
            ("cosine_with_min_lr", {"min_lr": 1.0}, "train step 6 of 20 at 1.* times the peak rate: choose lr_sch"),
            ("polynomial", {"lr_end": -1e-3}, "train step 14 of 20 at -.* so that it stays between 0 and 1 times"),
            ("cosine_with_min_lr", {"min_lr_rate": -1}, "train the last 8 of 20 steps at a rate of 0, from step 13 on"),
            ("warmup_stable_decay", {"num_decay_steps": 6, "min_lr_ratio": 5}, "train step 1 of 20 at 5 times"),
            (
                "warmup_stable_decay",
                {"num_decay_steps": 17},
                r"takes 21 steps \(warmup 4, num_decay_steps 17\), but the run has 20: shorten them to 20 steps",
            ),
            (
                "warmup_stable_decay",
                {"num_decay_steps": 6, "num_stable_steps": 11},
                r"takes 21 steps \(warmup 4, num_stable_steps 11, num_decay_steps 6\), but the run has 20",
            ),
            ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 8}, "train the last 2 of 20 steps"),
        ],
    )
    def test_rates_that_no_one_asks_for_are_refused(self, name: str, kwargs: dict, sentence: str) -> None:
        with pytest.raises(ValueError, match=f"lr_scheduler_type '{name}'.*{sentence}"):
            learning_rate_schedule(optim(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), max_steps=20)

    @pytest.mark.parametrize(
        ("name", "kwargs", "warmup_steps"),
        [
            ("warmup_stable_decay", {"num_decay_steps": 16}, 4),
            ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 2, "min_lr_ratio": 0.1}, 4),
            ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 9}, 4),  # ends with one step at 0
            ("cosine", {}, 0),
            ("cosine", {"num_cycles": 1}, 0),  # 0 in the middle
            ("cosine", {}, 30),
            ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.0, "warmup_lr_rate": 1.0}, 4),
            ("cosine_with_restarts", {"num_cycles": 20}, 0),
        ],
    )
    def test_unusual_shapes_are_not(self, name: str, kwargs: dict, warmup_steps: int) -> None:
        spec = optim(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup_steps)
        factor = learning_rate_schedule(spec, max_steps=20)
        assert max(factor(step) for step in range(1, 21)) == pytest.approx(min(1, 20 / max(warmup_steps, 1)))

    def test_declared_arguments_are_those_of_transformers(self) -> None:
        for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
            if name.value in ("reduce_lr_on_plateau", "greedy"):  # refused
                continue
            given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
            assert set(SCHEDULES[name.value]) == set(inspect.signature(function).parameters) - given, name
