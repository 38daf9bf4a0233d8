"""On Ray, ingest and validate write the same bytes as in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from PIL import Image

from qvl_pipeline.config import DataEngineConfig
from qvl_pipeline.data.runner import use_runner
from qvl_pipeline.errors import UserError

TABLES = ("samples", "rejects", "valid_samples", "quarantine", "media_index")
# Runs in a process of its own, because Daft's runner can be set once in a process. The cluster is started elsewhere
# than in the project: its workers must find the media all the same.
SCRIPT = """
import atexit, os, sys
from pathlib import Path
import pyarrow.parquet as pq
from qvl_pipeline.config import DataEngineConfig, IngestConfig, ValidateConfig
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.data.validation.validate import validate_samples, write_valid

project, runner, batch_rows, memory = Path(sys.argv[1]), *sys.argv[2:]
cluster = None
if runner == "ray":
    from ray.cluster_utils import Cluster
    os.chdir("/")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    atexit.register(cluster.shutdown)
os.chdir(project)
engine = DataEngineConfig(
    runner=runner, ray_address=cluster and cluster.address, batch_rows=batch_rows, memory_limit_gib=memory
)
config = IngestConfig(datasets=[{"path": "a.jsonl", "data_folder": "media", "data_type": "jsonl"}], eval_fraction=0.5)
out = project / runner
out.mkdir()
ingest_sources(config, list_files(config), engine, out)
samples, rejects = pq.ParquetFile(out / "samples.parquet"), pq.read_table(out / "rejects.parquet")
validation = validate_samples(samples, rejects, ValidateConfig(), engine.batch_rows)
write_valid(samples, validation.quarantine, ValidateConfig(), out / "valid_samples.parquet", engine.batch_rows)
for name in ("quarantine", "media_index"):
    pq.write_table(getattr(validation, name), out / f"{name}.parquet")
"""


def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"media/{number}.png")
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x" * 3000}]
    with (tmp_path / "a.jsonl").open("wb") as file:
        for row in range(9000):
            file.write(orjson.dumps({"messages": turns, "image": f"{row % 4}.png"}) if row % 9 else b"{")
            file.write(b"\n")
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(place).absolute()) for place in places)}
    # The sizes of batches and slabs differ too.
    for settings in (("native", "4096", "4"), ("ray", "500", "1")):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), *settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    for name in TABLES:
        native, ray = ((tmp_path / runner / f"{name}.parquet").read_bytes() for runner in ("native", "ray"))
        assert native == ray, name
    assert b"does not exist" in (tmp_path / "native/quarantine.parquet").read_bytes()


def test_another_runner_in_the_same_process_is_refused() -> None:
    use_runner(DataEngineConfig())
    use_runner(DataEngineConfig())
    with pytest.raises(UserError, match=r"^data_engine\.ray_address: no cluster at 'nonsense'"):
        use_runner(DataEngineConfig(runner="ray", ray_address="nonsense"))
