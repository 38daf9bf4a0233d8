from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.pixels import normalize_patches

FAMILIES = {"qwen3_vl": (16, Qwen3VLVideoProcessor), "qwen2_5_vl": (14, Qwen2VLVideoProcessor)}
MEAN = STD = [0.5, 0.5, 0.5]
N_FRAMES = 5


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[int, type]:
    return FAMILIES[request.param]


@pytest.fixture
def clip(family: tuple[int, type]) -> np.ndarray:
    patch_size, _ = family
    shape = (N_FRAMES, 3, 4 * patch_size, 6 * patch_size)
    return np.random.default_rng(1).integers(0, 256, size=shape, dtype=np.uint8)


@pytest.fixture
def media(tmp_path: Path, family: tuple[int, type], clip: np.ndarray) -> list[dict[str, Any]]:
    """An image, a clip, and another image."""
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (120, 80, 3)), ("b.jpg", (40, 160, 3))):
        Image.fromarray(rng.integers(0, 256, size=size, dtype=np.uint8)).save(tmp_path / name)
    with FrameStoreWriter(tmp_path / "frames") as writer:
        writer.add(
            StoredClip(
                path="clip.mp4",
                start=None,
                end=None,
                height=clip.shape[2],
                width=clip.shape[3],
                source_fps=4.0,
                encoding="png",
                frame_indices=list(range(N_FRAMES)),
                seconds=[number / 4 for number in range(N_FRAMES)],
                frames=[encode_frame(frame, "png", jpeg_quality=95) for frame in clip],
            )
        )
    return [
        {"type": "image", "key": str(tmp_path / "a.png"), "grid_t": 1, "grid_h": 6, "grid_w": 4},
        {"type": "video", "key": "clip.mp4", "grid_t": 3, "grid_h": 4, "grid_w": 6},
        {"type": "image", "key": str(tmp_path / "b.jpg"), "grid_t": 1, "grid_h": 2, "grid_w": 8},
    ]


@pytest.fixture
def loader(tmp_path: Path, family: tuple[int, type], media: list[dict[str, Any]]) -> PatchLoader:
    return PatchLoader(patch_size=family[0], frame_store=tmp_path / "frames")


def expected_values(family: tuple[int, type], media: list[dict[str, Any]], clip: np.ndarray) -> torch.Tensor:
    patch_size, video_processor = family
    options = {"patch_size": patch_size, "image_mean": MEAN, "image_std": STD}
    values = []
    for item in media:
        if item["type"] == "video":
            processor = video_processor(do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False, **options)
            values.append(processor([torch.from_numpy(clip)], return_tensors="pt")["pixel_values_videos"])
            continue
        pixels = item["grid_h"] * item["grid_w"] * patch_size**2
        processor = Qwen2VLImageProcessor(size={"shortest_edge": 1, "longest_edge": pixels * 6 // 5}, **options)
        with Image.open(item["key"]) as image:
            result = processor(image, return_tensors="pt")
        assert result["image_grid_thw"][0].tolist() == [1, item["grid_h"], item["grid_w"]]
        values.append(result["pixel_values"])
    return torch.cat(values)


def test_patches_are_the_pixel_values_of_the_processors_in_reading_order(
    family: tuple[int, type], media: list[dict[str, Any]], clip: np.ndarray, loader: PatchLoader
) -> None:
    patches = loader.load(media)
    assert patches.dtype == torch.uint8
    assert torch.equal(normalize_patches(patches, MEAN, STD), expected_values(family, media, clip))


def test_a_sample_without_media_has_no_patches(family: tuple[int, type]) -> None:
    loader = PatchLoader(patch_size=family[0], frame_store=None)
    assert loader.load([]).shape == (0, 3 * 2 * family[0] ** 2)


def test_a_loader_can_be_sent_to_another_process(media: list[dict[str, Any]], loader: PatchLoader) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(loader)).load(media), loader.load(media))


def test_a_missing_image_is_an_error_that_names_it(loader: PatchLoader) -> None:
    item = {"type": "image", "key": "gone.png", "grid_t": 1, "grid_h": 2, "grid_w": 2}
    with pytest.raises(UserError, match=r"image 'gone\.png' cannot be read .* run the pipeline 'validate'"):
        loader.load([item])


def test_a_clip_of_another_size_than_planned_is_an_error(media: list[dict[str, Any]], loader: PatchLoader) -> None:
    with pytest.raises(UserError, match=r"clip 'clip.mp4' has .* run the pipeline 'tokenize' again"):
        loader.load([media[1] | {"grid_t": 2}])


def test_a_clip_needs_a_frame_store(family: tuple[int, type], media: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="no frame store was given"):
        PatchLoader(patch_size=family[0], frame_store=None).load(media)


@pytest.mark.parametrize("part", [(0, 1), (1, 3), (2, 3)])
def test_part_of_a_clip_is_that_part_of_its_patches(
    part: tuple[int, int], loader: PatchLoader, media: list[dict[str, Any]]
) -> None:
    clip = media[1]
    whole = loader.load([clip]).unflatten(0, (clip["grid_t"], -1))
    assert torch.equal(loader.load([clip | {"part": part}]), whole[slice(*part)].flatten(0, 1))


def test_an_image_that_was_swapped_since_validation_is_named(media: list[dict[str, Any]], loader: PatchLoader) -> None:
    image = next(item for item in media if item["type"] == "image")
    path = Path(image["key"])
    known = image | {"content_hash": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert torch.equal(loader.load([known]), loader.load([image]))
    Image.open(path).rotate(180).save(path)
    with pytest.raises(UserError, match=rf"'{path}' has changed since 'validate' ran"):
        loader.load([known])
