"""What clusters are told: it is what docs/ shows, follows the parameters, and is sent only when asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qvl_pipeline.cli.submit import submit
from qvl_pipeline.config.training.launch import _VARIABLES
from qvl_pipeline.errors import UserError
from qvl_pipeline.submit.job import TARGETS, make_job, render

ROOT = Path(__file__).parents[2]
NOWHERE = Path("nowhere")
SHOWN = {"slurm": "slurm/train.sbatch", "kubeflow": "kubernetes/trainjob.yaml", "skypilot": "skypilot/train.yaml"}


@pytest.mark.parametrize("target", TARGETS)
def test_docs_show_what_is_rendered(target: str) -> None:
    job = make_job("qwen3_vl_8b", "2x8xH100-80GB", NOWHERE)
    assert (ROOT / "docs" / SHOWN[target]).read_text() == render(target, job)


def test_slurm_has_nodes_gpus_and_time(tmp_path: Path) -> None:
    text = render("slurm", make_job("my_videos", "4x8xA100-40GB", NOWHERE, hours=7, parameters="train.seed=3"))
    script = tmp_path / "job"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert asked | {"nodes": "4", "gpus-per-node": "8", "time": "7:00:00", "job-name": "my-videos"} == asked
    assert "--env my_videos --params train.launch.max_restarts=2,train.seed=3\n" in text


def test_a_training_job_is_of_its_runtime() -> None:
    runtime, job = yaml.safe_load_all(render("kubeflow", make_job("a_b", "2x4xH100-80GB", NOWHERE, image="me/it:1")))
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    trainer = job["spec"]["trainer"]
    assert (job["metadata"]["name"], trainer["numNodes"], trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == (
        "a-b",
        2,
        4,
    )
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["spec"]["template"]["spec"]["containers"][0]["image"] == "me/it:1"


def test_a_sky_task_tells_the_nodes_apart() -> None:
    task = yaml.safe_load(render("skypilot", make_job("a", "2x8xH100-80GB", NOWHERE)))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    assert set(re.findall(r"PET_\w+", task["run"])) <= {name for names in _VARIABLES.values() for name in names}
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


def test_the_time_is_that_of_the_preflight_of_as_many_gpus(tmp_path: Path) -> None:
    report = tmp_path / "preflight.json"
    report.write_text(json.dumps({"time": {"hours": 10.0}, "hardware": {"ranks": 8}}))
    assert make_job("a", "8xH100-80GB", report).hours == 13
    assert make_job("a", "8xH100-80GB", report, hours=2).hours == 2
    assert make_job("a", "2x8xH100-80GB", report).hours == 24


def test_hardware_must_be_named() -> None:
    with pytest.raises(UserError, match="--hardware 8xH100-80GB"):
        make_job("a", "auto", NOWHERE)


def test_it_is_printed_and_sent_only_with_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sent = tmp_path / "sent"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\ncat "$1" > {sent}\n')
    (tmp_path / "sbatch").chmod(0o755)
    arguments = ["--to", "slurm", "--env", "qwen3_vl_8b", "--hardware", "2x8xH100-80GB"]
    printed = CliRunner().invoke(submit, arguments)
    assert printed.exit_code == 0, printed.output
    assert "#SBATCH --nodes=2" in printed.output
    assert not sent.exists()
    assert CliRunner().invoke(submit, [*arguments, "--go"]).exit_code == 0
    assert sent.read_text() == printed.output


def test_a_command_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(submit, ["--to", "skypilot", "--hardware", "8xH100-80GB", "--go"])
    assert done.exit_code == 1
    assert "`sky` is not on this machine" in done.output


def test_the_image_runs_the_lock_and_not_as_root() -> None:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    base = re.search(r"^FROM (\S+)$", text, re.M)[1]
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-runtime-\w+[\d.]+", base), "a release, and CUDA's runtime only"
    copied = [line for line in text.splitlines() if line.startswith(("COPY", "RUN", "USER"))]
    order = [
        next(n for n, line in enumerate(copied) if part in line)
        for part in ("USER trainer", "requirements.lock ./", "--requirement requirements.lock", "--no-deps")
    ]
    assert order == sorted(order), "nothing of the project is installed as root, and the lock before the code"
    assert "--no-install-recommends" in text
    assert "rm -rf /var/lib/apt/lists/*" in text
    assert not re.search(r"^ADD |:latest$", text, re.M)
    assert 'ENTRYPOINT ["kedro"]' in text
    assert "conf/local" in (ROOT / ".dockerignore").read_text().splitlines()
