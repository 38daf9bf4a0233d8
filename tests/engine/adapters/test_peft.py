"""Against peft itself: its files are ours, and its training on the plain model is ours, step by step (invariant 15)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.optim.optimization import learning_rate_schedule
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.pixels import normalization
from tests.engine.model.test_packed_vlm import reference_loss
from tests.engine.packs import make_builder
from tests.engine.training import changed, make_training, trained

STEPS, PACKS = 20, 2
# Not of Qwen2.5-VL: after these clips, transformers' own positions are others than its authors' (docs/architecture.md).
KINDS = {
    family: ("text", "image", clip, "text") * (STEPS * PACKS // 4)
    for family, clip in {**dict.fromkeys(FAMILIES, "video"), "qwen2_5_vl": "image"}.items()
}
TARGETS = {"llm": "all", "merger": "all"}


def plain(training: TrainSpec) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(training.model.path, dtype=torch.float32)


def loss_of(model: PreTrainedModel, training: TrainSpec, rows: Sequence[int]) -> torch.Tensor:
    """Loss of some samples by transformers' own forward: nats a supervised token."""
    samples, builder = TokenizedSamples(Path(training.data.tokenized)), reader(training, model.config)
    pixels = normalization(AutoProcessor.from_pretrained(training.model.path))
    taken = [samples.row(row) for row in rows]
    tokens = sum(int(np.diff(sample["label_spans"]).sum()) for sample in taken)
    return sum(reference_loss(model, sample, builder, pixels) for sample in taken) / tokens


def peft_folder(training: TrainSpec, folder: Path, kind: str) -> Path:
    """An adapter as peft makes it, not at its start: both of its matrices are random."""
    model = plain(training)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("language_model" in name or "merger." in name)
        if "deepstack" not in name
    ]
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=names, use_dora=kind == "dora", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def reader(training: TrainSpec, config: Any) -> BatchBuilder:
    """Reads the media of a training as the engine does."""
    builder = make_builder(config, training.model.family)
    vision = config.vision_config
    loader = PatchLoader(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        frame_store=Path(training.data.video_frames),
    )
    return BatchBuilder(**{**vars(builder), "loader": loader})


def train_with_peft(training: TrainSpec, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The steps of a training, on the plain model by peft and torch alone."""
    model = PeftModel.from_pretrained(plain(training), folder, is_trainable=True)
    spec = training.optim
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=spec.learning_rate, betas=(spec.adam_beta1, spec.adam_beta2), eps=spec.adam_epsilon
    )
    schedule, losses = learning_rate_schedule(spec, STEPS), []
    for step in range(STEPS):
        loss = loss_of(model, training, range(step * PACKS, (step + 1) * PACKS))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *vectors], spec.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * schedule(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder / "trained")
    return losses, load_file(folder / "trained" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_twenty_steps_are_those_of_peft_on_the_plain_model(
    family: str, kind: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(family), family, KINDS[family], packs_per_step=PACKS)
    base = changed(base, tmp_path / "run", optim={"learning_rate": 2e-3, "router_aux_loss_coef": 0.0})
    start = peft_folder(base, tmp_path / "peft", kind)
    training = changed(base, tmp_path / "run", adapter={"type": kind, "targets": TARGETS, "start_from": str(start)})
    rows = trained(training, nproc=1)
    expected, tensors = train_with_peft(base, start)
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    folder = Path(training.export.output_dir) / "adapter"
    ours = load_file(folder / "adapter_model.safetensors")
    assert ours.keys() == tensors.keys()
    for name, tensor in ours.items():
        error = (tensor - tensors[name]).norm() / tensors[name].norm()
        assert error <= 1e-5, f"{name}: differs by {error:.1e}"
    begun = load_file(start / "adapter_model.safetensors")
    # Ten times what they may differ by, and more.
    assert all((tensor - begun[name]).norm() > 1e-4 * tensor.norm() for name, tensor in ours.items())
    assert_same_losses(training, folder)


def assert_same_losses(training: TrainSpec, folder: Path) -> None:
    """Of our adapter in peft, and of our merged model."""
    in_peft = PeftModel.from_pretrained(plain(training), folder).eval()
    merged = AutoModelForImageTextToText.from_pretrained(training.export.output_dir, dtype=torch.float32)
    base = plain(training)
    with torch.no_grad():
        for row in range(3):
            losses = [loss_of(model, training, [row]) for model in (in_peft, merged, base)]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
            assert not torch.allclose(losses[2], losses[0], rtol=1e-4)


def test_saved_loaded_and_saved_again_it_has_equal_bytes(
    family: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(family), family, KINDS[family][:3], packs_per_step=3)
    start = peft_folder(base, tmp_path / "peft", "dora")
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    adapter = {"type": "dora", "targets": TARGETS, "start_from": str(start)}
    once = changed(base, tmp_path / "once", adapter=adapter, optim=still)
    trained(once, nproc=1)
    folder = Path(once.export.output_dir) / "adapter"
    again = changed(base, tmp_path / "again", adapter={**adapter, "start_from": str(folder)}, optim=still)
    trained(again, nproc=2)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path(again.export.output_dir) / "adapter" / name).read_bytes() == (folder / name).read_bytes()
    theirs = load_file(start / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(tensor, theirs[name]), name


def test_parts_trained_in_full_and_pissa_load_in_peft_too(
    family: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(family), family, KINDS[family][:8], packs_per_step=PACKS)
    adapter = {"type": "lora", "init": "pissa", "targets": {"llm": ["attention"]}}
    adapter["train_fully"] = ("merger", "*.layers.0.input_layernorm.weight")
    training = changed(base, tmp_path / "run", adapter=adapter)
    trained(training, nproc=2)
    folder = Path(training.export.output_dir) / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2 * training.adapter.r
    assert_same_losses(training, folder)
