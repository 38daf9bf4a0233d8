"""The engine runs on a bare GPU node: a whole training imports nothing of the pipeline around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.engine.training import make_training

FORBIDDEN = {"kedro", "mlflow", "dvc", "daft", "pydantic", "pandas", "av", "matplotlib", "qwen_vl_utils"}
PROGRAM = """
import json, sys
from pathlib import Path
from qvl_pipeline.engine.__main__ import main
status = main(Path(sys.argv[1]))
print(json.dumps({"status": status, "modules": sorted(sys.modules)}))
"""


def test_engine_process_imports_nothing_of_the_pipeline(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    training = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text", "image", "video"))
    Path(training.run.output_dir).mkdir()
    training.save(tmp_path / "spec.json")
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "spec.json")],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == 0, done.stderr
    assert FORBIDDEN & {module.split(".")[0] for module in report["modules"]} == set()
