"""`sample` and `tokenize` on a Ray cluster: sounds, a decoder that hangs, and signals to the run."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.config import BatchingConfig, DataEngineConfig, ModelConfig, SampleConfig
from qvl_pipeline.data.frames.clips import read_clip
from qvl_pipeline.data.spread import RayTasks, _Task
from qvl_pipeline.pipelines.sample.nodes import sample_clips
from qvl_pipeline.pipelines.tokenize.nodes import prepare_base_model, tokenize
from tests.data.clusters import cluster_environment
from tests.data.on_ray import hang, hanging_on, hanging_tokenizer, noted_processes
from tests.data.samples import CORPUS, samples_table
from tests.media.clips import index_clips, write_clip
from tests.media.sounds import tone, write_heard_clip, write_sound, write_wav

MODEL = ModelConfig(processor_type="qwen2_5_omni", image_max_pixels=64 * 64)
HERE = DataEngineConfig()
# For a clip; those that do not hang take far less.
TIMEOUT_S = 5
# The cluster is started elsewhere than in the project, as clusters are. It ends with its standard input.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

head = {"num_cpus": 2, "object_store_memory": 10**8, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    print(cluster.address, flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
"""
# Ends as `kedro run` does, but as in a notebook, Ctrl-C ends one node and leaves the process, as long as others follow.
# In each node something is put in the place of a function.
PROGRAM = """
import contextlib, importlib, pickle, signal, sys
from pathlib import Path
from qvl_pipeline.cli.run import _Terminated, _end, _leave
from qvl_pipeline.cli.waking import woken_by_signals
from qvl_pipeline.datasets import FolderDataset

def run(place, stand_in, node, arguments, folder):
    module, name = place.rsplit(".", 1)
    setattr(importlib.import_module(module), name, stand_in)
    written = node(*arguments)
    FolderDataset(filepath=folder).save(written[0] if isinstance(written, tuple) else written)

with woken_by_signals():
    signal.signal(signal.SIGTERM, _leave)
    try:
        *others, last = pickle.loads(Path(sys.argv[1]).read_bytes())
        for work in others:
            with contextlib.suppress(KeyboardInterrupt):
                run(*work)
        run(*last)
    except KeyboardInterrupt:
        _end(130)
    except _Terminated as error:
        _end(error.code)
"""
# Less than what hangs takes, even where a busy machine needs minutes to start a cluster's processes.
pytestmark = pytest.mark.timeout(500)
READ_CLIP = "qvl_pipeline.data.frames.writing.read_clip"


class RayCluster:
    """A cluster of one node."""

    def __init__(self) -> None:
        """Begin to start it."""
        self.environment = cluster_environment()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            cwd="/",
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @cached_property
    def engine(self) -> DataEngineConfig:
        """Work on the cluster, once it has started."""
        return DataEngineConfig(runner="ray", ray_address=self._process.stdout.readline().strip())

    def at_work(self) -> list[str]:
        """Processes of the cluster that work on a task, or for one."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                command = " ".join(process.cmdline())  # none of a process that has ended
            except psutil.NoSuchProcess:
                continue
            if "_work_there" in command or "multiprocessing" in command:
                found.append(command)
        return found

    def close(self) -> None:
        """End it, whatever it does."""
        process = psutil.Process(self._process.pid)
        processes = [process, *process.children(recursive=True)]
        self._process.stdin.close()
        for left in psutil.wait_procs(processes, timeout=30)[1]:
            left.kill()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    try:
        yield cluster
    finally:
        cluster.close()


class Media(NamedTuple):
    """Samples with a medium each, their media index, and the paths of the clips that can be read."""

    samples: pd.DataFrame
    index: pd.DataFrame
    clips: list[str]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    """Four clips, of which one is heard, four sounds, and a sound that is broken."""
    folder = tmp_path_factory.mktemp("media")
    seconds = [number / 10 for number in range(20)]
    clips = [write_clip(folder / f"{n}.mp4", seconds[n:], time_base=Fraction(1, 10)) for n in range(3)]
    clips.append(write_heard_clip(folder / "heard.mp4", 16, 8, tone(2.3), late_s=0.25))
    index = index_clips(clips).assign(sample_rate=[None, None, None, 16_000.0])
    sounds = [write_wav(folder / f"{n}.wav", tone(0.3 + n, 8000 + 4000 * n), 8000 + 4000 * n) for n in range(3)]
    broken = folder / "broken.wav"
    broken.write_bytes(sounds[0].read_bytes()[:20])
    sounds = [*sounds[:2], broken, sounds[2], write_sound(folder / "a.mp3", tone(1.7, 48_000), 48_000, "libmp3lame")]
    heard = [
        {
            "path": str(sound),
            "type": "audio",
            "content_hash": hashlib.sha256(sound.read_bytes()).hexdigest(),
            "sample_rate": 16_000.0,
        }
        for sound in sounds
    ]
    index = pd.concat([index, pd.DataFrame(heard)], ignore_index=True)
    rows = [{"messages": [("user", [(row.type, row.path), "?"]), ("assistant", "7")]} for row in index.itertuples()]
    return Media(samples_table(rows), index, [str(clip) for clip in clips])


@pytest.fixture
def start(cluster: RayCluster, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a run: of each node the place of a function, what is put there, the node, its arguments and its folder."""
    runs = []

    def started(*work: tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...], str]) -> Any:
        (tmp_path / "work").write_bytes(pickle.dumps(work))
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "work")]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        runs.append(subprocess.Popen(command, env=cluster.environment, text=True, start_new_session=True, **streams))
        return runs[-1]

    yield started
    for run in runs:
        run.kill()
        run.communicate()


