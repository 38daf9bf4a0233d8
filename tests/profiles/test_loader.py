"""The layers of a configuration, and what is said of where a value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.config import MissingConfigException

from qvl_pipeline.profiles.loader import ProfileLoader, profile_names
from qvl_pipeline.settings import CONFIG_LOADER_ARGS

PROFILE = CONFIG_LOADER_ARGS["default_run_env"]
FILES = {
    "base/catalog.yml": "samples: {type: a.B, filepath: shared}\n",
    "base/parameters.yml": "train: {bf16: true, seed: 1, fsdp_config: {cpu_offload: true}}\nmodel: {}\n",
    f"{PROFILE}/globals.yml": f"profile: {PROFILE}\ndataset: digits\n",
    f"{PROFILE}/parameters.yml": "train: {seed: 2, learning_rate: 0.1, save_steps: 5}\n",
    "mine/globals.yml": "profile: mine\ndataset: digits\n",
    "mine/parameters.yml": "train: {seed: 20, learning_rate: 0.2, save_steps: 6}\n",
}
LOCAL = {
    "local/parameters.yml": "train: {seed: 3, learning_rate: 0.3, fsdp_config: {hsdp_shard_size: 4}}\n",
    "local/credentials.yml": "s3: {key: me}\n",
    "local/catalog.yml": "samples: {type: a.B, filepath: own}\n",
    "local/globals.yml": "dataset: big\n",
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    write(tmp_path / "conf", FILES)
    return tmp_path / "conf"


def write(conf: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        (conf / name).write_text(text)


def loader(conf: Path, env: str | None, runtime: dict[str, Any] | None = None) -> ProfileLoader:
    return ProfileLoader(str(conf), env=env, runtime_params=runtime, **CONFIG_LOADER_ARGS)


@pytest.mark.parametrize("env", [None, "mine"])
def test_the_command_line_goes_before_the_person_the_profile_and_base(conf: Path, env: str | None) -> None:
    write(conf, LOCAL)
    found = loader(conf, env, {"train": {"seed": 4}})
    profile = env or PROFILE
    assert found["parameters"]["train"] == {
        "bf16": True,
        "seed": 4,
        "learning_rate": 0.3,
        "save_steps": 6 if env else 5,
        "fsdp_config": {"cpu_offload": True, "hsdp_shard_size": 4},
    }
    assert found["globals"] == {"profile": profile, "dataset": "big"}
    assert found["catalog"]["samples"]["filepath"] == "own"
    assert found["credentials"] == {"s3": {"key": "me"}}
    expected = {
        "seed": "--params",
        "learning_rate": "conf/local/parameters.yml",
        "save_steps": f"conf/{profile}/parameters.yml",
        "bf16": "conf/base/parameters.yml",
        "optim": "default",
    }
    assert {key: found.origins.of(("train", key)) for key in expected} == expected


@pytest.mark.parametrize("env", [None, "mine"])
def test_without_a_folder_of_ones_own_nothing_changes(conf: Path, env: str | None) -> None:
    found = loader(conf, env)
    assert found["parameters"]["train"]["seed"] == (20 if env else 2)
    with pytest.raises(MissingConfigException):
        found["credentials"]
    with pytest.raises(KeyError):
        found["nonsense"]


def test_what_a_notebook_sets_is_taken(conf: Path) -> None:
    write(conf, LOCAL)
    found = loader(conf, None)
    found["parameters"] = {"train": {}}
    assert found["parameters"] == {"train": {}}


def test_a_person_may_have_several_files_and_folders_of_parameters(conf: Path) -> None:
    files = {"parameters_train.yml": "train: {seed: 7}\n", "parameters/model.json": '{"model": {"a": 1}}'}
    write(conf / "local", files)
    found = loader(conf, None)
    assert (found["parameters"]["train"]["seed"], found["parameters"]["model"]) == (7, {"a": 1})
    assert found.origins.of(("train", "seed")) == "conf/local/parameters_train.yml"
    assert found.origins.of(("model", "a")) == "conf/local/parameters/model.json"


def test_base_and_local_are_no_profiles(conf: Path) -> None:
    write(conf, LOCAL | {"base/globals.yml": yaml.safe_dump({"dataset": "a"})})
    assert profile_names(conf) == sorted(["mine", PROFILE])
