"""The engine's parts that need no process group."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from qvl_pipeline.engine.feed.steps import PackPlan, PlannedFeed, SharedSteps, read_plan
from qvl_pipeline.engine.model.freezing import freeze
from qvl_pipeline.engine.model.loss import token_losses
from qvl_pipeline.engine.model.patch_embedding import PatchProjection, use_linear_patch_embedding
from qvl_pipeline.engine.run import checkpoints
from qvl_pipeline.engine.run.metrics import keep_rows_until
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from tests.engine.training import make_training


def plan_of(folder: Path, steps: list[list[tuple[list[int], int]]]) -> PackPlan:
    """Write a plan of packs (sample rows, patches) of 5 tokens, 2 of them supervised, sample 9 a sound; read it."""
    packs = [(step, pack, *what) for step, packs in enumerate(steps) for pack, what in enumerate(packs)]
    table = pd.DataFrame(packs, columns=["step", "pack", "sample_rows", "vit_patches"])
    table.assign(
        tokens=5, supervised_tokens=2, spectra=40 * table["sample_rows"].map(lambda rows: rows == [9])
    ).to_parquet(folder / "plan.parquet")
    return read_plan(folder / "plan.parquet")


class TestSharingOut:
    def test_every_pack_goes_to_exactly_one_rank(self, tmp_path: Path) -> None:
        rows = [[[step * 20 + 2 * n, step * 20 + 2 * n + 1] for n in range(7)] for step in range(3)]
        plan = plan_of(tmp_path, [[(pack, 0) for pack in packs] for packs in rows])
        for world_size in (1, 2, 3, 8):
            ranks = [SharedSteps(plan, rank, world_size, packs_per_micro_batch=2) for rank in range(world_size)]
            for number, packs in enumerate(rows):
                for rank, steps in enumerate(ranks):
                    seen = [row for mb in steps[number].micro_batches for row in mb.sample_rows]
                    assert seen == [row for pack in packs[rank::world_size] for row in pack]

    def test_all_ranks_call_the_vision_tower_in_the_same_micro_batches(self, tmp_path: Path) -> None:
        plan = plan_of(tmp_path, [[([0], 0), ([1], 16), ([2], 0), ([3], 0), ([4], 4)]])
        ranks = [SharedSteps(plan, rank, 2, packs_per_micro_batch=1)[0] for rank in range(2)]
        pattern = [[micro_batch.vision for micro_batch in step.micro_batches] for step in ranks]
        assert pattern == [[True, False, True], [True, False, True]]
        assert ranks[1].micro_batches[2].sample_rows == ()
        assert {step.supervised_tokens for step in ranks} == {10}

    def test_training_only_the_tower_calls_it_for_text_too(self, tmp_path: Path) -> None:
        plan = plan_of(tmp_path, [[([0], 0)]])
        (step,) = SharedSteps(plan, 0, 1, packs_per_micro_batch=1, always_vision=True)
        assert [micro_batch.vision for micro_batch in step.micro_batches] == [True]

    def test_sounds_are_told_of_apart_from_pictures(self, tmp_path: Path) -> None:
        plan = plan_of(tmp_path, [[([0], 0), ([9], 0), ([2], 16), ([3], 0)]])
        for rank in (0, 1):
            step = SharedSteps(plan, rank, 2, packs_per_micro_batch=1)[0]
            assert [(batch.vision, batch.sound) for batch in step.micro_batches] == [(False, True), (True, False)]
            step = SharedSteps(plan, rank, 2, packs_per_micro_batch=1, always_sound=True)[0]
            assert [batch.sound for batch in step.micro_batches] == [True, True]

    def test_a_rank_holds_few_bytes_of_a_sample_of_the_plan(self, tmp_path: Path) -> None:
        samples, packed, per_step = 300_000, 6, 10
        rows = np.arange(samples, dtype=np.int32).reshape(-1, packed)
        steps = np.repeat(np.arange(len(rows) // per_step, dtype=np.int32), per_step)
        plan = pd.DataFrame({"step": steps, "sample_rows": list(rows), "tokens": 9, "vit_patches": 0})
        plan.assign(supervised_tokens=1, spectra=0).to_parquet(tmp_path / "plan.parquet")
        read_plan(tmp_path / "plan.parquet")  # what is imported on the way does not count
        tracemalloc.start()
        feed = PlannedFeed(SharedSteps(read_plan(tmp_path / "plan.parquet"), 1, 8, packs_per_micro_batch=1))
        for _ in feed.steps_after(0):
            pass
        gc.collect()  # gives back the tuples that Python keeps to use again
        held, _peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert feed.tokens == 9 * len(rows)
        assert held / samples < 4 + 42 / packed  # its row; of a pack, its begin and four figures

    def test_plan_with_a_gap_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.parquet"
        row = {"pack": 0, "sample_rows": [0], "tokens": 1, "vit_patches": 0, "spectra": 0, "supervised_tokens": 1}
        pd.DataFrame([row | {"step": 0}, row | {"step": 2}]).to_parquet(path)
        with pytest.raises(ValueError, match="step 2 follows step 0"):
            read_plan(path)


class TestFreezing:
    def test_groups_hold_each_parameter_exactly_once(self, hf_model: PreTrainedModel, family: str) -> None:
        groups = {FAMILIES[family].group_of(name) for name, _ in hf_model.named_parameters()}
        expected = {"vit", "merger", "llm", "embed"}  # the tied output embedding is `embed`
        assert groups == expected | ({"deepstack"} if family.startswith("qwen3_vl") else set())

    def test_visual_is_the_whole_vision_side(self, hf_model: PreTrainedModel, family: str) -> None:
        freeze(hf_model, FAMILIES[family], ["visual"])
        frozen = {name for name, parameter in hf_model.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in hf_model.named_parameters() if name.startswith("model.visual.")}

    def test_glob_freezes_one_layer(self, hf_model: PreTrainedModel, family: str) -> None:
        freeze(hf_model, FAMILIES[family], ["model.language_model.layers.0.*"])
        frozen = {name for name, parameter in hf_model.named_parameters() if not parameter.requires_grad}
        assert frozen
        assert all(".layers.0." in name for name in frozen)

    def test_pattern_that_matches_nothing_is_named(self, hf_model: PreTrainedModel, family: str) -> None:
        with pytest.raises(ValueError, match=r"'visul' matches no parameter.*visual"):
            freeze(hf_model, FAMILIES[family], ["visul"])

    def test_freezing_everything_is_refused(self, hf_model: PreTrainedModel, family: str) -> None:
        with pytest.raises(ValueError, match="nothing to train"):
            freeze(hf_model, FAMILIES[family], ["*"])


def test_chunked_loss_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    targets = torch.randint(0, 32, (11,))
    whole = token_losses(hidden, weight, targets)
    expected = torch.autograd.grad(whole.sum(), (hidden, weight))
    monkeypatch.setattr("qvl_pipeline.engine.model.loss._MAX_LOGITS", 32 * 4)
    chunked = token_losses(hidden, weight, targets)
    torch.testing.assert_close(chunked, whole)
    for actual, reference in zip(torch.autograd.grad(chunked.sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(actual, reference)


class TestPatchEmbedding:
    def test_same_result_and_parameters_as_the_convolution(self, hf_model: PreTrainedModel) -> None:
        vision = hf_model.config.vision_config
        patches = torch.randn(7, 3 * vision.temporal_patch_size * vision.patch_size**2)
        names = list(hf_model.state_dict())
        expected = hf_model.model.visual.patch_embed(patches)
        use_linear_patch_embedding(hf_model)
        torch.testing.assert_close(hf_model.model.visual.patch_embed(patches), expected, rtol=1e-5, atol=1e-5)
        assert list(hf_model.state_dict()) == names

    def test_overlapping_patches_are_refused(self) -> None:
        with pytest.raises(ValueError, match="not a plain projection"):
            PatchProjection(torch.nn.Conv3d(3, 8, kernel_size=4, stride=2))


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    for name, complete in (
        ("checkpoint-20", True),
        ("checkpoint-3", True),
        ("checkpoint-30", False),
        ("checkpoint-x", True),
    ):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / "COMPLETE").touch()
    assert [step for step, _ in checkpoints.completed(tmp_path)] == [3, 20]


def test_resumed_metrics_drop_rows_that_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 2, "lo')
    keep_rows_until(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


class TestSpec:
    def test_round_trip(self, tmp_path: Path, family: str, tiny_folders) -> None:
        training = make_training(tmp_path, tiny_folders(family), family)
        training.save(tmp_path / "spec.json")
        assert TrainSpec.load(tmp_path / "spec.json") == training

    def test_unknown_key_is_named(self, tmp_path: Path, tiny_folders) -> None:
        path = tmp_path / "spec.json"
        make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl").save(path)
        values = json.loads(path.read_text())
        values["optim"]["learning_rat"] = 1
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"keys of 'optim'.*learning_rat"):
            TrainSpec.load(path)
