"""Whole trainings on gloo: ranks, resuming, freezing, export and failure (invariants 3-6, 10 and 12)."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.feed.steps import Step
from qvl_pipeline.engine.run.checkpoint_files import completed
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.families import FAMILIES
from tests.engine.ranks import JobFailedError, run_ranks
from tests.engine.training import changed, first_error, main_that_hangs, make_training, trained


def metrics(training: TrainSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(training.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(training: TrainSpec) -> list[float]:
    return [row["loss"] for row in metrics(training)]


def weights(training: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(training.export.output_dir) / "model.safetensors")


def assert_same_training(actual: TrainSpec, expected: TrainSpec) -> None:
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-5)
    # Clipping and Adam hide a wrong scale of the gradient from losses and weights.
    norms = [[row["grad_norm"] for row in metrics(training)] for training in (actual, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    expected_weights = weights(expected)
    for name, weight in weights(actual).items():
        torch.testing.assert_close(
            weight, expected_weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("nproc", [1, 4])
def test_same_batches_on_any_number_of_ranks(
    family: str, nproc: int, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    # With 4 ranks, some hold text only while others hold an image or a video; with 3 packs in the last step of 1 rank's
    # view nothing changes, because the global batch is the plan's.
    expected = trainings(family)
    actual = changed(expected, tmp_path, run={"save_steps": 0})
    trained(actual, nproc)
    assert_same_training(actual, expected)


@pytest.mark.parametrize(
    ("family", "rmpad"),
    [
        ("qwen3_vl", True),
        ("qwen3_vl", False),
        ("qwen3_5", True),
        ("qwen3_vl_moe", True),
        ("qwen3_vl_moe", False),
        ("qwen3_5_moe", True),
    ],
)
def test_packs_in_one_micro_batch_train_the_same(
    family: str, rmpad: bool, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings(family)
    # Three packs and then one, where two ranks had two micro-batches of one; or rows that are filled up.
    data = {"per_device_train_batch_size": 3, "dataloader_num_workers": 1, "use_rmpad": rmpad}
    actual = changed(expected, tmp_path, run={"save_steps": 0}, data=data)
    trained(actual, nproc=1)
    assert_same_training(actual, expected)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl_moe", "qwen3_5_moe"])
def test_gradients_that_are_exchanged_after_each_micro_batch_train_the_same(
    family: str, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings(family)
    actual = changed(expected, tmp_path, run={"save_steps": 0}, parallel={"accumulate_sharded": True})
    trained(actual, nproc=2)
    assert_same_training(actual, expected)


@pytest.mark.parametrize(
    ("nproc", "parallel"),
    [
        (4, {"hsdp_shard_size": 2, "forward_prefetch": 2, "backward_prefetch": 2}),
        (2, {"hsdp_shard_size": 1}),
        (
            2,
            {
                "reshard_after_forward": False,
                "transformer_layer_cls_to_wrap": ("Qwen3VLTextDecoderLayer", "Qwen3VLTextMLP"),
                "cpu_offload": True,
            },
        ),
    ],
    ids=["hsdp and prefetch", "replicas only", "kept gathered, nested wrap, offload"],
)
def test_ways_to_shard_train_the_same(
    nproc: int, parallel: dict, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings("qwen3_vl")
    actual = changed(expected, tmp_path, run={"save_steps": 0}, parallel=parallel)
    trained(actual, nproc)
    assert_same_training(actual, expected)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["shard_size"] == parallel.get("hsdp_shard_size", nproc)
    assert set(result["wrapped"]) == {
        *parallel.get("transformer_layer_cls_to_wrap", ("Qwen3VLTextDecoderLayer",)),
        "Qwen3VLVisionBlock",
    }
    assert result["cpu_offload"].startswith("not used" if parallel.get("cpu_offload") else "not asked")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"hsdp_shard_size": 3}, "hsdp_shard_size 3 does not divide the 2 ranks"),
        (
            {"transformer_layer_cls_to_wrap": ("Qwen2_5_VLDecoderLayer",)},
            "no module of qwen3_vl has the class 'Qwen2_5_VLDecoderLayer'",
        ),
    ],
)
def test_impossible_sharding_is_refused(
    parallel: dict, message: str, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    with pytest.raises(JobFailedError):
        trained(changed(trainings("qwen3_vl"), tmp_path, parallel=parallel), nproc=2)
    assert message in first_error(tmp_path)["message"]


@pytest.mark.parametrize("nproc", [2, 4])
def test_ranks_that_share_packs_train_the_same(
    family: str, nproc: int, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings(family)
    # Two ranks also recompute their activations, exchanges of tokens and heads included.
    recompute = {"llm": "selective", "vit": "full"} if nproc == 2 else {}
    parallel = {"sp_ulysses_degree": 2}
    actual = changed(expected, tmp_path, run={"save_steps": 0}, parallel=parallel, recompute=recompute)
    trained(actual, nproc)
    assert_same_training(actual, expected)
    for row, other in zip(metrics(actual), metrics(expected), strict=True):
        assert (row["tokens"], row["supervised_tokens"]) == (other["tokens"], other["supervised_tokens"])
        assert row["loss_by_source"] == pytest.approx(other["loss_by_source"], rel=1e-5)


def killed_after(step: int, whole: TrainSpec, folder: Path, **groups: dict[str, Any]) -> TrainSpec:
    """A training that was killed while it wrote the checkpoint behind that of a step, to be gone on with otherwise."""
    killed = changed(whole, folder, run={"save_steps": 0}, **groups)
    shutil.copytree(whole.run.output_dir, killed.run.output_dir)
    for path in (Path(killed.run.output_dir) / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            (path / "COMPLETE").unlink()
    shutil.rmtree(killed.export.output_dir)
    return killed


@pytest.mark.parametrize(
    ("family", "step", "nproc", "sp_ulysses_degree"),
    [
        ("qwen3_vl", 1, 2, 1),
        ("qwen3_vl", 2, 1, 1),
        ("qwen3_vl", 1, 2, 2),
        ("qwen2_5_vl", 1, 1, 1),
        # Of linear attention and of experts, each sharded otherwise than before.
        *((family, 1, *ranks) for family in ("qwen3_5", "qwen3_vl_moe", "qwen3_5_moe") for ranks in ((1, 1), (4, 2))),
    ],
)
def test_resumed_equals_uninterrupted_on_any_number_of_ranks(
    family: str,
    step: int,
    nproc: int,
    sp_ulysses_degree: int,
    trainings: Callable[[str], TrainSpec],
    tmp_path: Path,
) -> None:
    expected = trainings(family)
    parallel = {"sp_ulysses_degree": sp_ulysses_degree}
    actual = killed_after(step, expected, tmp_path / "run", parallel=parallel)
    trained(actual, nproc)
    result = json.loads((Path(actual.run.output_dir) / "result.json").read_text())
    assert result["resumed_from_step"] == step
    assert_same_training(actual, expected)


def test_export_is_the_last_checkpoint_under_names_that_transformers_knows(
    family: str, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    training = trainings(family)
    folder = Path(training.export.output_dir)
    published = load_file(Path(training.model.path) / "model.safetensors")
    # Experts too, which are published in another layout than the module's.
    assert {n: w.shape for n, w in weights(training).items()} == {n: w.shape for n, w in published.items()}
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    limits = dict(AutoProcessor.from_pretrained(folder).image_processor.size)
    assert limits == {"shortest_edge": training.model.image_min_pixels, "longest_edge": training.model.image_max_pixels}
    assert model.generation_config.eos_token_id is not None
    assert model.config._attn_implementation != "qvl_flash_varlen"
    dcp_to_torch_save(Path(training.run.output_dir) / "checkpoints" / "checkpoint-3", tmp_path / "full.pt")
    checkpoint = torch.load(tmp_path / "full.pt", weights_only=False)["model"]
    exported = model.state_dict()
    for name, weight in checkpoint.items():
        torch.testing.assert_close(exported[name.removeprefix("hf.")], weight, rtol=0, atol=0)
    base = AutoModelForImageTextToText.from_pretrained(training.model.path).state_dict()
    assert all(not torch.equal(weight, base[name]) for name, weight in exported.items() if weight.ndim == 2)


@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_parts_stay_bit_unchanged_under_weight_decay(
    bf16: bool, family: str, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    """Also where they are held in bfloat16 while they are trained with, and of no checkpoint's business."""
    groups = {"model": {"freeze_modules": ("visual",)}, "parallel": {"bf16": bf16}}
    training = changed(trainings(family), tmp_path, run={"save_steps": 0}, **groups)
    trained(training, nproc=2)
    assert_frozen(training, "visual.")


