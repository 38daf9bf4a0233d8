"""A whole answer, of a model whose weights are not there: verdict, changes, time, and the page that shows it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.preflight import profiles

from qvl_pipeline.config import AdapterConfig, BatchingConfig, ModelConfig, PreflightConfig, SampleConfig, TrainConfig
from qvl_pipeline.preflight.asking import ask
from qvl_pipeline.preflight.verdict import Plan
from qvl_pipeline.reports.preflight_page import render_preflight


def answer(
    tmp_path: Path, hardware: str, *, length: int = 4096, micro_batches: int = 1, **train: Any
) -> dict[str, Any]:
    name = "Qwen/Qwen3-VL-2B-Instruct"
    return ask(
        Plan(None, None, tmp_path / "frames"),
        SampleConfig(),
        ModelConfig(processor_type="qwen3_vl", load_from_pretrained_path=name, processor_name=name),
        BatchingConfig(packing_length=length, max_steps=100, gradient_accumulation_steps=micro_batches),
        TrainConfig(bf16=True, use_liger_kernel=True, **train),
        AdapterConfig(),
        PreflightConfig(hardware=hardware, gpu_hour_price=2.0),
        tmp_path / "base",
        [],
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer(tmp_path_factory.mktemp("small"), "1xL4-24GB")


def test_what_does_not_fit_names_the_smallest_changes_that_do(small: dict[str, Any]) -> None:
    assert small["verdict"] == "does not fit"
    *before, last = small["changes"]
    assert last["fits"]
    assert last["needed_bytes"] < small["memory"]["device_bytes"]
    assert not any(change["fits"] for change in before)
    assert small["sentence"].endswith("GiB)")
    assert last["what"] in small["sentence"]
    # States alone are 16 bytes a parameter: no recomputation is enough, and more of it takes the place of less.
    assert small["changes"][0]["parameters"] == "train.gradient_checkpointing=true"


def test_gradients_in_shards_come_first_where_they_save_something(tmp_path: Path) -> None:
    """On one rank, or in one micro-batch a step, they do not."""
    changes = answer(tmp_path, "2xL4-24GB", micro_batches=4)["changes"]
    assert changes[0]["parameters"] == "train.fsdp_config.accumulate_sharded=true"
    saved = [change["needed_bytes"] for change in changes]
    assert saved == sorted(saved, reverse=True)


def test_parts_add_up(small: dict[str, Any]) -> None:
    memory = small["memory"]
    assert sum(memory["parts"].values()) == memory["tensors_bytes"]
    assert memory["tensors_bytes"] + memory["reserve_bytes"] == memory["needed_bytes"]
    assert memory["low_bytes"] < memory["needed_bytes"] < memory["high_bytes"]
    trained = small["model"]["trained_parameters"]
    assert trained == small["model"]["parameters"] == 2_127_532_032
    assert memory["parts"]["weights"] == 4 * trained
    assert memory["parts"]["optimizer"] == 8 * trained


def test_without_a_plan_it_is_the_heaviest_pack_that_is_allowed(small: dict[str, Any]) -> None:
    assert not small["memory"]["pack"]["of_the_plan"]
    assert small["memory"]["pack"]["tokens"] == 4096
    assert small["work"]["steps"] == 100
    assert small["time"]["cost"] == pytest.approx(2 * small["time"]["hours"])


def test_the_least_recomputation_that_fits_is_chosen(tmp_path: Path) -> None:
    roomy = answer(tmp_path, "1xH200", gradient_checkpointing="auto")
    assert (roomy["verdict"], roomy["recompute"]["llm"]) == ("fits", "none")
    tight = answer(tmp_path, "1xH100-110GB", length=16_384, gradient_checkpointing="auto")
    assert (tight["verdict"], tight["recompute"]["llm"]) == ("fits", "selective")


def test_the_page_shows_it(small: dict[str, Any]) -> None:
    page = render_preflight("mine", small)
    for shown in ("Does not fit", small["changes"][-1]["parameters"], "One block at work", "Weights"):
        assert shown in page.replace("<wbr>", "")
    assert render_preflight("mine", small) == page
    assert "nobody asked" in render_preflight("mine", {"verdict": "off", "sentence": "nobody asked"})


@pytest.mark.parametrize(("profile", "hardware"), profiles.named_hardware().items())
def test_a_profile_fits_the_hardware_that_it_names(profile: str, hardware: str) -> None:
    started = time.process_time()
    report = profiles.answer(profile, hardware)
    assert time.process_time() - started < 20
    if profile.startswith("qwen3_5"):
        assert report == {"verdict": "off", "sentence": report["sentence"]}
        assert "linear attention has not been measured" in report["sentence"]
        return
    assert report["verdict"] == "fits", report["sentence"]
    assert min(report["memory"]["parts"].values()) >= 0, "what a tower let go of others is theirs"
