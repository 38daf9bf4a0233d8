"""Images and frames a second of one core, from file to patches: `python -m benchmarks.loader [--rounds 5] [--quick]`.

Ours is what a loader process of training does. Beside it are the processor of transformers on the same file at the same
size, decoded as transformers does, and our own resizing and patches behind torchvision's decoders. Contenders take
turns in every round on one thread, and what counts is CPU time: a ratio is the median over rounds of what turns of the
same round took, which hardly minds what else the machine does. `levels` is the largest difference from the processor's
pixels, of 255. `decoding` is our part up to the picture: what a loader with nothing left to do after it would reach.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
import torchvision.io
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import load_video

from benchmarks.report import report
from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.sampling import smart_resize
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.pixels import normalize_patches, open_image, patchify, resize

PATCH_SIZE, FACTOR = 16, 32
LIMITS = {"shortest_edge": 64 * FACTOR**2 // 16, "longest_edge": 1280 * FACTOR**2}
MEAN_AND_STD = [0.5] * 3
# Name, format, width, height.
IMAGES = (
    ("JPEG 1024 x 768", "jpeg", 1024, 768),
    ("PNG 1024 x 768", "png", 1024, 768),
    ("JPEG 3840 x 2160", "jpeg", 3840, 2160),
)
ENCODINGS = ("zstd", "jpeg", "png", "raw")
FRAMES, SIDE = 32, 448
_LOADS = 5  # in a turn
HF, DECODING = "transformers' processor", "decoding"

Load = Callable[[], Any]  # patches, as a tensor, but for decoding alone


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small pictures and one round: only shows that it runs")
    options = parser.parse_args()
    rows = measure(*(1, 8) if options.quick else (options.rounds, 1))
    report("loader", rows, ratios=ratios(rows), targets=dict.fromkeys(ratios(rows), ">= 3"))


def measure(rounds: int, smaller: int) -> list[dict[str, Any]]:
    """Measure all cases.

    Args:
        rounds: Turns of each contender.
        smaller: By how much to divide the sides of pictures.

    Returns:
        A row for each contender of each case.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            rows = [row for case in _cases(Path(folder), smaller) for row in _compare(*case, rounds)]
    finally:
        torch.set_num_threads(threads)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast as the processor ours is, by case."""
    return {
        f"{row['case']}: {row['contender']} over {HF}": row["times_as_fast"]
        for row in rows
        if row["contender"].startswith("ours")
    }


def _cases(folder: Path, smaller: int) -> Iterator[tuple[str, int, dict[str, Load]]]:
    """Yield each case: its name, how many items a contender loads, and the contenders."""
    for name, form, width, height in IMAGES:
        path = folder / f"{width}.{form}"
        photo(width // smaller, height // smaller).save(path, quality=90)
        yield name, 1, _image_loaders(path)
    clip = folder / "clip.mp4"
    _write_clip(clip, SIDE // smaller // FACTOR * FACTOR)
    frames = _decoded(clip)
    stored = {f"ours, stored as {encoding}": _stored(folder, clip, frames, encoding) for encoding in ENCODINGS}
    yield (
        f"frames {SIDE} x {SIDE}",
        len(frames),
        {HF: lambda: _processed_clip(clip), "ours, decoded on the fly": _stored(folder, clip, frames, None), **stored},
    )


def _compare(case: str, items: int, contenders: dict[str, Load], rounds: int) -> list[dict[str, Any]]:
    patches = {name: load() for name, load in contenders.items()}  # and caches are warm
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else reversed(contenders):
            contenders[name]()  # so that caches are those of a loader process, not those of another contender
            started = time.process_time()
            for _ in range(_LOADS):
                contenders[name]()
            seconds[name].append((time.process_time() - started) / _LOADS)
    return [
        {
            "case": case,
            "contender": name,
            "ms_of_cpu": 1e3 * min(seconds[name]) / items,
            "per_cpu_second": items / min(seconds[name]),
            "times_as_fast": median(hf / own for hf, own in zip(seconds[HF], seconds[name], strict=True)),
            "levels": None if name in (HF, DECODING) else _levels(patches[name], patches[HF]),
        }
        for name in contenders
    ]


def _levels(patches: torch.Tensor, expected: torch.Tensor) -> float:
    found = normalize_patches(patches, MEAN_AND_STD, MEAN_AND_STD)
    return float((found - expected).abs().max() * 0.5 * 255)


def _image_loaders(path: Path) -> dict[str, Load]:
    processor = Qwen2VLImageProcessor(
        patch_size=PATCH_SIZE, size=LIMITS, image_mean=MEAN_AND_STD, image_std=MEAN_AND_STD
    )
    with Image.open(path) as image:
        limits = {"min_pixels": LIMITS["shortest_edge"], "max_pixels": LIMITS["longest_edge"]}
        height, width = smart_resize(image.height, image.width, factor=FACTOR, **limits)
    item = {"type": "image", "key": str(path), "grid_t": 1}
    item |= {"grid_h": height // PATCH_SIZE, "grid_w": width // PATCH_SIZE}
    loader = PatchLoader(patch_size=PATCH_SIZE, frame_store=None)

    def hf() -> torch.Tensor:
        with Image.open(path) as image:
            return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    def torchvision_decoder() -> torch.Tensor:
        picture = torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB).numpy()
        out = np.empty((item["grid_h"] * item["grid_w"], 3 * 2 * PATCH_SIZE**2), dtype=np.uint8)
        layout = {"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "merge_size": 2}
        patchify(resize(picture, height, width)[None], out, **layout)
        return torch.from_numpy(out)

    return {
        HF: hf,
        "ours": lambda: loader.load([item]),
        "torchvision's decoder": torchvision_decoder,
        DECODING: lambda: open_image(path),
    }


def _processed_clip(path: Path) -> torch.Tensor:
    frames, _ = load_video(str(path), backend="pyav", sample_indices_fn=lambda metadata, **_: np.arange(FRAMES))
    processor = Qwen3VLVideoProcessor(patch_size=PATCH_SIZE, image_mean=MEAN_AND_STD, image_std=MEAN_AND_STD)
    done = processor(videos=[frames], do_sample_frames=False, do_resize=False, return_tensors="pt")
    return done["pixel_values_videos"]


def _stored(folder: Path, clip: Path, frames: np.ndarray, encoding: str | None) -> Load:
    """Load a clip out of a store, which has its frames, or (`None`) decodes them whenever they are asked for."""
    item = store_clip(folder / f"store_{encoding}", clip, frames, encoding)
    loader = PatchLoader(patch_size=PATCH_SIZE, frame_store=folder / f"store_{encoding}")
    return lambda: loader.load([item])


def store_clip(store: Path, clip: Path, frames: np.ndarray, encoding: str | None) -> dict[str, Any]:
    """Write a store of one clip, with its frames `[T, 3, H, W]` if there is an encoding; return its medium."""
    encoded = None if encoding is None else [encode_frame(frame, encoding, 90) for frame in frames]
    count, _, height, width = frames.shape
    numbers = list(range(count))
    with FrameStoreWriter(store) as writer:
        seconds = [number / 8 for number in numbers]
        form = encoding or "raw"
        writer.add(StoredClip(str(clip), None, None, height, width, 8.0, form, numbers, seconds, encoded))
    item = {"type": "video", "key": str(clip), "grid_t": count // 2, "seconds_per_grid": 0.25}
    return item | {"grid_h": height // PATCH_SIZE, "grid_w": width // PATCH_SIZE}


def photo(width: int, height: int) -> Image.Image:
    """A picture with large shapes, edges and a little noise, which compresses about as a photo does."""
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8))


def _write_clip(path: Path, side: int) -> None:
    picture = np.asarray(photo(2 * side, side))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "fast", "g": "16"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            start = number * side // FRAMES
            frame = np.ascontiguousarray(picture[:, start : start + side])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in container.decode(video=0)])


if __name__ == "__main__":
    main()
