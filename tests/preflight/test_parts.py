"""The parts of the preflight: the ledger, hardware, packs, states, and the parameters that switch it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from benchmarks.preflight.cpu import expected
from benchmarks.preflight.settings import CONFIGS, Setting
from pydantic import ValidationError

from qvl_pipeline.config import BatchingConfig, ModelConfig, PreflightConfig, TrainConfig
from qvl_pipeline.engine.model.flops import flops_of
from qvl_pipeline.errors import UserError
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.preflight.asking import expected_peak_bytes, refuse_what_cannot_fit, with_chosen_recomputation
from qvl_pipeline.preflight.duration import duration_of, total_flops
from qvl_pipeline.preflight.hardware import GIB, Hardware, named_hardware
from qvl_pipeline.preflight.memory.ledger import Ledger
from qvl_pipeline.preflight.memory.model import Kernels, config_of, prepare
from qvl_pipeline.preflight.memory.units import units_of
from qvl_pipeline.preflight.packs import Work, _media_of, heaviest_allowed, make_batch, work_of
from qvl_pipeline.preflight.versions import known_bad
from tests.engine.training import make_training


def test_the_ledger_counts_what_is_held_and_no_longer() -> None:
    weight = torch.empty(8, 4, device="meta", requires_grad=True)
    with Ledger([weight], "cpu") as ledger:
        x = torch.ones(16, 8, device="meta")
        assert ledger.live == 16 * 8 * 4
        y = (x @ weight).relu()
        assert ledger.live == 16 * 8 * 4 + 16 * 4 * 4, "relu keeps its output, and no one the product"
        assert ledger.peak == 16 * 8 * 4 + 2 * 16 * 4 * 4
        y.sum().backward()
        del x, y
        assert ledger.live == weight.grad.nbytes


def test_integers_that_go_to_the_device_can_still_be_read() -> None:
    with Ledger([], "cpu"):
        assert torch.tensor([1, 2]).to("meta").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "ranks", "gib", "peak"),
    [
        ("8xH100-80GB", 8, 78.8, 9.89e14),
        ("2x4xA100-40GB", 8, 39.4, 3.12e14),
        ("1xH200", 1, 138.9, 9.89e14),
        ("1xRTX4090", 1, 23.6, 1.652e14),
    ],
)
def test_hardware_is_read_from_its_name(text: str, ranks: int, gib: float, peak: float) -> None:
    hardware = named_hardware(text)
    assert (hardware.ranks, hardware.peak_flops) == (ranks, peak)
    assert hardware.memory / GIB == pytest.approx(gib, abs=0.1)


def test_hardware_whose_memory_nobody_knows_is_to_say_it() -> None:
    with pytest.raises(UserError, match="how much memory a Z9000 has is not known here; say it, as in 8xZ9000-80GB"):
        named_hardware("8xZ9000")
    with pytest.raises(ValidationError, match="write it as 8xH100-80GB"):
        PreflightConfig(hardware="eight H100")


@pytest.mark.parametrize("off", [False, "off", {"mode": "off"}, {"mode": False}])
def test_the_preflight_can_be_switched_off_as_a_word(off: object) -> None:
    assert PreflightConfig.model_validate(off).mode == "off"


def test_the_heaviest_pack_that_is_allowed_is_full_of_the_largest_images() -> None:
    model = ModelConfig(processor_type="qwen3_vl", image_max_pixels=64 * 64)
    (heavy,) = heaviest_allowed(model, BatchingConfig(packing_length=100, per_device_train_batch_size=2), (1, 2))
    assert heavy.tokens == 200
    sides = {(m["grid_h"], m["grid_w"]) for sample in heavy.samples for m in sample["media"]}
    assert (4, 4) in sides
    assert heavy.patches <= 4 * heavy.tokens
    (limited,) = heaviest_allowed(model, BatchingConfig(packing_length=100, packing_vit_patches=16), (1, 2))
    assert (limited.tokens, limited.patches) == (100, 16)
    (single,) = heaviest_allowed(model, BatchingConfig(packing_length=100, packing=False), (1, 2))
    assert (len(single.samples), single.tokens, single.patches) == (1, 100, 16)


def test_the_heaviest_pack_of_a_model_that_hears_may_be_one_of_sound() -> None:
    model, ids = ModelConfig(processor_type="qwen2_5_omni", image_max_pixels=64 * 64), (1, 2, 5)
    images, sound = heaviest_allowed(model, BatchingConfig(packing_length=8000), ids)
    assert (images.spectra, sound.patches, sound.tokens) == (0, 0, 8000)
    # A sound of 300 seconds, the longest that there is, and one that fills up the rest.
    assert [sample["media"][0]["spectra"] for sample in sound.samples] == [30_000, 4 * (8000 - 7500 - 2 * 32)]
    config = CONFIGS["qwen2_5_omni"]
    assert make_batch(sound.samples, config, FAMILIES["qwen2_5_omni"], degree=1, rmpad=True).spectra == [30_000, 1744]
    (single,) = heaviest_allowed(model, BatchingConfig(packing_length=9000, packing=False), ids)[1:]
    assert (len(single.samples), single.tokens, single.spectra) == (1, 9000, 30_000)


def test_shards_are_those_of_fsdp() -> None:
    from qvl_pipeline.engine.model.packed_vlm import PackedVLM
    from qvl_pipeline.engine.model.weights import skeleton_of
    from qvl_pipeline.families import FAMILIES

    model = PackedVLM(skeleton_of(CONFIGS["qwen3_vl"]), FAMILIES["qwen3_vl"], [0.5] * 3, [0.5] * 3)
    spec = Setting("").spec()
    whole, shared = units_of(model, 1, spec), units_of(model, 3, spec)
    assert sum(unit.trained for unit in whole.values()) == sum(p.numel() for p in model.parameters())
    layer = model.hf.model.language_model.layers[0]
    # Rows are padded to a multiple of the ranks.
    rows = sum(-(-p.shape[0] // 3) * (p.numel() // p.shape[0]) for p in layer.parameters())
    assert shared["llm", 0].trained == rows
    assert shared["llm", 0].gathered == 3 * 4 * rows


def test_less_memory_is_foretold_where_less_is_kept() -> None:
    plain = expected(Setting("", tokens=1024))
    selective = expected(Setting("", tokens=1024, llm="selective", vit="selective"))
    full = expected(Setting("", tokens=1024, llm="full", vit="full"))
    assert full < selective < plain
    assert expected(Setting("", tokens=1024, adapter="lora")) < plain
    assert expected(Setting("", tokens=1024, ranks=4, degree=4)) < expected(Setting("", tokens=1024, ranks=4))


def test_time_is_that_of_the_last_training_on_such_a_device(tmp_path: Path) -> None:
    hardware = Hardware("NVIDIA H100 80GB HBM3", 1, 8, 80 * GIB, 9.89e14)
    usual = duration_of(8 * 9.89e14, 4, hardware, [], 0.0)
    assert (usual.seconds, usual.mfu) == (pytest.approx(1 / 0.3), pytest.approx(0.3))
    assert duration_of(8 * 9.89e14, 4, hardware, [], 0.5).seconds == pytest.approx(2)
    (tmp_path / "train_result.json").write_text(json.dumps({"device": "NVIDIA H100 PCIe", "world_size": 8}))
    rows = {"step": [1, 4], "tflops_per_rank": [200.0, 400.0], "tokens": [10, 30], "tokens_per_second": [10.0, 10.0]}
    pd.DataFrame(rows).to_csv(tmp_path / "training_metrics.csv", index=False)
    recorded = [tmp_path / "train_result.json"]
    assert duration_of(8 * 9.89e14, 4, hardware, recorded, 0.0).mfu == pytest.approx(0.3), "another device"
    (tmp_path / "train_result.json").write_text(json.dumps({"device": hardware.name, "world_size": 2}))
    found = duration_of(8 * 350e12, 1, hardware, recorded, 0.0)
    assert found.seconds == pytest.approx(1), "each second of the recorded training counts the same"
    assert found.source == f"the recorded training of {tmp_path.name}"
    larger = duration_of(8 * 700e12, 1, hardware, recorded, 0.0)
    assert larger.source.endswith(", whose steps had 0.5 times the work: a rough guess")


def test_of_a_model_that_also_speaks_the_part_that_is_trained_is_looked_at(tmp_path: Path) -> None:
    thinker = CONFIGS["qwen2_5_omni"].to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": thinker}))
    config = config_of(str(tmp_path))
    assert (config.model_type, config.audio_config.encoder_layers) == ("qwen2_5_omni_thinker", 6)
    assert config_of("Qwen/Qwen2.5-Omni-7B").model_type == "qwen2_5_omni_thinker"


def counted_work(tmp_path: Path, family: str, *kinds: Sequence[str]) -> Work:
    """Return the work of a small training's plan, whose FLOPs are those that training counts of its batches."""
    CONFIGS[family].save_pretrained(tmp_path / "model")
    spec = make_training(tmp_path / "data", tmp_path / "model", family, *kinds)
    config = config_of(spec.model.path)
    flops = flops_of(prepare(spec, config, Kernels("cpu", "sdpa", "sdpa", fused=False)))
    plan, tokenized = pd.read_parquet(spec.data.pack_plan), Path(spec.data.tokenized)
    work, rows = work_of(plan, tokenized), TokenizedSamples(tokenized)
    packs = [[rows.row(int(row)) for row in numbers] for numbers in plan["sample_rows"]]
    batches = [make_batch(pack, config, FAMILIES[family], degree=1, rmpad=True) for pack in packs]
    assert total_flops(flops, work) == pytest.approx(sum(flops.count(batch) for batch in batches), rel=1e-9)
    return work


