"""A loss or gradient that is not a number stops the run, and nothing from after it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from PIL import Image

from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.model import packed_vlm
from qvl_pipeline.engine.run.checkpoint_files import completed
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.ranks import JobFailedError, run_ranks
from tests.engine.training import changed, make_training

# Two packs a step and two ranks: pack 5 is the one of step 3 on rank 1.
BAD_SAMPLE, BAD_STEP, BAD_RANK = 5, 3, 1
normalize, losses_of = packed_vlm.normalize_patches, packed_vlm.token_losses


def white_is_not_a_number(patches: torch.Tensor, *statistics: list[float]) -> torch.Tensor:
    return normalize(patches, *statistics).masked_fill((patches == 255).all(dim=1, keepdim=True), torch.nan)


def main_with_bad_pixels(spec_path: Path) -> int:
    with mock.patch.object(packed_vlm, "normalize_patches", white_is_not_a_number):
        return main(spec_path)


def main_with_bad_gradient(spec_path: Path) -> int:
    """Losses stay finite; the gradient of the micro-batch of the bad step overflows."""
    calls = 0

    def losses(hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == BAD_STEP:
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        return losses_of(hidden, *rest)

    with mock.patch.object(packed_vlm, "token_losses", losses):
        return main(spec_path)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    folder = tmp_path_factory.mktemp("nonfinite")
    base = make_training(folder, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text", "image") * 6, packs_per_step=2)
    Image.new("RGB", (64, 64), "white").save(folder / f"{BAD_SAMPLE}.png")
    # Rows after steps 2 (with its checkpoint), 4 and 6: the bad step 3 is followed by one on lost weights.
    return changed(base, folder / "run", run={"save_steps": 2, "logging_steps": 4, "save_total_limit": 9})


def failed(training: TrainSpec, function: Callable[[Path], int], last_good: int = 2) -> list[dict]:
    """Run the training, which must fail after step `last_good`; return the error reports of the ranks."""
    folder = Path(training.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    training.save(folder / "train_spec.json")
    with pytest.raises(JobFailedError, match="exit codes"):
        run_ranks(function, 2, folder / "train_spec.json", log_dir=folder / "logs")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [last_good]
    assert [step for step, _ in completed(folder / "checkpoints")] == [last_good]
    assert not (folder / "export").exists()
    return [json.loads(path.read_text()) for path in (folder / "errors").glob("rank*.json")]


def test_bad_loss_names_its_step_rank_and_samples_though_it_is_noticed_later(
    training: TrainSpec, tmp_path: Path
) -> None:
    reports = failed(changed(training, tmp_path), main_with_bad_pixels)
    assert reports
    for report in reports:  # whichever rank is heard first
        assert (report["type"], report["step"], report["rank"]) == ("NonFiniteError", BAD_STEP, BAD_RANK)
        assert report["sample_ids"] == [f"b/{BAD_SAMPLE}"]
        assert f"step {BAD_STEP} on rank {BAD_RANK}" in report["message"]


def test_bad_gradient_under_finite_losses_names_the_samples_of_its_step(training: TrainSpec, tmp_path: Path) -> None:
    reports = failed(changed(training, tmp_path), main_with_bad_gradient)
    assert reports
    for report in reports:
        assert (report["type"], report["step"]) == ("NonFiniteError", BAD_STEP)
        assert report["sample_ids"] == ["a/4", "b/5"]
        assert "though all its losses are" in report["message"]


def test_bad_loss_in_an_evaluation_stops_the_run_too(training: TrainSpec, tmp_path: Path) -> None:
    # No loss is better than one that is not a number, nor worse: with it no step could be told to be the best.
    plan = pd.read_parquet(training.data.pack_plan).iloc[[0, BAD_SAMPLE]].assign(step=0, pack=[0, 1])
    plan.astype({"step": "int32", "pack": "int32"}).to_parquet(tmp_path / "eval_plan.parquet", index=False)
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "plan": str(tmp_path / "eval_plan.parquet"),
        "load_best_model_at_end": True,
    }
    reports = failed(
        changed(training, tmp_path, run={"save_steps": 1}, validation=evaluated), main_with_bad_pixels, last_good=1
    )
    assert reports
    for report in reports:
        assert (report["type"], report["step"], report["rank"]) == ("NonFiniteError", 2, 1)
        assert report["sample_ids"] == [f"b/{BAD_SAMPLE}"]
        assert "an evaluation loss of step 2 on rank 1 is not finite" in report["message"]
