from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvl_pipeline.config import BLOCKS, IngestConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.origins import Origins


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A configuration with a base and a profile `wide`."""
    for file, text in {
        "conf/base/parameters_ingest.yml": "ingest:\n  datasets:\n  - {name: a, path: a.json, data_type: json}\n",
        "conf/base/parameters_model.yml": "model:\n  processor_type: qwen3_vl\n",
        "conf/base/parameters_train.yml": "train:\n  learning_rate: 1.0\n  weight_decay: 0.0\n",
        "conf/wide/parameters_train.yml": "train:\n  learning_rate: 0.1\n",
        "conf/wide/parameters_model.yml": "# As in conf/base.\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path / "conf"


def parameters(**blocks: Any) -> dict[str, Any]:
    source = {"name": "a", "path": "a.json", "data_type": "json"}
    return {"ingest": {"datasets": [source]}, "model": {"processor_type": "qwen3_vl"}, **blocks}


def message(conf: Path, runtime: dict[str, Any] | None = None, **blocks: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_parameters(parameters(**blocks), Origins(runtime or {}, [conf / "wide", conf / "base"]))
    return str(caught.value)


def test_good_parameters_are_models_with_every_block(conf: Path) -> None:
    blocks = check_parameters(parameters(), Origins({}, [conf / "base"]))
    assert {name: type(block) for name, block in blocks.items()} == BLOCKS
    assert isinstance(blocks["ingest"], IngestConfig)


def test_a_wrong_value_names_key_value_and_the_file_that_sets_it(conf: Path) -> None:
    assert "train.learning_rate: Input should be greater than 0, got -1 (conf/wide/parameters_train.yml)" in message(
        conf, train={"learning_rate": -1}
    )
    assert (
        "train.weight_decay: Input should be greater than or equal to 0, got -1 (conf/base/parameters_train.yml)"
        in (message(conf, train={"weight_decay": -1}))
    )


def test_a_value_from_the_command_line_is_said_to_be_from_there(conf: Path) -> None:
    runtime = {"train": {"learning_rate": -1}}
    assert "got -1 (--params)" in message(conf, runtime, train={"learning_rate": -1})


def test_an_unknown_key_names_the_nearest(conf: Path) -> None:
    text = message(conf, train={"learning_rat": 1})
    assert "train: unknown key 'learning_rat': did you mean 'learning_rate'? (conf/wide/parameters_train.yml)" in text


def test_an_unknown_block_is_not_ignored(conf: Path) -> None:
    assert "trian: unknown block: did you mean 'train'?" in message(conf, trian={})
    assert "xyz: unknown block: known blocks: ingest, validate" in message(conf, xyz={})


def test_all_problems_are_listed_at_once(conf: Path) -> None:
    text = message(conf, train={"learning_rate": -1, "seed": "x"}, model={})
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "model.processor_type",
        "train.learning_rate",
        "train.seed",
    ]


def test_alternatives_of_one_key_are_one_line(conf: Path) -> None:
    (line,) = message(conf, train={"nproc_per_node": "all"}).splitlines()[1:]
    assert line.startswith("  train.nproc_per_node: Input should be a valid integer")
    assert "or Input should be 'auto'" in line


def test_a_key_inside_a_list_is_named_by_its_place(conf: Path) -> None:
    source = {"name": "a", "path": "a.json", "data_type": "xml"}
    text = message(conf, ingest={"datasets": [source]})
    assert (
        "ingest.datasets.0.data_type: Input should be 'parquet', 'json', 'jsonl', 'csv', 'arrow', 'hf_dataset' or "
        "'webdataset', got" in text
    )
    assert "(conf/base/parameters_ingest.yml)" in text


def test_a_cross_check_names_its_block(conf: Path) -> None:
    text = message(conf, sample={"video_min_frames": 9, "video_max_frames": 2})
    assert "sample: video_min_frames (9) is above video_max_frames (2)" in text
    assert "(add it to a parameters file in conf/wide or conf/base)" in text


def test_a_block_that_is_no_mapping_is_refused(conf: Path) -> None:
    assert "train: Input should be a valid dictionary" in message(conf, train=3)


def test_who_is_to_hear_must_be_able_to(conf: Path) -> None:
    """The guide's `vision_audio` with a model that has no ears: a sentence that names one that has."""
    text = message(conf, batching={"dataset_type": "vision_audio"}, sample={"use_audio_in_video": True})
    lines = text.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["batching.dataset_type", "sample.use_audio_in_video"]
    assert all("model.processor_type qwen3_vl does not hear: use qwen2_5_omni" in line for line in lines)
    hears = {"model": {"processor_type": "qwen2_5_omni"}, "sample": {"use_audio_in_video": True}}
    check_parameters(parameters(**hears, batching={"dataset_type": "vision_audio"}), Origins({}, [conf / "base"]))
