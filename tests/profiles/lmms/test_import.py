"""`kedro guide import`: the guide's examples and every form of a file become profiles; no key is lost on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from qvl_pipeline.cli import cli
from qvl_pipeline.config import BLOCKS
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.lmms.mapping import map_entries
from qvl_pipeline.profiles.lmms.reading import PARTS, read_entries
from qvl_pipeline.profiles.lmms.rules import To, Together
from qvl_pipeline.profiles.loader import ProfileLoader
from qvl_pipeline.settings import CONFIG_LOADER_ARGS

EXAMPLES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
# Where the guide's keys are here. Those that are not named keep their name, in the block `train`.
ELSEWHERE = {
    **dict.fromkeys(("processor_name", "processor_type", "load_from_pretrained_path", "attn_implementation"), "model"),
    **dict.fromkeys(("dataset_type", "packing", "packing_strategy", "packing_length", "filter_overlong"), "batching"),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), "batching"),
    **dict.fromkeys(("num_train_epochs", "max_steps", "group_by_length"), "batching"),
    **dict.fromkeys(
        ("video_backend", "video_sampling_strategy", "video_max_pixels", "video_max_frames", "fps"), "sample"
    ),
    **dict.fromkeys(("dataset_format", "datasets"), "ingest"),
}
DECIDE_NOTHING = {"trainer_type", "output_dir", "run_name"}
MINIMAL = {
    "dataset_config": {
        "dataset_type": "vision",
        "datasets": [{"path": "a.json"}],
        "processor_config": {"processor_name": "Qwen/Qwen2.5-VL-7B-Instruct", "processor_type": "qwen2_5_vl"},
        "packing": True,
        "packing_strategy": "first_fit",
    },
    "model_config": {"load_from_pretrained_path": "Qwen/Qwen2.5-VL-7B-Instruct"},
    "trainer_args": {"bf16": True, "max_steps": 10},
}


def guide_import(file: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["guide", "import", str(file), *options])


def blocks_of(project: Path, profile: str) -> dict[str, Any]:
    loader = ProfileLoader(str(project / "conf"), env=profile, **CONFIG_LOADER_ARGS)
    return check_parameters(loader["parameters"], loader.origins)


def own(project: Path, profile: str) -> dict[str, Any]:
    return yaml.safe_load((project / "conf" / profile / "parameters.yml").read_text())


def text(project: Path, profile: str) -> str:
    return (project / "conf" / profile / "parameters.yml").read_text()


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def changed(part: str, **values: Any) -> dict[str, Any]:
    """Return the minimal configuration with other values; `None` takes one out."""
    if not part:
        return {**MINIMAL, **values}
    if part == "processor_config":
        inner = MINIMAL["dataset_config"][part] | values
        return {**MINIMAL, "dataset_config": MINIMAL["dataset_config"] | {part: inner}}
    return {**MINIMAL, part: MINIMAL[part] | values}


def leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in ("dataset_config", "processor_config", "model_config"):
            yield from leaves(value)
        else:
            yield key, value


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_guides_example_is_found_again_key_by_key(project: Path, example: str) -> None:
    file = EXAMPLES[example]
    done = guide_import(file, "--name", "mine")
    assert done.exit_code == 0, done.output
    (entry,) = yaml.safe_load(file.read_text())
    blocks, written = blocks_of(project, "mine"), text(project, "mine")
    seen = set()
    for key, value in leaves(entry["config"]):
        seen.add(key)
        if key in DECIDE_NOTHING:
            assert f"#   {key}: {value}: " in written
            assert f"  {key}: {value}: " in done.output
            continue
        block = ELSEWHERE.get(key, "train")
        found = getattr(blocks[block], key)
        if key == "datasets":
            ours = [
                {"path": source.path, "data_folder": source.data_folder, "data_type": source.data_type}
                for source in found
            ]
            assert ours == value
        elif key == "fsdp_config":
            assert {inner: getattr(found, inner) for inner in value} == value
        elif key == "report_to":
            assert found[0] == "mlflow"
            assert f"# report_to: {value}" in written
        else:
            assert found == value, key
            assert key in own(project, "mine")[block], "written, and not by luck the default"
    assert len(seen) >= 38
    assert blocks["batching"].data_parallel_size == 8


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_guides_example_is_the_shipped_profile_of_that_model(project: Path, example: str) -> None:
    assert guide_import(EXAMPLES[example], "--name", "mine").exit_code == 0
    shipped = {"qwen2_5_vl": "qwen2_5_vl_7b", "qwen3_vl": "qwen3_vl_8b"}[example]
    one, other = blocks_of(project, "mine"), blocks_of(project, shipped)
    differing = {
        f"{block}.{key}"
        for block in ("sample", "model", "batching", "train")
        for key, value in one[block].model_dump().items()
        if value != other[block].model_dump()[key]
    }
    # LMMS Engine's own minima, where the shipped profile keeps frames from becoming unreadable.
    assert differing == {"sample.video_min_frames", "sample.video_min_pixels"}


def test_all_forms_of_a_file_say_the_same(project: Path, tmp_path: Path) -> None:
    (entry,) = yaml.safe_load(EXAMPLES["qwen3_vl"].read_text())
    flat = entry["config"]
    top = {key: flat[key] for key in ("trainer_type", "dataset_config", "model_config")}
    arguments = {key: value for key, value in flat.items() if key not in top}
    nested = {**top, "trainer_args": arguments, "extra_kwargs": {}, "config_yaml": None}
    all_flat = dict(leaves(flat))
    results = []
    for number, content in enumerate(([entry], flat, nested, all_flat)):
        done = guide_import(write(tmp_path, content), "--name", f"form_{number}")
        assert done.exit_code == 0, done.output
        results.append(own(project, f"form_{number}"))
    assert all(result == results[0] for result in results)


def test_what_a_file_does_not_say_is_what_lmms_engine_does(project: Path, tmp_path: Path) -> None:
    content = {**MINIMAL, "trainer_args": {}, "dataset_config": dict(MINIMAL["dataset_config"])}
    del content["dataset_config"]["packing"], content["dataset_config"]["packing_strategy"]
    done = guide_import(write(tmp_path, content), "--name", "mine", "--data-parallel-size", "2")
    assert done.exit_code == 0, done.output
    blocks = blocks_of(project, "mine")
    expected = {
        "train": {"learning_rate": 5e-5, "lr_scheduler_type": "linear", "save_steps": 500, "bf16": False},
        "batching": {
            "packing": False,
            "packing_length": 32000,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 3,
        },
        "sample": {"fps": 1, "video_min_pixels": 3136, "video_max_pixels": 602112, "video_max_frames": 768},
        "model": {"attn_implementation": "sdpa"},
    }
    for block, values in expected.items():
        assert {key: getattr(blocks[block], key) for key in values} == values
    assert blocks["train"].gradient_checkpointing is False
    assert blocks["train"].use_liger_kernel is False
    assert "  learning_rate: 5.0e-05  # LMMS Engine's default\n" in text(project, "mine")


@pytest.mark.parametrize(
    ("part", "values", "block", "expected", "comment"),
    [
        ("trainer_args", {"use_muon": True}, "train", {"optim": "muon"}, "use_muon: True"),
        ("trainer_args", {"data_seed": 7}, "batching", {"seed": 7}, "data_seed"),
        ("trainer_args", {"lr_scheduler_type": "cosine"}, "train", {"lr_scheduler_type": "cosine"}, ""),
        (
            "trainer_args",
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr_ratio": 0.1}},
            "train",
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            "lr_scheduler_type: cosine, with min_lr_ratio",
        ),
        (
            "trainer_args",
            {"freeze_modules": ["model.visual", "lm_head"]},
            "train",
            {"freeze_modules": ["visual", "head"]},
            "",
        ),
        (
            "trainer_args",
            {"enable_memory_snapshot": True},
            "train",
            {"memory_snapshot_on_oom": True},
            "enable_memory_snap",
        ),
        (
            "trainer_args",
            {"overwrite_output_dir": True},
            "train",
            {"resume_from_checkpoint": "none"},
            "overwrite_output_dir",
        ),
        ("trainer_args", {"optim": "adamw_torch"}, "train", {"optim": "adamw_torch"}, ""),
        ("trainer_args", {"fsdp_config": {"hsdp_shard_size": 8}}, "train", {}, ""),
        ("trainer_args", {"report_to": "none"}, "train", {"report_to": ["none"]}, "report_to: none"),
        ("trainer_args", {"max_steps": -1, "num_train_epochs": 2.0}, "batching", {"num_train_epochs": 2}, ""),
        (
            "dataset_config",
            {"dataset_type": "vision_iterable", "shuffle": False},
            "batching",
            {"shuffle_buffer_size": 1},
            "shuffle: False",
        ),
        (
            "dataset_config",
            {"video_sampling_strategy": "frame_num", "frame_num": 16, "fps": 1},
            "sample",
            {"frame_num": 16, "video_sampling_strategy": "frame_num"},
            "dataset_config.fps: 1: video_sampling_strategy frame_num has no use for it",
        ),
        (
            "dataset_config",
            {"datasets": None, "dataset_format": "jsonl", "dataset_path": "b.jsonl"},
            "ingest",
            {},
            "dataset_path: b.jsonl",
        ),
        (
            "processor_config",
            {"extra_kwargs": {"image_max_pixels": 200704}},
            "model",
            {"image_max_pixels": 200704},
            "",
        ),
    ],
)
def test_a_key_of_another_name_or_place_is_found_again(
    project: Path, tmp_path: Path, part: str, values: dict, block: str, expected: dict, comment: str
) -> None:
    done = guide_import(write(tmp_path, changed(part, **values)), "--name", "mine")
    assert done.exit_code == 0, done.output
    found = blocks_of(project, "mine")[block]
    assert {key: getattr(found, key) for key in expected} == expected
    assert comment in text(project, "mine")
    if "fsdp_config" in values:
        assert found.fsdp_config.hsdp_shard_size == 8
    if "dataset_path" in values:
        assert [(source.path, source.data_type) for source in found.datasets] == [("b.jsonl", "jsonl")]


@pytest.mark.parametrize(
    ("part", "values", "sentence"),
    [
        (
            "trainer_args",
            {"learning_rat": 1},
            "trainer_args.learning_rat is no key of LMMS Engine: did you mean 'learning_rate'?",
        ),
        (
            "trainer_args",
            {"packing": True},
            "trainer_args.packing is no key of LMMS Engine in trainer_args: it belongs into dataset_config",
        ),
        (
            "trainer_args",
            {"tp_degree": 2},
            "trainer_args.tp_degree: 2 cannot be kept to: there is no tensor parallelism",
        ),
        ("trainer_args", {"neftune_noise_alpha": 5}, "does nothing with it"),
        ("trainer_args", {"eval_config": {"tasks": ["x"]}}, "no server of lmms-eval is asked"),
        ("trainer_args", {"lr_scheduler_type": "wsd"}, "wsd is warmup_stable_decay here, which wants num_decay_steps"),
        ("trainer_args", {"resume_from_checkpoint": "out/checkpoint-5"}, "checkpoints cannot be read here"),
        ("trainer_args", {"max_steps": -1, "num_train_epochs": 1.5}, "passes are whole here"),
        ("trainer_args", {"fsdp2": False}, "FSDP2 is the only strategy here"),
        ("trainer_args", {"bf16": True, "fp16": True}, "bf16 and fp16 are both true: choose one"),
        ("trainer_args", {"fsdp_config": 3}, "fsdp_config must have keys of its own, but is 3"),
        ("", {"trainer_type": "hf_trainer"}, "trainer_type: 'hf_trainer' cannot be kept to"),
        ("", {"learning_rate": 1e-3, "trainer_args": {"learning_rate": 1e-4}}, "say different things: keep the one"),
        ("dataset_config", {"dataset_type": "vision_audio"}, "vision_audio is for models that hear"),
        ("dataset_config", {"dataset_type": "qwen_omni_iterable"}, "sound is not read as a stream here"),
        ("dataset_config", {"packing_strategy": "window_100"}, "windows of rows are not packed here"),
        ("dataset_config", {"max_length": 100}, "samples have one limit here: write it as packing_length"),
        ("dataset_config", {"object_storage": "gcs"}, "may be URLs"),
        ("dataset_config", {"shuffle": False}, "the plan of a map-style dataset is always shuffled"),
        ("dataset_config", {"datasets": None}, "neither datasets nor dataset_path"),
        ("dataset_config", {"datasets": [{"path": "a", "weight": 2}]}, r"datasets[0].weight is no key of LMMS Engine"),
        ("dataset_config", {"extra_kwargs": {"packing_kwargs": {}}}, "take no more arguments here"),
        ("dataset_config", {"eval_dataset_path": "b.json"}, "each with `split: eval`"),
        ("dataset_config", {"video_max_pixels": 1000}, "video_min_pixels (3136) is above video_max_pixels"),
        ("processor_config", {"processor_type": "qwen2_vl"}, "the families here are"),
        (
            "processor_config",
            {"extra_kwargs": {"video_max_pixels": 50}},
            "video_min_pixels (3136) is above video_max_pixels (50)",
        ),
        ("model_config", {"load_from_config": {"model_type": "x"}}, "only tiny models start without weights"),
        ("model_config", {"monkey_patch_kwargs": {"rope": True}}, "nothing is patched here"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_with_the_reason(
    project: Path, tmp_path: Path, part: str, values: dict, sentence: str
) -> None:
    done = guide_import(write(tmp_path, changed(part, **values)), "--name", "mine")
    assert done.exit_code == 1, done.output
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not (project / "conf" / "mine").exists()


def test_all_reasons_are_named_at_once(project: Path, tmp_path: Path) -> None:
    content = changed("trainer_args", tp_degree=2, deepspeed="zero3.json", carbon_intensity=0.4)
    lines = guide_import(write(tmp_path, content), "--name", "mine").output.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "trainer_args.carbon_intensity",
        "trainer_args.deepspeed",
        "trainer_args.tp_degree",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [", "cannot be read as YAML"),
        ("packing: true\npacking: false\n", "found duplicate key"),
        ("[]", "is a list of 0 configurations"),
        ("- {type: trainer, config: {}}\n- {type: trainer, config: {}}", "is a list of 2 configurations"),
        ("- {type: evaluator, config: {}}", "entry must be `type: trainer`"),
        ("text", "is no configuration of LMMS Engine"),
    ],
)
def test_a_file_that_is_none_is_refused(project: Path, tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    done = guide_import(file, "--name", "mine")
    assert (done.exit_code, sentence in done.output) == (1, True), done.output
    assert "cannot be read" in guide_import(tmp_path / "no.yaml", "--name", "mine").output


def test_an_import_is_repeated_and_an_edited_profile_is_left_alone(project: Path, tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    assert guide_import(file, "--name", "mine").exit_code == 0
    assert "is what" in guide_import(file, "--name", "mine").output
    path = project / "conf" / "mine" / "parameters.yml"
    path.write_text(path.read_text().replace("max_steps: 10", "max_steps: 11"))
    done = guide_import(file, "--name", "mine")
    assert (done.exit_code, "there is a profile 'mine' already" in done.output) == (1, True)
    assert "max_steps: 11" in path.read_text()
    assert "--name" in guide_import(file).output


def test_every_rule_leads_to_a_parameter_and_no_key_has_two(tmp_path: Path) -> None:
    for rules in PARTS.values():
        for name, rule in rules.items():
            if isinstance(rule, To):
                block, *inner = rule.key.split(".")
                model: Any = BLOCKS[block]
                for part in inner[:-1]:
                    model = type(model.model_fields[part].default)
                assert inner[-1] in model.model_fields, name
    together = {name for rules in PARTS.values() for name, rule in rules.items() if isinstance(rule, Together)}
    # Each of them makes a difference, or is refused.
    entries = read_entries(write(tmp_path, MINIMAL))
    assert together - entries.keys() == {
        *("dataset_format", "dataset_path", "eval_dataset_path", "shuffle", "frame_num", "fps"),
        *("num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs"),
    }
    assert json.loads(json.dumps(map_entries(entries, tmp_path).values))["ingest"]["datasets"]
