"""The job descriptions in docs/ name parameters and variables that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from qvl_pipeline.config.training.launch import _VARIABLES, LaunchConfig

DOCS = Path(__file__).parents[1] / "docs"
JOBS = [DOCS / "slurm" / "train.sbatch", DOCS / "kubernetes" / "trainjob.yaml"]


@pytest.mark.parametrize("path", [*JOBS, DOCS / "multi_node.md"], ids=lambda path: path.name)
def test_parameters_of_the_commands_exist(path: Path) -> None:
    names = re.findall(r"train\.launch\.(\w+)=", path.read_text())
    assert names
    assert set(names) <= set(LaunchConfig.model_fields)


def test_batch_script_is_a_script_and_sets_what_is_read() -> None:
    subprocess.run(["bash", "-n", JOBS[0]], check=True)
    exported = re.search(r"^export (.+)$", JOBS[0].read_text(), re.M)[1].split()
    assert exported == [_VARIABLES["master_addr"][1], _VARIABLES["master_port"][1]]


def test_training_job_uses_its_runtime_and_reads_what_the_operator_sets() -> None:
    runtime, job = yaml.safe_load_all(JOBS[1].read_text())
    assert (runtime["kind"], job["kind"]) == ("ClusterTrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    read = {variable for variables in _VARIABLES.values() for variable in variables}
    assert set(re.findall(r"PET_\w+", JOBS[1].read_text())) <= read


def test_table_of_parameters_is_complete() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "multi_node.md").read_text(), re.M))
    assert rows == set(LaunchConfig.model_fields)
