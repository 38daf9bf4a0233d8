"""Each invariant is seen failing: a fault is put into the engine, and the invariant's own comparison has to find it.

Faults are of the kind that nothing else would show: a model with any of them trains, and its loss goes down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.feed.steps import Step
from qvl_pipeline.engine.model import flops, loading
from qvl_pipeline.engine.model.attention import linear
from qvl_pipeline.engine.model.export.whole_weights import WholeWeights
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.routing import Routing, StepBalance
from qvl_pipeline.engine.model.weight_files import StoredWeights
from qvl_pipeline.engine.parallel import sharding
from qvl_pipeline.engine.run.checkpoints import OptimizerState
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.families import FAMILIES
from tests.engine import test_distributed as whole
from tests.engine.model import test_against_transformers as steps
from tests.engine.model import test_flops as work
from tests.engine.model import test_packed_vlm as packs
from tests.engine.model import test_routing as routing
from tests.engine.packs import load_packed
from tests.engine.parallel import test_sequence_parallel as shares
from tests.engine.ranks import JobFailedError
from tests.engine.training import changed, trained

LINEAR = [name for name, family in FAMILIES.items() if family.linear_attention]
EXPERTS = [name for name, family in FAMILIES.items() if family.experts]
NEW = sorted({*LINEAR, *EXPERTS})
Trainings = Callable[[str], TrainSpec]


def found() -> AbstractContextManager:
    """The comparison inside finds a difference."""
    return pytest.raises(AssertionError)


def without_bounds(batch: Batch) -> dict[str, Any]:
    """A pack as if it were one sample."""
    bounds, longest = batch.cu_seqlens[[0, -1]], sum(batch.lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


class TestPacks:
    """Invariants 1 and 16."""

    def test_attention_over_the_whole_pack_is_found(
        self,
        packed: PackedVLM,
        hf_model: PreTrainedModel,
        builder: BatchBuilder,
        samples: dict[str, dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(Batch, "attention_inputs", without_bounds)
        with found():
            packs.test_pack_equals_the_models_own_forward(packs.KINDS, packed, hf_model, builder, samples)
        with found():
            packs.test_no_sample_of_a_pack_moves_another_by_one_bit(0, packed, builder, samples)

    @pytest.mark.parametrize("family", LINEAR)
    @pytest.mark.parametrize("runs_on", ["nothing", "convolution", "state"])
    def test_each_part_of_linear_attention_that_runs_on_is_found(
        self,
        runs_on: str,
        packed: PackedVLM,
        hf_model: PreTrainedModel,
        builder: BatchBuilder,
        samples: dict[str, dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(linear.KERNELS, "torch", running_on(runs_on))
        linear.use_packed_linear_attention(packed.hf, packed.family, "torch", torch.device("cpu"))
        with nullcontext() if runs_on == "nothing" else found():
            packs.test_pack_equals_the_models_own_forward(packs.KINDS, packed, hf_model, builder, samples)
        with nullcontext() if runs_on == "nothing" else found():
            packs.test_no_sample_of_a_pack_moves_another_by_one_bit(0, packed, builder, samples)

    @pytest.mark.parametrize("family", NEW)
    def test_a_parameter_that_is_not_trained_is_found_within_twenty_steps(
        self,
        packed: PackedVLM,
        hf_model: PreTrainedModel,
        builder: BatchBuilder,
        samples: dict[str, dict[str, Any]],
    ) -> None:
        for name, parameter in packed.named_parameters():
            parameter.requires_grad_(not name.endswith(("mlp.gate.weight", ".A_log", ".dt_bias")))
        with pytest.raises(AssertionError, match=r"step ([2-9]|1\d|20)\b"):
            steps.test_twenty_steps_on_packs_are_those_of_plain_transformers(packed, hf_model, builder, samples)


def running_on(what: str) -> linear.Mix:
    """Linear attention, sample by sample but for what runs on from a sample into the next."""

    def mix(
        module: nn.Module, qkv: Tensor, filters: Tensor, log_decay: Tensor, strength: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        samples, pack = list(pairwise(cu_seqlens.tolist())), [(0, qkv.shape[1])]
        convolve = linear._of_transformers(module, "causal_conv1d_fn")
        rule = linear._of_transformers(module, "torch_chunk_gated_delta_rule")
        rows = [qkv[:, start:end].transpose(1, 2) for start, end in (pack if what == "convolution" else samples)]
        mixed = torch.cat([convolve(row, filters, None, module.activation) for row in rows], dim=2).transpose(1, 2)
        outputs = []
        for start, end in pack if what == "state" else samples:
            gates = {"g": log_decay[:, start:end], "beta": strength[:, start:end]}
            outputs.append(rule(*linear._heads(module, mixed[:, start:end]), **gates, use_qk_l2norm_in_kernel=True)[0])
        return torch.cat(outputs, dim=1)

    return mix


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("moe", EXPERTS)
class TestBalance:
    """The balance loss, of whose faults the loss of tokens says nothing."""

    @pytest.fixture
    def model(self, moe: str, tiny_folders: Callable[[str], Path]) -> PackedVLM:
        return load_packed(tiny_folders(moe), moe)

    def test_that_of_each_micro_batch_is_found(self, model: PackedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        loss = StepBalance.loss

        def of_a_micro_batch(balance: StepBalance) -> Tensor:
            balance.totals = None
            return loss(balance)

        monkeypatch.setattr(StepBalance, "loss", of_a_micro_batch)
        with found():
            routing.test_any_split_of_a_step_has_the_same_loss_and_gradients(model, [packs.KINDS[:2], packs.KINDS[2:]])

    def test_filling_that_counts_is_found(
        self, model: PackedVLM, moe: str, tiny_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recorded = Routing.recorded
        monkeypatch.setattr(Routing, "recorded", lambda self, real: recorded(self, torch.ones_like(real)))
        with found():
            routing.test_padding_is_no_token(model, moe, tiny_folders)

    def test_another_number_of_experts_of_a_token_is_found(
        self, model: PackedVLM, moe: str, tiny_folders: Callable[[str], Path]
    ) -> None:
        model.routing.top_k = 1
        with found():
            routing.test_one_unpadded_batch_has_the_loss_of_transformers("text", model, moe, tiny_folders)


class TestFlops:
    @pytest.mark.parametrize("family", EXPERTS)
    def test_all_experts_instead_of_a_tokens_own_are_found(
        self,
        packed: PackedVLM,
        builder: BatchBuilder,
        samples: dict[str, dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        cost = flops._mixture_cost

        def of_all(mixture: nn.Module, reaches_trained: bool) -> flops._Cost:
            with mock.patch.object(mixture.gate, "top_k", mixture.experts.num_experts):
                return cost(mixture, reaches_trained)

        monkeypatch.setattr(flops, "_mixture_cost", of_all)
        with found():
            work.test_flops_are_those_that_torch_counts(packed, builder, samples, ())

    @pytest.mark.parametrize("family", LINEAR)
    def test_a_state_that_costs_nothing_is_found(
        self,
        packed: PackedVLM,
        builder: BatchBuilder,
        samples: dict[str, dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(flops, "_state_cost", lambda layer: 0)
        with found():
            work.test_flops_are_those_that_torch_counts(packed, builder, samples, ())


def balanced_by_each_rank(spec_path: Path) -> int:
    def count(balance: StepBalance, counts: Tensor) -> None:
        balance.totals = counts

    StepBalance._sum = count
    return main(spec_path)


def averaged_over_ranks(spec_path: Path) -> int:
    """Experts, or whole layers where there are none, as FSDP2 would have it by itself."""
    family, sum_gradients = FAMILIES[TrainSpec.load(spec_path).model.family], sharding._sum_gradients

    def average(model: nn.Module) -> None:
        sum_gradients(model)
        for module in model.modules():
            if type(module).__name__ == f"FSDP{family.experts or family.decoder_layer}":
                module.set_gradient_divide_factor(float(dist.get_world_size()))

    sharding._sum_gradients = average
    return main(spec_path)


def averaged_over_micro_batches(spec_path: Path) -> int:
    take_step = Trainer._train_step

    def average(trainer: Trainer, step: Step, *args: Any) -> Tensor:
        tokens = step.supervised_tokens * len(step.micro_batches)
        return take_step(trainer, dataclasses.replace(step, supervised_tokens=tokens), *args)

    Trainer._train_step = average
    return main(spec_path)


class TestRanks:
    """Invariants 2 to 4."""

    @pytest.mark.parametrize(
        ("family", "nproc", "degree", "fault"),
        [
            ("qwen3_vl_moe", 2, 1, balanced_by_each_rank),
            ("qwen3_5_moe", 2, 2, balanced_by_each_rank),
            ("qwen3_5", 2, 1, averaged_over_ranks),
            ("qwen3_vl_moe", 2, 1, averaged_over_ranks),
            ("qwen3_5", 1, 1, averaged_over_micro_batches),
            ("qwen3_5_moe", 1, 1, averaged_over_micro_batches),
        ],
    )
    def test_what_depends_on_the_split_of_a_step_is_found(
        self,
        family: str,
        nproc: int,
        degree: int,
        fault: Callable[[Path], int],
        trainings: Trainings,
        tmp_path: Path,
    ) -> None:
        expected = trainings(family)
        actual = changed(expected, tmp_path, run={"save_steps": 0}, parallel={"sp_ulysses_degree": degree})
        trained(actual, nproc, main=fault)
        with found():
            whole.assert_same_training(actual, expected)

    @pytest.mark.parametrize("family", LINEAR)
    def test_heads_of_linear_attention_with_the_gates_of_others_are_found(
        self, packed: PackedVLM, tiny_folders: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder, batches = tiny_folders(packed.family.name), shares.MICRO_BATCHES[:1]
        with pytest.raises(JobFailedError, match=r"not close|gradient differs"):
            shares.assert_shared_as_alone(packed, folder, 2, tmp_path, batches, compare=with_gates_exchanged)


def with_gates_exchanged(*args: str) -> None:
    """Compare ranks that share a pack with one, where they take how strongly to write for how much to forget."""
    trade = linear.trade_channels

    def exchange(*traded: Any) -> tuple[Tensor, ...]:
        *qkv, strength, forgetting = trade(*traded)
        return *qkv, forgetting, strength

    linear.trade_channels = exchange
    shares.compare_with_one_rank(*args)


def without_moments(spec_path: Path) -> int:
    def forget(state: OptimizerState, _loaded: dict[str, Any]) -> None:
        for optimizer in state._optimizers:
            optimizer.state.clear()

    OptimizerState.load_state_dict = forget
    return main(spec_path)


@pytest.mark.parametrize("family", NEW)
def test_resuming_without_the_moments_of_the_optimizer_is_found(
    family: str, trainings: Trainings, tmp_path: Path
) -> None:
    """Invariant 6."""
    expected = trainings(family)
    actual = whole.killed_after(1, expected, tmp_path / "run")
    trained(actual, 2, main=without_moments)
    with found():
        whole.assert_same_training(actual, expected)


def frozen_but_for_one(spec_path: Path) -> int:
    freeze = loading.freeze

    def freeze_but_for_one(model: nn.Module, *args: Any) -> dict[str, int]:
        frozen = freeze(model, *args)
        next(parameter for parameter in model.parameters() if not parameter.requires_grad).requires_grad_()
        return frozen

    loading.freeze = freeze_but_for_one
    return main(spec_path)


@pytest.mark.parametrize(("family", "pattern"), whole.FROZEN)
def test_a_frozen_part_of_which_something_is_trained_is_found(
    family: str, pattern: str, trainings: Trainings, tmp_path: Path
) -> None:
    """Invariant 10."""
    training = changed(trainings(family), tmp_path, run={"save_steps": 0}, model={"freeze_modules": (pattern,)})
    trained(training, 2, main=frozen_but_for_one)
    with found():
        whole.assert_frozen(training, pattern.strip("*"))


def exported_out_of_order(spec_path: Path) -> int:
    """Experts of a layer, or channels of linear attention, are written one place further on."""
    read = WholeWeights._read

    def read_rolled(weights: WholeWeights, name: str) -> Tensor | None:
        weight = read(weights, name)
        rolled = weight is not None and name.endswith(("experts.down_proj", "in_proj_qkv.weight"))
        return weight.roll(1, dims=0) if rolled else weight

    WholeWeights._read = read_rolled
    return main(spec_path)


def exported_in_its_own_layout(spec_path: Path) -> int:
    WholeWeights._turned = lambda weights, name, weight, shape: weight
    return main(spec_path)


def exported_without_what_is_kept(spec_path: Path) -> int:
    find = StoredWeights.__init__

    def forget(weights: StoredWeights, *args: Any) -> None:
        find(weights, *args)
        weights.kept = {}

    StoredWeights.__init__ = forget
    return main(spec_path)


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        *((family, exported_out_of_order) for family in NEW),
        ("qwen3_vl_moe", exported_in_its_own_layout),
        ("qwen3_5", exported_without_what_is_kept),
        ("qwen3_5_moe", exported_without_what_is_kept),
    ],
)
def test_an_export_that_is_not_the_trained_model_as_it_is_published_is_found(
    family: str, fault: Callable[[Path], int], trainings: Trainings, tmp_path: Path
) -> None:
    """Invariant 12."""
    actual = changed(trainings(family), tmp_path / "run")
    trained(actual, 2, main=fault)
    with found():
        whole.test_export_is_the_last_checkpoint_under_names_that_transformers_knows(family, lambda _: actual, tmp_path)