def arguments(media: Media, engine: DataEngineConfig, **changes: Any) -> tuple[Any, ...]:
    small = {"fps": 10, "video_min_frames": 2, "video_min_pixels": 1024, "video_max_pixels": 64 * 64}
    config = SampleConfig(**small, use_audio_in_video=True, frame_cache=None, num_workers=4, **changes)
    return media.samples, media.index, config, MODEL, engine


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], within_s: float = 300) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"not within {within_s:g} s"
        time.sleep(0.05)


def wait_until_hanging(run: subprocess.Popen[str], log: Path, tasks: int) -> None:
    wait_until(lambda: len(noted_processes(log)) == tasks or run.poll() is not None)
    assert run.poll() is None, run.communicate()[1]


def wait_until_gone(log: Path) -> None:
    pids = {pid for pair in noted_processes(log) for pid in pair}
    wait_until(lambda: not any(map(alive, pids)), within_s=30)


def test_sounds_and_a_decoder_that_hangs(
    cluster: RayCluster,
    media: Media,
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = media._replace(samples=media.samples[:4])
    hanging = partial(hanging_on, media.clips[1:2])
    monkeypatch.setattr(READ_CLIP, partial(hanging, tmp_path / "here", read_clip))
    sample_clips(*arguments(silent, HERE, decode_timeout_s=TIMEOUT_S))(tmp_path / "native-hanging")
    monkeypatch.undo()
    sample_clips(*arguments(media, HERE))(tmp_path / "native-sounds")

    timed = arguments(silent, cluster.engine, decode_timeout_s=TIMEOUT_S)
    run = start(
        (
            READ_CLIP,
            partial(hanging, tmp_path / "there", read_clip),
            sample_clips,
            timed,
            str(tmp_path / "ray-hanging"),
        ),
        (READ_CLIP, read_clip, sample_clips, arguments(media, cluster.engine), str(tmp_path / "ray-sounds")),
    )
    wait_until(lambda: (tmp_path / "ray-hanging").exists() or run.poll() is not None)
    hung = noted_processes(tmp_path / "there")
    left = [decoder for decoder, _ in hung if alive(decoder)]
    assert run.poll() is None, run.communicate()[1]  # so the cluster has not ended the process on its own
    assert (len(hung), left) == (1, [])
    errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors

    for name in ("hanging", "sounds"):
        files = sorted(path.name for path in (tmp_path / f"native-{name}").iterdir())
        assert {"failures.parquet", "frames-00000.arrow", "index.arrow", "sounds.parquet"} <= set(files)
        assert sorted(path.name for path in (tmp_path / f"ray-{name}").iterdir()) == files
        for file in files:
            native, ray = (tmp_path / f"{runner}-{name}" / file for runner in ("native", "ray"))
            assert ray.read_bytes() == native.read_bytes(), file
    failures, sounds = (
        {name: pq.read_table(tmp_path / f"ray-{name}" / file).to_pylist() for name in ("hanging", "sounds")}
        for file in ("failures.parquet", "sounds.parquet")
    )
    timeout = {"rule": "decode_timeout", "detail": f"took longer than {TIMEOUT_S} s to decode"}
    assert failures["hanging"] == [{"clip_id": media.clips[1], "path": media.clips[1], **timeout}]
    [failure] = failures["sounds"]
    assert (Path(failure["path"]).name, failure["rule"]) == ("broken.wav", "sound_unfit")
    assert [Path(row["path"]).name for row in sounds["sounds"]] == ["heard.mp4", "0.wav", "1.wav", "2.wav", "a.mp3"]


def test_ctrl_c_ends_the_tasks_also_of_a_process_that_lives_on(
    cluster: RayCluster, media: Media, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    sampled = media._replace(samples=media.samples[:4])
    corpus = samples_table([{"messages": [("user", text), ("assistant", "7")]} for text in CORPUS])
    prepare_base_model(corpus, MODEL)(tmp_path / "base")
    sample_clips(*arguments(sampled, HERE))(tmp_path / "frames")
    tokens = (sampled.samples, media.index, tmp_path / "frames", tmp_path / "base", MODEL, BatchingConfig())
    logs = tmp_path / "clips", tmp_path / "samples"
    run = start(
        (
            READ_CLIP,
            partial(hanging_on, media.clips, logs[0], read_clip),
            sample_clips,
            arguments(media, cluster.engine),
            str(tmp_path / "store"),
        ),
        (
            "qvl_pipeline.data.plan.tokenization._tokenizer",
            partial(hanging_tokenizer, logs[1]),
            tokenize,
            (*tokens, cluster.engine),
            str(tmp_path / "tokenized"),
        ),
    )
    hanging_here = [2, 1]  # a clip on each core, and one batch of samples
    for log, tasks in zip(logs, hanging_here, strict=True):
        wait_until_hanging(run, log, tasks)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        wait_until_gone(log)
        if log == logs[0]:
            assert run.poll() is None, "the cluster has ended them on its own"
    assert run.wait(120) == 130
    assert "Traceback" not in run.stderr.read()
    assert [len(noted_processes(log)) for log in logs] == hanging_here, "others began when these had ended"
    assert not [path.name for path in tmp_path.iterdir() if "store" in path.name or "tokenized" in path.name]
    wait_until(lambda: not cluster.at_work(), within_s=60)


def test_tasks_that_wait_are_ended_before_those_in_whose_place_they_would_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, ended = RayTasks.__new__(RayTasks), []
    tasks._tasks = deque(_Task(number, "clips") for number in range(4))
    tasks._tasks[0].taken = True
    monkeypatch.setattr("ray.cancel", lambda number, force: ended.append((number, force)))
    tasks.close()
    assert ended == [(3, True), (2, True), (1, True)]


@pytest.mark.parametrize("moment", ["joining", "working"])
def test_sigterm_ends_run_and_tasks(
    cluster: RayCluster, media: Media, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, moment: str
) -> None:
    log = tmp_path / "log"
    place, stand_in, tasks = {
        "joining": ("ray._private.worker.connect", partial(hang, log), 1),
        "working": (READ_CLIP, partial(hanging_on, media.clips[1:], log, read_clip), 2),
    }[moment]
    run = start((place, stand_in, sample_clips, arguments(media, cluster.engine), str(tmp_path / "store")))
    wait_until_hanging(run, log, tasks)
    if moment == "working":
        assert list((tmp_path / ".store.partial").iterdir())
        assert cluster.at_work()
    os.killpg(run.pid, signal.SIGTERM)  # as a batch system does
    assert run.wait(120) == 143
    assert "Traceback" not in run.stderr.read()
    assert not [path.name for path in tmp_path.iterdir() if "store" in path.name]
    wait_until_gone(log)
    wait_until(lambda: not cluster.at_work(), within_s=60)
    assert len(noted_processes(log)) == tasks, "others began when these had ended"
