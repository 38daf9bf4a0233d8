"""The configuration files: every profile is complete, valid, and says nothing that is not used."""

from __future__ import annotations

import logging.config
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.config import OmegaConfigLoader

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.pipeline_registry import register_pipelines
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.resolvers import project_path, tracking_uri
from qvl_pipeline.settings import CONFIG_LOADER_ARGS

CONF = Path(__file__).parents[1] / "conf"
PROFILES = sorted(path.parent.name for path in CONF.glob("*/globals.yml"))
OVERLAYS = [profile for profile in PROFILES if profile != "base"]
LAYERS = ["raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"]


def load(profile: str, kind: str) -> dict[str, Any]:
    return OmegaConfigLoader(str(CONF), env=profile, **CONFIG_LOADER_ARGS)[kind]


def own(profile: str) -> dict[str, dict[str, Any]]:
    """Return the values that the files of a profile name themselves, without those that follow the profile."""
    files = [yaml.safe_load(path.read_text()) or {} for path in (CONF / profile).glob("parameters_*.yml")]
    return {name: without_references(block) for blocks in files for name, block in blocks.items()}


def without_references(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if not str(value).startswith("${globals:")}


def test_the_profiles_are_the_four_described() -> None:
    assert PROFILES == ["base", "qwen2_5_vl_7b", "qwen3_vl_8b", "tiny_qwen2_5_vl"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_and_named_like_its_folder(profile: str) -> None:
    assert check_parameters(load(profile, "parameters"), {}, [CONF / profile]).keys() == BLOCKS.keys()
    assert load(profile, "globals")["profile"] == profile


@pytest.mark.parametrize("profile", OVERLAYS)
def test_every_profile_has_the_same_files(profile: str) -> None:
    """DVC needs a file to exist that a stage depends on."""
    parameters = {path.name for path in (CONF / "base").glob("parameters_*.yml")}
    assert {path.name for path in (CONF / profile).iterdir()} == parameters | {"globals.yml"}


@pytest.mark.parametrize("profile", PROFILES)
def test_no_block_is_in_two_files(profile: str) -> None:
    """Kedro merges them without a word, in no certain order."""
    names = [name for path in (CONF / profile).glob("**/*.yml") for name in yaml.safe_load(path.read_text()) or {}]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("profile", ["qwen2_5_vl_7b", "qwen3_vl_8b"])
def test_no_value_of_the_tiny_model_shows_through_in_a_real_one(profile: str) -> None:
    overlay = own(profile)
    missing = [
        f"{block}.{key}" for block, values in own("base").items() for key in values if key not in overlay.get(block, {})
    ]
    assert missing == []


@pytest.mark.parametrize("profile", OVERLAYS)
def test_a_profile_changes_only_what_it_names(profile: str) -> None:
    """Kedro's default strategy would drop the other keys of every block that a profile touches."""
    base, overlay, merged = own("base"), own(profile), load(profile, "parameters")
    assert merged.keys() == base.keys()
    for name, block in base.items():
        expected = block | overlay.get(name, {})
        assert {key: merged[name][key] for key in expected} == expected


GUIDE_COMMON = {
    "sample": {
        "video_backend": "qwen_vl_utils",
        "video_sampling_strategy": "fps",
        "video_max_pixels": 50176,
        "video_max_frames": 512,
        "fps": 1,
    },
    "batching": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "data_parallel_size": 8},
    "train": {
        "weight_decay": 0.0,
        "gradient_checkpointing": True,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "logging_steps": 1,
        "dataloader_num_workers": 8,
        "bf16": True,
        "lr_scheduler_type": "cosine",
        "use_liger_kernel": True,
        "use_rmpad": True,
        "fsdp2": True,
        "sp_ulysses_degree": 1,
    },
}
GUIDE = {
    "qwen2_5_vl_7b": {
        "model": {
            "processor_type": "qwen2_5_vl",
            "processor_name": "Qwen/Qwen2.5-VL-7B-Instruct",
            "load_from_pretrained_path": "Qwen/Qwen2.5-VL-7B-Instruct",
            "attn_implementation": "flash_attention_2",
        },
        "batching": {
            "dataset_type": "vision",
            "packing": True,
            "packing_strategy": "first_fit",
            "packing_length": 16384,
            "num_train_epochs": 1,
            "group_by_length": True,
        },
        "train": {
            "learning_rate": 1.0e-6,
            "save_steps": 100,
            "warmup_ratio": 0.0,
            "freeze_modules": ["visual"],
            "fsdp_config": {
                "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer"],
                "reshard_after_forward": False,
            },
        },
    },
    "qwen3_vl_8b": {
        "model": {
            "processor_type": "qwen3_vl",
            "processor_name": "Qwen/Qwen3-VL-8B-Instruct",
            "load_from_pretrained_path": "Qwen/Qwen3-VL-8B-Instruct",
            "attn_implementation": "flash_attention_2",
        },
        "batching": {
            "dataset_type": "qwen3_vl_iterable",
            "packing": False,
            "packing_length": 51200,
            "filter_overlong": True,
            "max_steps": 1000,
        },
        "train": {
            "learning_rate": 2.0e-4,
            "save_steps": 1000,
            "warmup_ratio": 0.1,
            "freeze_modules": [],
            "fsdp_config": {
                "transformer_layer_cls_to_wrap": ["Qwen3VLTextDecoderLayer"],
                "reshard_after_forward": False,
            },
        },
    },
}


