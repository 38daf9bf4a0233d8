"""The configuration files: every profile is complete, valid, and says nothing that is not used."""

from __future__ import annotations

import logging.config
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.facts import MODELS
from qvl_pipeline.pipeline_registry import STAGES, register_pipelines
from qvl_pipeline.preflight.hardware import named_hardware
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.loader import ProfileLoader, profile_names
from qvl_pipeline.profiles.resolvers import project_path, tracking_uri
from qvl_pipeline.settings import CONFIG_LOADER_ARGS
from tests.kedro_project import ADAPTED, REAL, SHIPPED, TINY, profile_named

CONF = Path(__file__).parents[1] / "conf"
# Lines that fit on one screen.
SCREEN = 45
LAYERS = ["raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"]


def loader(profile: str) -> ProfileLoader:
    return ProfileLoader(str(CONF), env=profile, **CONFIG_LOADER_ARGS)


def load(profile: str, kind: str) -> dict[str, Any]:
    return loader(profile)[kind]


def own(profile: str) -> dict[str, dict[str, Any]]:
    """Return the values that the files of a profile name themselves, without those that follow the profile."""
    blocks = yaml.safe_load((CONF / profile / "parameters.yml").read_text())
    return {name: without_references(block) for name, block in blocks.items()}


def without_references(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if not str(value).startswith("${globals:")}


def test_the_shipped_profiles_are_there() -> None:
    assert set(SHIPPED) <= set(profile_names(CONF))
    assert CONFIG_LOADER_ARGS["default_run_env"] == "tiny_qwen3_vl"


@pytest.mark.parametrize("profile", SHIPPED)
def test_every_profile_is_valid_and_named_like_its_folder(profile: str) -> None:
    assert check_parameters(load(profile, "parameters"), loader(profile).origins).keys() == BLOCKS.keys()
    assert load(profile, "globals")["profile"] == profile


@pytest.mark.parametrize("profile", SHIPPED)
def test_a_profile_is_two_files_that_fit_on_one_screen(profile: str) -> None:
    files = sorted((CONF / profile).iterdir())
    assert [path.name for path in files] == ["globals.yml", "parameters.yml"]
    assert sum(len(path.read_text().splitlines()) for path in files) <= SCREEN


@pytest.mark.parametrize("profile", SHIPPED)
def test_a_profile_has_every_key_that_dvc_needs(profile: str) -> None:
    stages = {name for stage in STAGES for name in register_pipelines()[stage].inputs()}
    needed = {name.removeprefix("params:") for name in stages if name.startswith("params:")} - {
        "data_engine",
        "preflight",
    }
    assert needed <= own(profile).keys()


def test_base_holds_nothing_of_a_model_or_a_dataset() -> None:
    assert sorted(path.name for path in (CONF / "base").iterdir()) == ["catalog.yml", "mlflow.yml", "parameters.yml"]
    assert {name: sorted(block) for name, block in own("base").items() if block} == {
        "train": ["bf16", "dataloader_num_workers", "export_dtype", "gradient_checkpointing", "use_liger_kernel"]
    }


@pytest.mark.parametrize("profile", TINY)
def test_no_value_for_real_models_shows_through_in_a_tiny_one(profile: str) -> None:
    assert own("base")["train"].keys() <= own(profile)["train"].keys()


def test_the_tiny_profiles_prepare_their_dataset_alike() -> None:
    for profile in ("tiny_qwen2_5_vl", "tiny_qwen3_5", "tiny_qwen3_vl_moe"):
        one, other = own("tiny_qwen3_vl"), own(profile)
        assert (one["ingest"], one["validate"]) == (other["ingest"], other["validate"])
        differing = {f"{name}.{key}" for name in one for key in one[name] if one[name][key] != other[name][key]}
        assert {"model.processor_type"} <= differing <= {"model.processor_type", "batching.num_train_epochs"}


GUIDE_COMMON = {
    "sample": {
        "video_backend": "qwen_vl_utils",
        "video_sampling_strategy": "fps",
        "video_max_pixels": 50176,
        "video_max_frames": 512,
        "fps": 1,
    },
    "batching": {"per_device_train_batch_size": 1},
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
    },
}
# Of every size of a family, as the guide's example of that family has it.
GUIDE_FAMILY = {
    "qwen2_5_vl": {
        "model": {"processor_type": "qwen2_5_vl", "attn_implementation": "flash_attention_2"},
        "batching": {
            "dataset_type": "vision",
            "packing": True,
            "packing_strategy": "first_fit",
            "packing_length": 16384,
            "num_train_epochs": 1,
            "group_by_length": True,
        },
        "train": {"learning_rate": 1.0e-6, "save_steps": 100, "warmup_ratio": 0.0, "freeze_modules": ["visual"]},
    },
    "qwen3_vl": {
        "model": {"processor_type": "qwen3_vl", "attn_implementation": "flash_attention_2"},
        "batching": {
            "dataset_type": "qwen3_vl_iterable",
            "packing": False,
            "packing_length": 51200,
            "filter_overlong": True,
            "max_steps": 1000,
        },
        "train": {"learning_rate": 2.0e-4, "save_steps": 1000, "warmup_ratio": 0.1, "freeze_modules": []},
    },
}
GUIDE_LAYER = {"qwen2_5_vl": "Qwen2_5_VLDecoderLayer", "qwen3_vl": "Qwen3VLTextDecoderLayer"}
SIZES = [name for name in REAL if name.startswith("qwen")]
# What the guide's two values do not fit, and what is said instead.
LARGE = {"qwen2_5_vl_72b": 1, "qwen3_vl_32b": 2}