def test_the_work_of_a_plan_is_what_training_counts(tmp_path: Path) -> None:
    work = counted_work(tmp_path, "qwen2_5_vl")
    assert (work.steps, work.images, work.frames) == (3, 4, 16)


def test_the_work_of_a_plan_with_sounds_is_what_training_counts(tmp_path: Path) -> None:
    work = counted_work(tmp_path, "qwen2_5_omni", ("audio", "text", "image", "audio", "video", "audio"))
    assert sum(work.sounds.values()) == 3


def test_media_are_counted_as_often_as_their_sample_is_trained_on_in_whichever_batch_it_is() -> None:
    def medium(kind: str, side: int) -> dict[str, Any]:
        return {"type": kind, "key": f"{side}", "grid_t": 1, "grid_h": side, "grid_w": 4, "spectra": 0}

    small, large, clip = medium("image", 2), medium("image", 6), medium("video", 2)
    batches = [[[small], [], [small, large]], [[clip, small]], [], [[large, large], [small]]]
    kind = pa.list_(pa.Table.from_pylist([small]).to_struct_array().type)
    media = pa.chunked_array([pa.array(batch, kind) for batch in batches])
    times = np.array([0, 1, 2, 3, 1, 0])
    expected = Counter()
    for number, count in enumerate(times):
        for item in media[number].as_py():
            expected[item["type"], item["grid_h"]] += count
    found = Counter()
    # Also of a part of a table, whose arrays begin within others.
    for part, counts in ((media, times), (media.slice(2), times[2:])):
        found.clear()
        for item, count in _media_of(part, counts):
            found[item["type"], item["grid_h"]] += count
        assert found == expected, "the first two have none"


