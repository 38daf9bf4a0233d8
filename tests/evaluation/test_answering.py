"""Ranks answer what one process answers, each row once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.evaluation import answering
from qvl_pipeline.evaluation.answering import Answering, answer_all, answer_share, merge
from qvl_pipeline.evaluation.generation import load_model
from qvl_pipeline.training.launcher import RankFailedError
from tests.evaluation.world import KINDS, World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One family is enough: what differs between them is generation's."""
    return build_world(tmp_path_factory.mktemp("world"), "qwen3_vl", list(KINDS))


@pytest.fixture
def asked(world: World) -> Answering:
    return Answering(
        models={"base": str(world.model_folder), "trained": str(world.model_folder)},
        processor=str(world.model_folder),
        tokenized=str(world.tokenized),
        video_frames=str(world.video_frames),
        rows=(0, 1, 2, 3, 5),
        attn_implementation="auto",
        evaluate=EvaluateConfig(batch_size=2, max_new_tokens=4),
    )


def test_what_is_asked_survives_its_file(asked: Answering, tmp_path: Path) -> None:
    asked.save(tmp_path / "answering.json")
    assert Answering.load(tmp_path / "answering.json") == asked


def test_with_and_without_an_adapter_from_one_copy_of_the_base(
    asked: Answering, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the base model alone, and with the merged model that plain transformers loads."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(world.model_folder)
    config = LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["model.visual.merger.linear_fc2"],
        use_dora=True,
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model.model.visual.merger.linear_fc2.modules_to_save["default"].weight.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    apart = Answering(**{**vars(asked), "models": {**asked.models, "trained": str(tmp_path / "merged")}})
    expected = answer_share(apart, 0, 1, lambda n: None)
    loaded = []
    monkeypatch.setattr(answering, "load_model", lambda *given: loaded.append(given) or load_model(*given))
    with_adapter = Answering(**{**vars(asked), "adapters": {"trained": str(tmp_path / "adapter")}})
    found = answer_share(with_adapter, 0, 1, lambda n: None)
    assert len(loaded) == 1
    assert found["base"] == expected["base"]
    for row, (answer, loss) in expected["trained"].items():
        assert found["trained"][row] == (answer, pytest.approx(loss, rel=1e-5))
        assert found["base"][row][1] != pytest.approx(loss, rel=1e-3)


def test_two_ranks_answer_what_one_process_answers(asked: Answering, tmp_path: Path) -> None:
    done: list[int] = []
    alone = answer_all(asked, tmp_path / "alone", 1, done.append)
    assert sum(done) == 2 * 2 * len(asked.rows)
    shared_done: list[int] = []
    shared = answer_all(asked, tmp_path / "shared", 2, shared_done.append)
    assert sum(shared_done) == 2 * 2 * len(asked.rows)
    for name in asked.models:
        assert shared[name].keys() == set(asked.rows)
        for row, (answer, loss) in alone[name].items():
            assert shared[name][row][0] == answer
            assert shared[name][row][1] == pytest.approx(loss, rel=1e-6)


def test_more_ranks_than_rows_leave_some_without_work(asked: Answering) -> None:
    shares = [answer_share(asked, rank, 7, lambda n: None) for rank in (5, 6)]
    assert shares == [{"base": {}, "trained": {}}] * 2


def test_a_row_that_no_rank_answered_is_an_error(asked: Answering) -> None:
    part: dict[str, Any] = {name: {str(row): ["7", 0.1] for row in (0, 1, 2)} for name in asked.models}
    with pytest.raises(ValueError, match="did not answer every row once for the model 'base'"):
        merge([part], asked)
    rest = {name: {str(row): ["7", 0.1] for row in (3, 5)} for name in asked.models}
    assert merge(json.loads(json.dumps([part, rest])), asked)["base"][5] == ("7", 0.1)


def test_a_rank_that_fails_is_named_with_its_reason(asked: Answering, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    broken = Answering(**{**vars(asked), "processor": str(tmp_path / "gone")})
    with pytest.raises(RankFailedError, match=r"^evaluation failed on rank \d"):
        answer_all(broken, tmp_path / "job", 2, lambda n: None)