@pytest.mark.parametrize("profile", GUIDE)
def test_the_real_profiles_have_the_values_of_the_guide(profile: str) -> None:
    blocks = check_parameters(load(profile, "parameters"), {}, [CONF / profile])
    for guide in (GUIDE_COMMON, GUIDE[profile]):
        for block, expected in guide.items():
            # Of nested blocks, what the profile sets: the guide is silent on the rest.
            found = blocks[block].model_dump() | blocks[block].model_dump(exclude_unset=True)
            assert {key: found[key] for key in expected} == expected
    assert blocks["train"].report_to == ["mlflow"]  # the guide's wandb is not installed by default


def test_every_catalog_entry_is_used_and_described() -> None:
    catalog = load("base", "catalog")
    used = {name for pipeline in register_pipelines().values() for name in pipeline.datasets()}
    assert set(catalog) == {name for name in used if not name.startswith("params:")}
    for entry in catalog.values():
        assert entry["filepath"].startswith("data/0")
        assert entry["metadata"]["description"].endswith(".")


def test_data_flows_through_the_layers_in_order() -> None:
    """Kedro-Viz shows no layers at all when there is a cycle among them."""
    catalog = load("base", "catalog")
    layer = {name: LAYERS.index(entry["metadata"]["kedro-viz"]["layer"]) for name, entry in catalog.items()}
    for node in (node for node in register_pipelines()["__default__"].nodes if node.outputs):
        latest = max((layer[name] for name in node.inputs if name in layer), default=0)
        assert min(layer[name] for name in node.outputs) >= latest, node.name


def test_every_parameters_block_is_declared_and_read() -> None:
    used = {name for pipeline in register_pipelines().values() for name in pipeline.inputs()}
    assert {f"params:{name}" for name in BLOCKS} == {name for name in used if name.startswith("params:")}
    assert own("base").keys() == BLOCKS.keys()


def test_two_profiles_share_a_dataset_and_nothing_else() -> None:
    base, other = load("base", "catalog"), load("tiny_qwen2_5_vl", "catalog")
    shared = {name for name in base if base[name]["filepath"] == other[name]["filepath"]}
    pipelines = register_pipelines()
    of_the_dataset = pipelines["ingest"].all_outputs() | pipelines["validate"].all_outputs()
    assert shared == of_the_dataset | pipelines["compare"].all_outputs() | pipelines["replay"].all_outputs()


def test_the_database_is_in_the_project_whatever_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.kedro]\n")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    for variable in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    assert project_path("mlartifacts") == str(tmp_path / "mlartifacts")
    assert tracking_uri("mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert tracking_uri("mlflow.db") == f"sqlite:///{tmp_path}/main/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert tracking_uri("mlflow.db") == "https://mlflow.example.org"


def test_the_logging_is_plain_lines_and_no_file() -> None:
    config = yaml.safe_load((CONF / "logging.yml").read_text())
    logging.config.DictConfigurator(config)
    assert [handler["class"] for handler in config["handlers"].values()] == ["logging.StreamHandler"]
    assert config["loggers"]["qvl_pipeline"] == {"level": "INFO"}


def test_torchao_does_not_warn_at_every_stage() -> None:
    code = (
        "import enum, logging.config, yaml; logging.config.dictConfig(yaml.safe_load(open('conf/logging.yml')));"
        "from torch.utils._pytree import register_constant; register_constant(enum.StrEnum('E', 'a'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_base_models_are_downloaded_in_parallel() -> None:
    import qvl_pipeline.settings

    assert qvl_pipeline.settings.ENVIRONMENT["HF_XET_HIGH_PERFORMANCE"] == "1"
    assert os.environ["HF_XET_HIGH_PERFORMANCE"]


def test_nobody_is_told() -> None:
    import qvl_pipeline.settings

    assert qvl_pipeline.settings.HOOKS
    assert os.environ["DO_NOT_TRACK"]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert yaml.safe_load((CONF.parent / ".telemetry").read_text()) == {"consent": False}
    assert "analytics = false" in (CONF.parent / ".dvc" / "config").read_text()