def test_a_training_that_cannot_fit_is_refused_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    report = {"verdict": "does not fit", "sentence": "does not fit: 90.0 GiB of 80.0 GiB"}
    with pytest.raises(UserError, match=r"the training does not fit: 90\.0 GiB.*preflight\.mode to warn"):
        refuse_what_cannot_fit(report, PreflightConfig())
    refuse_what_cannot_fit(report, PreflightConfig(mode="warn"))
    assert "does not fit: 90.0 GiB" in caplog.text
    refuse_what_cannot_fit({"verdict": "may not fit", "sentence": "may not fit"}, PreflightConfig())


def test_what_is_chosen_takes_the_place_of_auto() -> None:
    automatic = TrainConfig(gradient_checkpointing="auto")
    chosen = {"llm": "selective", "vit": "selective", "every": 1, "offload": False}
    train = with_chosen_recomputation(automatic, {"verdict": "fits", "recompute": chosen})
    assert train.recomputed.model_dump() == chosen
    with pytest.raises(UserError, match="'auto' is chosen by the preflight, which is off"):
        with_chosen_recomputation(automatic, {"verdict": "off"})
    assert with_chosen_recomputation(TrainConfig(), {"verdict": "off"}) == TrainConfig()


def test_a_peak_is_compared_on_the_machine_it_was_foretold_for() -> None:
    report = {"verdict": "fits", "hardware": {"this_machine": True}, "memory": {"tensors_bytes": 7}}
    assert expected_peak_bytes(report) == 7
    assert expected_peak_bytes({**report, "hardware": {"this_machine": False}}) == 0
    assert expected_peak_bytes({"verdict": "off"}) == 0


def test_known_bad_versions_have_an_issue_and_say_whether_they_matter_here() -> None:
    for entry in known_bad():
        assert entry["issue"].startswith("https://github.com/")
        assert entry["here"].split(":")[0] in ("yes", "no")


def test_the_grid_of_settings_is_the_one_that_is_promised() -> None:
    from benchmarks.preflight.settings import GRID

    assert len(GRID) >= 24
    assert {setting.ranks for setting in GRID} == {1, 2, 4}
    assert replace(GRID[0], name="") != GRID[1]