FROZEN = [("qwen3_vl_moe", "*.mlp.experts.*"), ("qwen3_5_moe", "*.mlp.gate.weight"), ("qwen3_5", "*.linear_attn.*")]


@pytest.mark.parametrize(("family", "pattern"), FROZEN)
def test_frozen_experts_routers_and_linear_attention_stay_bit_unchanged(
    family: str, pattern: str, trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    training = changed(trainings(family), tmp_path, run={"save_steps": 0}, model={"freeze_modules": (pattern,)})
    trained(training, nproc=2)
    assert_frozen(training, pattern.strip("*"))


def assert_frozen(training: TrainSpec, part: str) -> None:
    """Weights with this in their names are those of the base, and in no checkpoint; all others are neither."""
    checkpoint = Path(training.run.output_dir) / "checkpoints" / "checkpoint-3"
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names = [name for name in stored if name.startswith("model.")]
    assert names
    assert not [name for name in names if part in name]
    base = load_file(Path(training.model.path) / "model.safetensors")
    kept = FAMILIES[training.model.family].keeps
    for name, weight in weights(training).items():
        assert torch.equal(weight, base[name]) == (part in name or kept(name)), name


def test_failed_rank_names_its_sample_and_ends_the_job(trainings: Callable[[str], TrainSpec], tmp_path: Path) -> None:
    good = trainings("qwen3_vl")
    folder = tmp_path / "data"
    bad = make_training(folder, Path(good.model.path), "qwen3_vl")
    (folder / "4.png").write_bytes(b"no longer an image")
    with pytest.raises(JobFailedError):
        trained(bad, nproc=2)
    report = first_error(Path(bad.run.output_dir))
    assert report["step"] == 2
    assert "4.png" in report["message"]
    assert not (Path(bad.run.output_dir) / "result.json").exists()


def main_asked_to_stop(spec_path: Path) -> int:
    """Rank 1 gets SIGTERM in its second step."""
    take_step = Trainer._train_step

    def interrupted(self: Trainer, step: Step, *args: Any) -> torch.Tensor:
        if step.number == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, step, *args)

    Trainer._train_step = interrupted
    return main(spec_path)


