"""Jobs as torchrun runs them: several nodes, restarts, stopping on request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.ports import free_port
from qvl_pipeline.training.launcher import Processes, StoppedOnRequest, environment, launch
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained
from tests.training.test_running import launched, processes_of, start

# What `kedro run` does on each node, without the rest of the pipeline.
NODE = """
import sys
from pathlib import Path
from qvl_pipeline.config.training.launch import LaunchConfig
from qvl_pipeline.training.launcher import Processes, launch
config = LaunchConfig(nnodes=2, master_addr="127.0.0.1", master_port=int(sys.argv[2]))
launch(Path(sys.argv[1]), Processes(1, config.nodes()), lambda: None)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A training of eight steps that ran on two ranks without a launcher."""
    folder = tmp_path_factory.mktemp("launch")
    build_tiny_model(folder / "model", family="qwen3_vl", seed=0, corpus=["which digit?"])
    spec = make_training(folder, folder / "model", "qwen3_vl", kinds=("text",) * 16, packs_per_step=2)
    trained(spec, nproc=2)
    return spec


def losses(spec: TrainSpec) -> dict[int, float]:
    """Return the loss of each row; a step in two rows would be an error."""
    rows = [json.loads(line) for line in (Path(spec.run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return {row["step"]: row["loss"] for row in rows}


def test_two_nodes_train_as_one_job(undisturbed: TrainSpec, tmp_path: Path) -> None:
    port = free_port()
    spec = changed(undisturbed, tmp_path / "run")
    command = [sys.executable, "-c", NODE, str(start(spec)), str(port)]
    nodes = [subprocess.Popen(command, env=os.environ | {"NODE_RANK": rank}) for rank in ("1", "0")]
    assert [node.wait(150) for node in nodes] == [0, 0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 2
    assert (tmp_path / "run" / "engine.node1.log").exists()
    assert losses(spec) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_a_killed_rank_is_restarted_and_the_training_ends_the_same(undisturbed: TrainSpec, tmp_path: Path) -> None:
    spec = changed(undisturbed, tmp_path / "run", run={"save_steps": 2})
    killed: list[int] = []

    def kill_a_rank_once() -> None:
        if not killed and any((tmp_path / "run" / "checkpoints").glob("checkpoint-*")):
            killed.append(_ranks(tmp_path / "run" / "train_spec.json")[-1])
            os.kill(killed[0], signal.SIGKILL)

    launch(start(spec), Processes(2, max_restarts=1), kill_a_rank_once)
    assert killed
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_from_step"] >= 2
    assert losses(spec) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_stopping_on_request_is_an_end_of_its_own(undisturbed: TrainSpec, tmp_path: Path) -> None:
    long = make_training(tmp_path, Path(undisturbed.model.path), "qwen3_vl", ("text",) * 4000, packs_per_step=2)
    spec_path = start(long)
    parent = launched(spec_path)
    os.kill(parent.pid, signal.SIGUSR1)
    output, _ = parent.communicate(timeout=120)
    assert parent.returncode == StoppedOnRequest.status
    step = json.loads((tmp_path / "run" / "stopped.json").read_text())["step"]
    assert f"stopped on request after step {step}; run the same command" in output
    assert not processes_of(spec_path)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    assert sorted(losses(long)) == list(range(1, step + 1))


def fail_in_attempt(number: int, spec_path: Path) -> int:
    """Run the engine as torchrun does when it has restarted the ranks `number` times; its failure is expected."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    return 0 if main(spec_path) else 1


def test_error_of_an_attempt_that_was_restarted_is_kept_but_not_reported(
    undisturbed: TrainSpec, tmp_path: Path
) -> None:
    spec = changed(undisturbed, tmp_path / "run", data={"tokenized": str(tmp_path / "no")})
    spec_path = start(spec)
    for attempt in (0, 1):
        run_ranks(fail_in_attempt, 1, attempt, spec_path, log_dir=tmp_path / "logs")
    errors = tmp_path / "run" / "errors"
    assert {str(path.relative_to(errors)) for path in errors.rglob("*.json")} == {"rank0.json", "attempt0/rank0.json"}


ENVIRONMENT = {
    "OMP_NUM_THREADS": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "NCCL_DEBUG": "INFO",
    "HF_XET_HIGH_PERFORMANCE": "1",
}


def test_environment_of_the_ranks_is_ours_unless_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert environment(nproc_per_node=2).items() >= ENVIRONMENT.items()
    assert environment(nproc_per_node=8)["OMP_NUM_THREADS"] == "1"
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "the user's")
    assert {environment(nproc_per_node=2)[name] for name in ENVIRONMENT} == {"the user's"}


def _ranks(spec_path: Path) -> list[int]:
    """Return the process ids of the ranks, of which torchrun is none."""
    pids = [pid for pid, command in processes_of(spec_path) if "torch.distributed.run" not in command]
    return sorted(pids)
