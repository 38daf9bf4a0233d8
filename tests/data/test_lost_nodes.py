"""`sample` and `tokenize` on a Ray cluster that loses a node: the bytes of this machine, and little done twice."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pandas as pd
import psutil
import pytest

from qvl_pipeline.config import BatchingConfig, DataEngineConfig, ModelConfig, SampleConfig
from qvl_pipeline.pipelines.sample.nodes import sample_clips
from qvl_pipeline.pipelines.tokenize.nodes import tokenize
from tests.data.clusters import cluster_environment
from tests.data.lost_nodes import read_notes
from tests.data.samples import samples_table
from tests.media.clips import index_clips, write_clip

CLIPS = 12
# Runs in a process of its own. The cluster is started elsewhere than in the project, as clusters are.
SCRIPT = """
import atexit, os, pickle, signal, sys, threading, time
from functools import partial
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from qvl_pipeline.config import DataEngineConfig
from qvl_pipeline.data.frames import writing
from qvl_pipeline.data.plan import tokenization
from qvl_pipeline.data.runner import join_cluster
from qvl_pipeline.pipelines.sample.nodes import sample_clips
from qvl_pipeline.pipelines.tokenize.nodes import tokenize
from tests.data.lost_nodes import clip_path, noted, noted_start, read_notes

project = Path(sys.argv[1])
sample, tokens = pickle.loads((project / "arguments").read_bytes())
os.chdir("/")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
atexit.register(lambda: (ray.shutdown(), cluster.shutdown()))
os.chdir(project)
engine = DataEngineConfig(runner="ray", ray_address=cluster.address)
leave = lambda *_: None
signal.signal(signal.SIGTERM, leave)
join_cluster(engine)  # while there is one node: the other ones can be taken away
assert signal.getsignal(signal.SIGTERM) is leave

def lose_a_node(log):
    log.touch()
    node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    doomed = node.all_processes["raylet"][0].process.pid
    def wait():
        while len(read_notes(log, doomed)) < 2:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
    threading.Thread(target=wait, daemon=True).start()
    log.with_suffix(".doomed").write_text(str(doomed))
    return doomed

log = project / "clips"
writing.read_clip = partial(noted, log, lose_a_node(log), writing.read_clip, clip_path)
sample_clips(*sample, engine)(project / "ray")

log = project / "samples"
tokenization.ROWS_PER_BATCH = 2
tokenization._tokenizer = partial(noted_start, log, lose_a_node(log), tokenization._tokenizer)
for write, name in zip(tokenize(*tokens, engine), ("tokenized", "stream", "quarantine")):
    write(project / "ray" / name)
"""


@pytest.mark.timeout(600)  # two clusters' worth of processes start
def test_a_lost_node_repeats_only_its_own_work(
    tmp_path: Path, base_model: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model.processor_type != "qwen3_vl":
        pytest.skip("families do not differ in where they are worked on")
    seconds = [number / 10 for number in range(20)]
    paths = [write_clip(tmp_path / f"{n}.mp4", seconds[: 8 + n], time_base=Fraction(1, 10)) for n in range(CLIPS)]
    paths[5].write_bytes(paths[5].read_bytes()[:200])  # quarantined, wherever it is read
    index = index_clips([*paths[:5], *paths[6:]])
    index = pd.concat([index, index.iloc[:1].assign(path=str(paths[5]))], ignore_index=True)
    samples = samples_table(
        [{"messages": [("user", [("video", str(path), None, None), "Which?"]), ("assistant", "7")]} for path in paths]
    )
    small = {"video_min_frames": 2, "video_min_pixels": 1024, "video_max_pixels": 64 * 64}
    # Four at a time: one that waits where work goes on, and two or more for the node that is lost at its second.
    config = SampleConfig(**small, fps=10, frame_encoding="raw", num_workers=4, frame_cache=None)
    sampled = samples.drop(5).reset_index(drop=True)
    sample = (samples, index, config, model)
    native, on_ray = tmp_path / "native", tmp_path / "ray"
    sample_clips(*sample, DataEngineConfig())(native)
    monkeypatch.setattr("qvl_pipeline.data.plan.tokenization.ROWS_PER_BATCH", 2)
    tokens = (sampled, index, native, base_model, model, BatchingConfig())
    for write, name in zip(tokenize(*tokens, DataEngineConfig()), ("tokenized", "stream", "quarantine"), strict=True):
        write(native / name)

    (tmp_path / "arguments").write_bytes(pickle.dumps((sample, tokens)))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=cluster_environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in native.iterdir())
    assert {"failures.parquet", "frames-00000.arrow", "index.arrow", "tokenized"} < set(files)
    assert sorted(path.name for path in on_ray.iterdir()) == files
    for name in files:
        assert (on_ray / name).read_bytes() == (native / name).read_bytes(), name

    for log in ("clips", "samples"):
        notes = read_notes(tmp_path / log)
        again = {piece for piece, count in Counter(piece for _, _, piece in notes).items() if count > 1}
        doomed = int((tmp_path / f"{log}.doomed").read_text())
        lost = [piece for _, node, piece in notes if node == doomed]
        assert lost[-1] in again, "it was never finished there"
        assert again <= set(lost)
        assert not any(psutil.pid_exists(pid) for pid, node, _ in notes if node == doomed), "it hangs on"
