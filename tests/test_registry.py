from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kedro.framework.project import pipelines
from kedro.validation.type_extractor import TypeExtractor

from qvl_pipeline.cli.selection import check_selection
from qvl_pipeline.config import BLOCKS
from qvl_pipeline.errors import UserError
from qvl_pipeline.pipeline_registry import STAGES, TOOLS, register_pipelines
from tests.kedro_project import make_project

# Each of these takes longer to import than Kedro itself.
HEAVY = {"daft", "matplotlib", "mlflow", "sklearn", "torch", "transformers"}


def test_the_default_is_all_stages_in_order() -> None:
    registered = register_pipelines()
    assert list(registered) == [*STAGES, *TOOLS, "__default__"]
    assert {node.name for node in registered["__default__"].nodes} == {
        node.name for stage in STAGES for node in registered[stage].nodes
    }
    written: set[str] = set()
    for stage in STAGES:
        needed = {name for name in registered[stage].inputs() if not name.startswith("params:")}
        assert needed <= written, f"{stage} reads what a later stage writes"
        written |= registered[stage].all_outputs()


def test_every_stage_is_one_box_of_kedro_viz_and_entries_keep_their_names() -> None:
    registered = register_pipelines()
    for stage in STAGES:
        assert {node.namespace for node in registered[stage].nodes} == {stage}
        assert not [name for name in registered[stage].datasets() if "." in name]


def test_a_node_is_found_by_its_name_in_the_stage() -> None:
    pipelines.configure("qvl_pipeline.pipeline_registry")
    pipelines.set_requested(None)
    check_selection({"pipelines": [], "node_names": ["train.train"]})
    with pytest.raises(UserError, match=r"--nodes names 'write_report', .*: did you mean 'evaluate.write_report'\?"):
        check_selection({"pipelines": [], "node_names": ["write_report"]})


def test_nodes_have_names_of_their_own() -> None:
    names = [node.name for node in register_pipelines()["__default__"].nodes]
    assert len(names) == len(set(names))
    assert not [name for name in names if "(" in name], "a name Kedro made up"


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_reach_nodes_as_their_models(stage: str) -> None:
    pipeline = register_pipelines()[stage]
    read = {name.removeprefix("params:") for name in pipeline.inputs() if name.startswith("params:")}
    typed = TypeExtractor({stage: pipeline}).extract_types_from_pipelines()
    assert typed == {name: BLOCKS[name] for name in read}


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_can_be_asked_for(stage: str) -> None:
    pipelines.configure("qvl_pipeline.pipeline_registry")
    pipelines.set_requested([stage])
    assert pipelines[stage].nodes


def test_listing_the_pipelines_imports_nothing_heavy(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project")
    script = (
        "import sys\n"
        "from kedro.framework.cli.cli import main\n"
        "sys.argv = ['kedro', 'registry', 'list']\n"
        "try:\n    main()\n"
        "finally:\n    print('imported', *sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    listed, imported = done.stdout.split("imported", maxsplit=1)
    assert {line.removeprefix("- ") for line in listed.split("\n")} >= {*STAGES, "__default__"}
    assert HEAVY & set(imported.split()) == set()
    assert done.stderr == "", "no warnings either"