def test_sigterm_ends_the_step_saves_and_the_same_command_goes_on(
    trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    expected = trainings("qwen3_vl")
    actual = changed(expected, tmp_path, run={"save_steps": 0}, data={"dataloader_num_workers": 1})
    actual.save(tmp_path / "train_spec.json")
    run_ranks(main_asked_to_stop, 2, tmp_path / "train_spec.json", log_dir=tmp_path / "logs")
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"step": 2}
    assert [step for step, _ in completed(tmp_path / "checkpoints")] == [2]
    assert len(losses(actual)) == 2
    assert not (tmp_path / "export").exists()
    trained(actual, nproc=2)
    assert json.loads((tmp_path / "result.json").read_text())["resumed_from_step"] == 2
    assert_same_training(actual, expected)


def test_sample_whose_decoding_hangs_is_named_by_the_watchdog(
    trainings: Callable[[str], TrainSpec], tmp_path: Path
) -> None:
    good = trainings("qwen3_vl")
    hanging = make_training(tmp_path / "data", Path(good.model.path), "qwen3_vl")
    hanging = changed(hanging, tmp_path / "run", run={"step_timeout_s": 3.0})
    with pytest.raises(JobFailedError):
        trained(hanging, nproc=2, timeout_s=100, main=partial(main_that_hangs, "4.png"))
    report = first_error(tmp_path / "run")  # rank 1 may have seen rank 0 go
    assert (report["rank"], report["step"], report["sample_ids"]) == (0, 2, ["a/4"])
    assert report["type"] == "StepTimeoutError"
    assert "step 2 has taken" in report["message"]
    assert "still waits for its next batch" in report["message"]
    assert "thread MainThread" in report["traceback"]
    assert "loading.py" in report["traceback"]
