"""The export: a plain transformers folder with the same logits, in files of a given size (invariant 12)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.model.export.folder import export, exported_files, split_into_files
from qvl_pipeline.engine.model.loading import load_processor
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from tests.engine.model.test_packed_vlm import reference_loss
from tests.engine.model.test_weights import load_sharded
from tests.engine.packs import MEAN, STD
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training


def export_changed_model(specs: list[TrainSpec], batch: Batch, folder: Path) -> None:
    model = load_sharded(specs[0])
    model.image_mean, model.image_std = torch.tensor(MEAN), torch.tensor(STD)  # as in `reference_loss`
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
        loss = model(batch).sum().item()  # leaves the root's parameters gathered, as a validation does
    for spec in specs:
        export(model, exported_files(load_processor(spec), spec), spec)
    if torch.distributed.get_rank() == 0:
        (folder / "loss.json").write_text(json.dumps(loss))
    torch.distributed.barrier()


@pytest.mark.parametrize("parallel", [{}, {"hsdp_shard_size": 1}], ids=["sharded", "replicated"])
def test_reloaded_by_plain_transformers_gives_the_same_loss_in_every_form(
    parallel: dict[str, int],
    family: str,
    tiny_folders: Callable[[str], Path],
    builder: BatchBuilder,
    samples: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(family), family, kinds=("text",))
    whole = changed(base, tmp_path / "whole", parallel=parallel)
    split = changed(base, tmp_path / "split", export={"dtype": "bfloat16", "max_shard_bytes": 1_000_000})
    stale = Path(whole.export.output_dir) / "stale.safetensors"
    stale.parent.mkdir(parents=True)
    stale.touch()
    chosen = [samples["image"], samples["video"]]
    run_ranks(
        export_changed_model, 2, [whole, split], builder.build(chosen, vision=True), tmp_path, log_dir=tmp_path / "logs"
    )

    model = AutoModelForImageTextToText.from_pretrained(whole.export.output_dir)
    assert model.dtype == torch.float32
    assert model.config.architectures == [type(model).__name__]
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == model.config.tie_word_embeddings
    loss = sum(reference_loss(model, sample, builder) for sample in chosen)
    assert loss.item() == pytest.approx(json.loads((tmp_path / "loss.json").read_text()), rel=1e-5)
    assert not stale.exists()
    assert [path.name for path in stale.parent.parent.iterdir() if path.name.startswith(".")] == []

    folder = Path(split.export.output_dir)
    half, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert half.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16()), name
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 1_000_000 + 50_000 for path in files)
    kept = {n: w for n, w in load_file(tiny_folders(family) / "model.safetensors").items() if FAMILIES[family].keeps(n)}
    assert bool(kept) == bool(FAMILIES[family].kept_prefixes)
    for exported in (Path(whole.export.output_dir), folder):
        stored = {name: weight for path in exported.glob("*.safetensors") for name, weight in load_file(path).items()}
        for name, weight in kept.items():
            assert stored[name].dtype == weight.dtype
            assert torch.equal(stored[name], weight), name
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {name: path.name for path in files for name in load_file(path)}


def test_files_are_filled_in_order_and_a_large_tensor_has_its_own() -> None:
    assert split_into_files({"a": 3, "b": 4, "c": 2}, 9) == {"model.safetensors": ["a", "b", "c"]}
    assert split_into_files({"a": 3, "b": 3, "c": 20, "d": 1, "e": 9}, 9) == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e"],
    }
