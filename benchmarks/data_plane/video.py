"""Frames a second that `sample` takes from video against qwen_vl_utils' readers, and reading them when training."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from qwen_vl_utils import vision_process as reference

from benchmarks.data_plane import Row, Section
from qvl_pipeline.config import SampleConfig
from qvl_pipeline.data.frames.clips import Clip, read_clip
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.backends import choose_backend
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.media.loading import PatchLoader

_SECONDS, _RATE, _HEIGHT, _WIDTH = 60, 30, 360, 640
_GROUPS = (48, 250)  # frames between keyframes: as a website encodes, and x264's default
_PATCH_SIZE = 16
_RULES = {"fps": 1.0, "video_min_pixels": 12_544, "video_max_pixels": 50_176}
_ROUNDS = 5
_QUIET = 0.05
_ENCODINGS = ("raw", "zstd", "png", "jpeg")


def measure(rows: int) -> Section:
    """Sample clips of 60 s, 640 x 360, H.264 with B-frames, at one frame a second; `rows` changes nothing."""
    with TemporaryDirectory() as folder:
        paths = [write_clip(Path(folder) / f"{group}.mp4", group) for group in _GROUPS]
        sampling, ratios = _measure_sampling([path for path in paths for _ in range(2)])
        reading, shares = _measure_reading(Path(folder), paths[0])
    fast = ("loading_raw_over_decoding", "loading_zstd_over_decoding")
    return Section(
        sampling + reading,
        ratios=ratios | shares,
        targets={key: ">= 1" for key in ratios if "over" in key}
        | {"sampling_waiting_for_a_core": "<= 0.05"}
        | dict.fromkeys(fast, ">= 20"),
    )


def write_clip(path: Path, group: int) -> Path:
    """Encode a texture that drifts, under a little noise."""
    rng = np.random.default_rng(group)
    texture = np.kron(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"preset": "fast", "bf": "3", "g": str(group)})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(_SECONDS * _RATE):
            top, left = (number // 3) % 100, (number // 2) % 70
            picture = texture[top : top + _HEIGHT, left : left + _WIDTH] // 2
            noise = rng.integers(0, 12, (_HEIGHT, _WIDTH, 1), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture + noise + 50, format="rgb24")))
        container.mux(stream.encode())
    return path


def _measure_sampling(paths: list[Path]) -> tuple[list[Row], dict[str, float]]:
    """Time every reader on the same files, as many processes as cores for each; the best of a few rounds.

    Processes of one thread each, like ours, wait for a core only where others use the machine. There wall-clock times
    say little: the other readers decode in several threads, and so are given more of the machine.
    """
    readers: dict[str, Callable[[Path], list[int]]] = {"this project (pyav)": _ours}
    for backend in ("decord", "torchcodec"):
        try:
            readers[f"qwen_vl_utils ({choose_backend(backend)})"] = partial(_theirs, backend)
        except UserError as error:
            print(f"not measured: {error}")
    rounds = [{name: _run(read, paths) for name, read in readers.items()} for _ in range(_ROUNDS)]
    wall, cpu = ({name: min(run[name][key] for run in rounds) for name in readers} for key in ("wall", "cpu"))
    frames = {name: run["frames"] for name, run in rounds[0].items()}
    ours, *others = readers
    if any(frames[name] != frames[ours] for name in others):
        raise RuntimeError("the readers do not take the same frames")
    rows = [Row(f"sampling: {name}", sum(map(len, frames[ours])), wall[name]) for name in readers]
    # CPU time is that of a machine with nothing else to do, whatever else this one does.
    measured = {"sampling_over_fastest_reader": wall, "sampling_over_fastest_reader_in_cpu_time": cpu}
    ratios = {key: min(seconds[name] for name in others) / seconds[ours] for key, seconds in measured.items()}
    ratios["sampling_waiting_for_a_core"] = min(run[ours]["waiting"] for run in rounds)
    if ratios["sampling_waiting_for_a_core"] > _QUIET:
        print("the machine is not quiet: of the ratios of `sampling`, only that of CPU time holds")
    return rows, ratios


def _run(read: Callable[[Path], list[int]], paths: list[Path]) -> dict[str, Any]:
    """Read files side by side; what was found, wall-clock and CPU seconds, and the share of time without a core."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    pool = multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), torch.set_num_threads, (1,))
    with pool:
        found, waited = zip(*pool.map(partial(_read, read), paths, chunksize=1), strict=True)
        seconds = time.perf_counter() - started
        pool.close()
        pool.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"frames": found, "wall": seconds, "cpu": cpu, "waiting": sum(waited) / (sum(waited) + cpu)}


def _read(read: Callable[[Path], list[int]], path: Path) -> tuple[list[int], float]:
    """Read a file; the frames, and the seconds in which this thread could have run, but had no core."""
    before = _waited()
    return read(path), _waited() - before


def _waited() -> float:
    _, nanoseconds, _ = Path("/proc/self/schedstat").read_text().split()
    return int(nanoseconds) / 1e9


def _ours(path: Path) -> list[int]:
    return _sample(path, SampleConfig(frame_encoding="raw", **_RULES)).frame_indices


def _sample(path: Path, sample: SampleConfig) -> StoredClip:
    content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    clip = Clip(str(path), None, None, content_hash, _SECONDS * _RATE, _RATE, _HEIGHT, _WIDTH)
    return read_clip(clip, sample=sample, patch_size=_PATCH_SIZE, backend="pyav")


def _theirs(backend: str, path: Path) -> list[int]:
    """Sample as `fetch_video` does; the resizing is its, too."""
    limits = {"fps": _RULES["fps"], "min_pixels": _RULES["video_min_pixels"], "max_pixels": _RULES["video_max_pixels"]}
    reference.get_video_reader_backend = lambda: backend
    _, metadata = reference.fetch_video(
        {"video": str(path), **limits}, image_patch_size=_PATCH_SIZE, return_video_metadata=True
    )
    return list(metadata["frames_indices"])


def _measure_reading(folder: Path, path: Path) -> tuple[list[Row], dict[str, float]]:
    """Time what the training loader does for one clip: from its frames, stored or not, to patches.

    It does that in one thread, and reads what the system holds in memory, so CPU time is what a core needs for it.
    """
    torch.set_num_threads(1)
    rows, sizes = {}, {}
    for name in ("decoded on the fly", *_ENCODINGS):
        encoding = {"frame_encoding": name} if name in _ENCODINGS else {"materialize": False}
        clip = _sample(path, SampleConfig(**encoding, **_RULES))
        with FrameStoreWriter(folder / name) as store:
            store.add(clip)
        sizes[name] = sum(shard.stat().st_size for shard in (folder / name).glob("*.arrow"))
        loader = PatchLoader(patch_size=_PATCH_SIZE, frame_store=folder / name)
        grid = {"grid_t": len(clip.frame_indices) // 2, "grid_h": clip.height // _PATCH_SIZE}
        media = [{"type": "video", "key": str(path), "grid_w": clip.width // _PATCH_SIZE, **grid}]
        seconds = []
        for _ in range(_ROUNDS if name == "decoded on the fly" else 5 * _ROUNDS):
            started = time.process_time()
            loader.load(media)
            seconds.append(time.process_time() - started)
        rows[name] = Row(f"loading: {name}", len(clip.frame_indices), min(seconds))
    slow = rows["decoded on the fly"]
    shares = {f"loading_{name}_over_decoding": slow.seconds / rows[name].seconds for name in _ENCODINGS}
    shares |= {f"bytes_{name}_over_raw": sizes[name] / sizes["raw"] for name in _ENCODINGS if name != "raw"}
    return list(rows.values()), shares