def family_of(profile: str) -> str:
    return profile.rpartition("_")[0]


@pytest.mark.parametrize("profile", [name for name in SIZES if family_of(name) in GUIDE_FAMILY])
def test_the_real_profiles_have_the_values_of_the_guide(profile: str) -> None:
    blocks = check_parameters(load(profile, "parameters"), loader(profile).origins)
    family = family_of(profile)
    layers = {"transformer_layer_cls_to_wrap": [GUIDE_LAYER[family]], "reshard_after_forward": profile in LARGE}
    own_values = {"train": {"fsdp_config": layers, "sp_ulysses_degree": LARGE.get(profile, 1)}}
    for guide in (GUIDE_COMMON, GUIDE_FAMILY[family], own_values):
        for block, expected in guide.items():
            # Of nested blocks, what the profile sets: the guide is silent on the rest.
            found = blocks[block].model_dump() | blocks[block].model_dump(exclude_unset=True)
            assert {key: found[key] for key in expected} == expected
    assert blocks["train"].report_to == ["mlflow"]  # the guide's wandb is not installed by default


@pytest.mark.parametrize("profile", [*REAL, *ADAPTED, "qwen2_5_omni_7b"])
def test_a_real_profile_is_of_a_known_model_and_says_for_which_hardware(profile: str) -> None:
    blocks = check_parameters(load(profile, "parameters"), loader(profile).origins)
    facts = MODELS[blocks["model"].load_from_pretrained_path]
    assert facts.family == blocks["model"].processor_type
    assert blocks["model"].processor_name == facts.name
    assert blocks["train"].export_dtype == "bf16"
    if profile in SIZES:
        assert profile == profile_named(facts)
        # The global batch of the guide's eight GPUs, or more.
        assert blocks["batching"].packs_per_step >= 8
    lines = (CONF / profile / "parameters.yml").read_text().splitlines()
    (hardware,) = [line for line in lines if line.startswith("# Hardware: ")]
    named = named_hardware(re.fullmatch(r"# Hardware: (\S+), .+", hardware)[1])
    assert named.ranks == blocks["batching"].data_parallel_size * blocks["train"].sp_ulysses_degree


def test_long_video_has_room_for_an_hour_of_frames() -> None:
    blocks = check_parameters(load("long_video", "parameters"), loader("long_video").origins)
    sample, batching = blocks["sample"], blocks["batching"]
    assert sample.video_max_frames / sample.fps > 3600
    assert sample.video_total_pixels >= sample.video_max_frames * sample.video_max_pixels
    facts = MODELS[blocks["model"].load_from_pretrained_path]
    assert batching.packing_length == facts.context == 256 * 1024
    pairs, pixels = sample.video_max_frames // facts.vision.temporal_patch_size, FAMILIES["qwen3_vl"].token_pixels
    # Of each pair of frames the features, its second in text (about nine tokens), and two that enclose them.
    assert pairs * (sample.video_max_pixels // pixels + 11) < 0.9 * batching.packing_length


@pytest.mark.parametrize(
    ("profile", "quantised"), [("qwen2_5_vl_7b_lora", False), ("qwen3_vl_8b_lora", False), ("qwen3_vl_8b_qlora", True)]
)
def test_a_profile_of_adapters_has_the_model_and_data_of_the_full_one(profile: str, quantised: bool) -> None:
    blocks = check_parameters(load(profile, "parameters"), loader(profile).origins)
    assert (blocks["adapter"].type, blocks["adapter"].quantizes) == ("lora", quantised)
    full = profile.rpartition("_")[0]
    assert all(own(profile)[block] == own(full)[block] for block in ("ingest", "validate", "data_engine"))
    assert own(profile)["model"].items() <= own(full)["model"].items()


def test_every_catalog_entry_is_used_and_described() -> None:
    catalog = load("tiny_qwen3_vl", "catalog")
    used = {name for pipeline in register_pipelines().values() for name in pipeline.datasets()}
    assert set(catalog) == {name for name in used if not name.startswith("params:")}
    for entry in catalog.values():
        assert entry["filepath"].startswith("data/0")
        assert entry["metadata"]["description"].endswith(".")


def test_data_flows_through_the_layers_in_order() -> None:
    """Kedro-Viz shows no layers at all when there is a cycle among them."""
    catalog = load("tiny_qwen3_vl", "catalog")
    layer = {name: LAYERS.index(entry["metadata"]["kedro-viz"]["layer"]) for name, entry in catalog.items()}
    for node in (node for node in register_pipelines()["__default__"].nodes if node.outputs):
        latest = max((layer[name] for name in node.inputs if name in layer), default=0)
        assert min(layer[name] for name in node.outputs) >= latest, node.name


def test_every_parameters_block_is_declared_and_read() -> None:
    used = {name for pipeline in register_pipelines().values() for name in pipeline.inputs()}
    assert {f"params:{name}" for name in BLOCKS} == {name for name in used if name.startswith("params:")}
    assert own("base").keys() == BLOCKS.keys()


def test_two_profiles_share_a_dataset_and_nothing_else() -> None:
    base, other = load("tiny_qwen3_vl", "catalog"), load("tiny_qwen2_5_vl", "catalog")
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
