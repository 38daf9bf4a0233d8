"""Whole trainings of a model that hears: ranks without a sound, shared packs, resuming, freezing, the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.engine.feed.sounds import SoundReader
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.evaluation.generation import generate_answers, load_model
from qvl_pipeline.evaluation.likelihood import sample_losses
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.pixels import normalization
from qvl_pipeline.media.sound.store import SoundStore
from tests.engine.model.test_hearing import thinker_loss
from tests.engine.packs import make_builder
from tests.engine.test_distributed import assert_same_training, losses
from tests.engine.training import changed, make_training, published, trained

FAMILY = "qwen2_5_omni"
# Four packs a step: with two ranks there are micro-batches in which one of them, both, or neither has a sound.
KINDS = ("audio", "text", "image", "text", "text", "text", "audio", "audio", "video", "audio", "text", "image")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """It has run on two ranks, with a checkpoint after each of its three steps."""
    base = make_training(tmp_path_factory.mktemp("training"), tiny_folders(FAMILY), FAMILY, KINDS)
    made = changed(base, Path(base.run.output_dir), run={"save_steps": 1, "save_total_limit": 3})
    trained(made, nproc=2)
    return made


@pytest.mark.parametrize(
    ("nproc", "parallel"), [(1, {}), (4, {}), (2, {"sp_ulysses_degree": 2})], ids=["one", "four", "sharing packs"]
)
def test_any_number_of_ranks_trains_the_same(nproc: int, parallel: dict, training: TrainSpec, tmp_path: Path) -> None:
    actual = changed(training, tmp_path, run={"save_steps": 0}, parallel=parallel)
    trained(actual, nproc)
    assert_same_training(actual, training)


def test_resumed_equals_uninterrupted(training: TrainSpec, tmp_path: Path) -> None:
    checkpoint = Path(training.run.output_dir) / "checkpoints/checkpoint-2"
    actual = changed(training, tmp_path, run={"save_steps": 0, "resume_from": str(checkpoint)})
    trained(actual, nproc=1)
    assert losses(actual) == pytest.approx(losses(training)[-1:], rel=1e-5)


def test_an_export_has_what_speaks_untouched_and_what_is_frozen_unchanged(
    training: TrainSpec, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = published(tmp_path / "base", tiny_folders(FAMILY))
    model = {"path": str(base), "processor": str(base), "freeze_modules": ("audio",)}
    spec = changed(training, tmp_path / "run", run={"save_steps": 0}, model=model, export={"dtype": "bfloat16"})
    trained(spec, nproc=2)
    exported = Path(spec.export.output_dir)
    before, after = load_file(base / "model.safetensors"), load_file(exported / "model.safetensors")
    assert set(after) == set(before)
    assert {name.split(".")[0] for name in after} == {"thinker", "talker", "token2wav"}
    for name in before:
        if name.startswith(FAMILIES[FAMILY].kept_prefixes):
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name])
        elif name.startswith("thinker.audio_tower.") and ".proj." not in name:
            assert torch.equal(after[name], before[name].to(torch.bfloat16))
        elif name == "thinker.audio_tower.proj.weight":
            assert not torch.equal(after[name], before[name].to(torch.bfloat16))
    assert (exported / "spk_dict.pt").read_bytes() == (base / "spk_dict.pt").read_bytes()
    reloaded = load_model(str(exported), "auto").state_dict()
    for name, tensor in after.items():
        if name.startswith("thinker.audio_tower."):
            loaded = reloaded[f"model.{name.removeprefix('thinker.')}"]
            torch.testing.assert_close(loaded, tensor.to(loaded.dtype), rtol=0, atol=0)


def test_an_adapter_of_the_audio_tower_changes_it_alone_and_trains_the_same_on_shared_packs(
    training: TrainSpec, tmp_path: Path
) -> None:
    adapter = {"type": "lora", "targets": {"audio": ["attention", "mlp"], "audio_projector": "all"}}
    alone = changed(training, tmp_path / "one", run={"save_steps": 0}, adapter=adapter)
    shared = changed(alone, tmp_path / "two", parallel={"sp_ulysses_degree": 2})
    first, *_ = trained(alone, nproc=1)
    trained(shared, nproc=2)
    assert first["loss"] == pytest.approx(losses(training)[0], rel=1e-6)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (Path(alone.model.path), Path(alone.export.output_dir))
    )
    changes = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if ".layers." in name and before[name].ndim == 2 and "audio_tower" in name}
    assert changes == linear | {name for name in before if name.endswith("audio_tower.proj.weight")}
    plain, processor = load_model(alone.model.path, "auto"), AutoProcessor.from_pretrained(alone.model.path)
    by_peft = PeftModel.from_pretrained(plain, Path(alone.export.output_dir) / "adapter").merge_and_unload()
    merged = load_model(alone.export.output_dir, "auto")
    rows, store = TokenizedSamples(Path(alone.data.tokenized)), Path(alone.data.video_frames)
    expected, found = (
        sample_losses(model, processor, rows, range(6), store, batch_size=3) for model in (merged, by_peft)
    )
    assert [found[row] for row in range(6)] == pytest.approx([expected[row] for row in range(6)], rel=1e-5)


def test_answers_and_losses_are_those_of_the_plain_thinker(training: TrainSpec) -> None:
    """What `evaluate` computes in batches, against the model's own forward on each sample alone."""
    model, processor = load_model(training.model.path, "auto"), AutoProcessor.from_pretrained(training.model.path)
    store, samples = Path(training.data.video_frames), TokenizedSamples(Path(training.data.tokenized))
    builder = dataclasses.replace(
        make_builder(model.config, FAMILY),
        loader=PatchLoader(patch_size=14, frame_store=store),
        sounds=SoundReader(SoundStore(store, FAMILIES[FAMILY].hearing), FAMILIES[FAMILY].hearing, model.config),
    )
    rows = range(len(samples))
    found = sample_losses(model, processor, samples, rows, store, batch_size=5)
    config = EvaluateConfig(batch_size=5, max_new_tokens=2)
    answers = generate_answers(model, processor, samples, rows, store, config)
    alone = generate_answers(model, processor, samples, rows, store, config.model_copy(update={"batch_size": 1}))
    assert answers == alone
    for row in rows:
        sample = samples.row(row)
        with torch.no_grad():
            expected = thinker_loss(model, sample, builder, normalization(processor)) / sample["supervised_tokens"]
        assert found[row] == pytest.approx(expected.item(), rel=1e-4)
