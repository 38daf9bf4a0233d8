"""dvc.yaml is written by hand; here it is compared with the pipelines, the catalog, the parameters and the imports."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest
import yaml
from dvc.repo import Repo
from dvc.stage import PipelineStage

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.pipeline_registry import STAGES, register_pipelines
from qvl_pipeline.profiles.loader import ProfileLoader
from qvl_pipeline.settings import CONFIG_LOADER_ARGS
from tests.dvc_repository import command, make_repository

ROOT = Path(__file__).parents[1]
PACKAGE = "qvl_pipeline"
# Decide what is shown, recorded or refused, not what a stage writes.
GLUE = {
    "data.progress",
    "data.runner",
    "data.spread",
    "errors",
    "locks",
    "orphans",
    "ports",
    "secrets",
    "tracking.flattening",
    "tracking.lineage.code",
    "tracking.lineage.data_version",
    "tracking.lineage.digests",
    "tracking.lineage.dvc_cache",
    "tracking.mlflow.chain",
    "tracking.mlflow.models",
    "tracking.mlflow.outbox",
    "tracking.mlflow.run",
    "tracking.mlflow.server",
    "tracking.mlflow.sinks",
    "tracking.mlflow.unsent",
    "unfinished",
}
# What is foretold depends on the machine, and one of other hardware takes its place: no result, and no reason to train.
FORETOLD = {"preflight_page", "preflight_report"}
# Started by `train` in processes of its own, not imported.
STARTED = {"train": ["engine"]}


@cache
def stages() -> dict[str, PipelineStage]:
    return {stage.name: stage for stage in Repo(str(ROOT)).index.stages if isinstance(stage, PipelineStage)}


# Makes no pipeline's outputs, but the raw data of the embedded dataset.
DRAW = "draw"
NAMES = sorted(stages().keys() - {DRAW})
# Read as raw files, which are known by the content hashes in this entry.
MEDIA = {"train": {"media_index"}, "evaluate": {"media_index"}}


def pipeline_and_env(name: str) -> tuple[str, str]:
    command = shlex.split(stages()[name].cmd)
    assert command[:3] == ["kedro", "run", "--pipelines"]
    assert command[4] == "--env"
    return command[3], command[5]


def paths(names: set[str], env: str) -> set[str]:
    """Return the files of catalog entries."""
    catalog = ProfileLoader(str(ROOT / "conf"), env=env, **CONFIG_LOADER_ARGS)["catalog"]
    return {catalog[name]["filepath"] for name in names if not name.startswith("params:")}


def blocks(pipeline: str) -> set[str]:
    inputs = register_pipelines()[pipeline].inputs()
    names = {name.removeprefix("params:") for name in inputs if name.startswith("params:")}
    # Say where a stage works and whether it starts, not what it writes: tests/data/test_runner.py.
    return names - {"data_engine", "preflight"}


@cache
def import_graph() -> grimp.ImportGraph:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    for module in [*graph.find_descendants(f"{PACKAGE}.preflight"), f"{PACKAGE}.reports.preflight_page"]:
        graph.remove_module(module)
    return graph


@cache
def imported(pipeline: str) -> set[str]:
    """Return the modules that decide what a stage writes, relative to the package."""
    graph = import_graph()
    roots = [f"{PACKAGE}.{room}" for room in (f"pipelines.{pipeline}", *STARTED.get(pipeline, []))]
    modules = {module for root in roots for module in graph.find_upstream_modules(root, as_package=True)}
    modules |= {module for root in roots for module in [root, *graph.find_descendants(root)]}
    relative = {module.removeprefix(f"{PACKAGE}.") for module in modules}
    # The package `config` holds the models of all blocks; a stage depends on those it reads.
    config = {"config.base"} | {BLOCKS[block].__module__.removeprefix(f"{PACKAGE}.") for block in blocks(pipeline)}
    unread = (
        "families" if "model" not in blocks(pipeline) else None
    )  # facts about models, by which the block is checked
    # What it draws is the output of the stage `draw`, and its input.
    drawing = {module for module in relative if pipeline == "ingest" and module.split(".")[0] == "demo"}
    return {
        module
        for module in relative - GLUE - drawing
        if module.split(".")[0] != unread
        and module_file(module).name != "__init__.py"
        and (not module.startswith("config.") or module in config)
    }


def module_file(module: str) -> Path:
    path = ROOT / "src" / PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def code_dependencies(name: str) -> list[Path]:
    return [ROOT / dep.def_path for dep in stages()[name].deps if dep.def_path.startswith("src/")]


def test_there_is_a_stage_for_every_pipeline_of_every_dataset_and_profile() -> None:
    declared = yaml.safe_load((ROOT / "params.yaml").read_text())
    expected = [f"{stage}@{dataset}" for stage in STAGES[:2] for dataset in declared["datasets"]]
    expected += [f"{stage}@{profile}" for stage in STAGES[2:] for profile in declared["profiles"]]
    assert sorted(expected) == NAMES
    assert list(declared["profiles"]) == ["tiny_qwen3_vl"], "a bare `dvc repro` runs on any machine"


def test_the_declared_datasets_are_those_of_the_profiles() -> None:
    declared = yaml.safe_load((ROOT / "params.yaml").read_text())
    pairs = [(dataset, of["env"]) for dataset, of in declared["datasets"].items()]
    pairs += [(dataset, profile) for profile, dataset in declared["profiles"].items()]
    for dataset, profile in pairs:
        assert yaml.safe_load((ROOT / f"conf/{profile}/globals.yml").read_text())["dataset"] == dataset


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_runs_the_pipeline_of_its_name(name: str) -> None:
    pipeline, env = pipeline_and_env(name)
    stage, member = name.split("@")
    assert pipeline == stage
    declared = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert env == (declared["datasets"][member]["env"] if member in declared["datasets"] else member)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_dependencies(name: str) -> None:
    pipeline, env = pipeline_and_env(name)
    declared = yaml.safe_load((ROOT / "params.yaml").read_text())
    data = {dep.def_path for dep in stages()[name].deps if dep.def_path.startswith("data/")}
    names = register_pipelines()[pipeline].inputs() | MEDIA.get(pipeline, set())
    raw = {declared["datasets"][name.split("@")[1]]["raw"]} if pipeline in ("ingest", "validate") else set()
    assert data == paths(names, env) | raw


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_outputs(name: str) -> None:
    pipeline, env = pipeline_and_env(name)
    made = register_pipelines()[pipeline].all_outputs() - FORETOLD
    assert {out.def_path for out in stages()[name].outs} == paths(made, env)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_the_pipeline_reads(name: str) -> None:
    pipeline, env = pipeline_and_env(name)
    expected = {f"conf/{folder}/parameters.yml": blocks(pipeline) for folder in ("base", env)}
    assert {params.def_path: set(params.params) for params in stages()[name].params} == expected


@pytest.mark.parametrize("name", NAMES)
def test_code_that_a_stage_imports_is_a_dependency(name: str) -> None:
    pipeline, _ = pipeline_and_env(name)
    folders = code_dependencies(name)
    missing = {
        module_file(module).relative_to(ROOT).as_posix()
        for module in imported(pipeline)
        if not any(module_file(module).is_relative_to(folder) for folder in folders)
    }
    assert missing == set(), "add to dvc.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_code_that_a_stage_does_not_import_is_none(name: str) -> None:
    pipeline, _ = pipeline_and_env(name)
    used = {module_file(module) for module in imported(pipeline)}
    code = [path for path in code_dependencies(name) if path.is_dir() or path.suffix == ".py"]
    assert [path for path in code if not any(file.is_relative_to(path) for file in used)] == []


def test_files_that_code_reads_are_dependencies_of_a_stage() -> None:
    """Templates; imports do not tell whose they are."""
    known = [path for name in NAMES for path in code_dependencies(name)]
    others = [
        path
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and ".egg-info" not in str(path)
    ]
    of_no_stage = {"compare.html.j2", "sweep.html.j2", "preflight.html.j2", "known_bad.toml"}
    of_no_stage |= {"slurm.sbatch.j2", "kubeflow.yaml.j2", "skypilot.yaml.j2"}
    assert {path.name for path in others if not any(path.is_relative_to(of) for of in known)} == of_no_stage


def test_the_embedded_dataset_is_drawn_where_it_is_read() -> None:
    draw = stages()[DRAW]
    parameters = yaml.safe_load((ROOT / "conf/tiny_qwen3_vl/parameters.yml").read_text())["ingest"]
    assert [out.def_path for out in draw.outs] == [parameters["demo"]["folder"]]
    (params,) = draw.params
    assert (params.def_path, params.params) == ("conf/tiny_qwen3_vl/parameters.yml", ["ingest.demo"])
    assert set(map(str, code_dependencies(DRAW))) == {
        f"{ROOT}/src/{PACKAGE}/demo",
        f"{ROOT}/src/{PACKAGE}/pipelines/ingest/embedded.py",
    }


@pytest.mark.parametrize("name", NAMES)
def test_versions_of_libraries_are_a_dependency_where_they_decide_numbers(name: str) -> None:
    locked = "requirements.lock" in {dep.def_path for dep in stages()[name].deps}
    assert locked == (pipeline_and_env(name)[0] in ("sample", "tokenize", "train", "evaluate"))


def test_metrics_and_plots_are_declared() -> None:
    evaluate, train = stages()["evaluate@tiny_qwen3_vl"], stages()["train@tiny_qwen3_vl"]
    assert [out.def_path for out in evaluate.outs if out.metric] == [
        f"data/08_reporting/tiny_qwen3_vl/{name}.json" for name in ("lmms_eval", "metrics")
    ]
    assert [out.def_path for out in train.outs if out.plot] == ["data/08_reporting/tiny_qwen3_vl/training_metrics.csv"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_database: str) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_database)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return make_repository(tmp_path / "project")


def test_a_second_repro_changes_nothing(repository: Path) -> None:
    first = command(repository, "dvc repro ingest@digits")
    assert "Running stage 'draw'" in first
    assert "Running stage 'ingest@digits'" in first
    lock = (repository / "dvc.lock").read_text()
    assert "Data and pipelines are up to date." in command(repository, "dvc repro ingest@digits")
    assert (repository / "dvc.lock").read_text() == lock
    assert command(repository, "git status --short") == "?? dvc.lock\n"
    # Of the file with all blocks, only those that a stage reads count.
    parameters = repository / "conf/tiny_qwen3_vl/parameters.yml"
    blocks = yaml.safe_load(parameters.read_text())
    blocks["train"]["learning_rate"] = 0.5
    parameters.write_text("# Another order, too.\n" + yaml.safe_dump(dict(reversed(blocks.items())), sort_keys=False))
    assert "up to date" in command(repository, "dvc status ingest@digits")
    blocks["ingest"]["eval_fraction"] = 0.5
    parameters.write_text(yaml.safe_dump(blocks))
    status = command(repository, "dvc status ingest@digits")
    assert "ingest@digits:" in status
    assert "draw:" not in status, "what is drawn does not depend on the split"


def test_dvc_finds_the_pointer_files_of_raw_data(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    raw = tmp_path / "data" / "01_raw"
    raw.mkdir(parents=True)
    (raw / "own.jsonl").write_text("{}\n")
    for folder in ("pictures", "digits"):
        (raw / folder).mkdir()
        (raw / folder / "a.png").write_text("a")
    dvc = f"{sys.executable} -m dvc"
    for line in ("git init --quiet", f"{dvc} init --quiet"):
        command(tmp_path, line)
    for name in ("own.jsonl", "pictures"):
        hint = command(tmp_path, f"{dvc} add data/01_raw/{name}").partition("git add ")[2].partition("\n")[0]
        command(tmp_path, f"git add {hint}")  # as DVC asks
    status = command(tmp_path, "git status --short --untracked-files=all")
    assert status.count("data/01_raw") == 3, "two pointers, and what ignores the folder; nothing of the embedded data"
    (raw / "own.jsonl").unlink()
    command(tmp_path, f"{dvc} checkout --quiet")  # of all that DVC finds by itself, as `dvc push` and `dvc pull` do
    assert (raw / "own.jsonl").read_text() == "{}\n"
    assert "own.jsonl\n" not in command(tmp_path, "git status --short --untracked-files=all")
