from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from transformers import ProcessorMixin

from qvl_pipeline.config import ModelConfig
from qvl_pipeline.data.plan.processor import check_token_counts, load_processor
from qvl_pipeline.data.plan.tokenization import media_grids
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.store import FrameStore
from tests.data.samples import write_images, write_store


@pytest.fixture
def media_index(tmp_path: Path) -> pd.DataFrame:
    return write_images(tmp_path, {"a.png": (97, 140)})


@pytest.fixture
def store(tmp_path: Path, model: ModelConfig) -> FrameStore:
    side = 2 * model.family.patch_size
    write_store(tmp_path / "frames", {"clip.mp4": ([0, 3, 7, 10, 13], 5.0, (2 * side, 3 * side))})
    return FrameStore(tmp_path / "frames")


def check(processor: ProcessorMixin, media_index: pd.DataFrame, store: FrameStore, kinds: str = "image video") -> None:
    grids = media_grids(processor, media_index, store)
    paths = {"image": media_index["path"].iloc[0], "video": "clip.mp4"}
    items = [{"type": kind, "path": paths[kind], "start": None, "end": None} for kind in kinds.split()]
    check_token_counts(processor, [grids.medium(item) for item in items], store)


@pytest.mark.parametrize("kinds", ["image video", "image", "video", ""])
def test_counts_agree_with_the_processor(
    processor: ProcessorMixin, media_index: pd.DataFrame, store: FrameStore, kinds: str
) -> None:
    check(processor, media_index, store, kinds)


def test_a_wrong_size_in_the_media_index_is_found(
    processor: ProcessorMixin, media_index: pd.DataFrame, store: FrameStore
) -> None:
    with pytest.raises(
        UserError, match=r"the processor makes \d+ tokens and \d+ patches of '.*a.png', 'clip.mp4', but"
    ):
        check(processor, media_index.assign(width=900), store)


@pytest.mark.parametrize("part", ["image_processor", "video_processor"])
def test_a_processor_that_merges_otherwise_is_found(
    processor: ProcessorMixin, media_index: pd.DataFrame, store: FrameStore, part: str
) -> None:
    replace = type(processor).replace_image_token if part == "image_processor" else type(processor).replace_video_token
    calls = []

    def one_more_the_second_time(*args: object, **kwargs: object) -> str:
        """The first call is ours, the second the processor's own."""
        calls.append(args)
        token = processor.image_token if part == "image_processor" else processor.video_token
        return replace(processor, *args, **kwargs) + token * (len(calls) > 1)

    setattr(processor, replace.__name__, one_more_the_second_time)
    with pytest.raises(UserError, match=r"tokens and .* patches were counted"):
        check(processor, media_index, store)


def test_the_image_limits_are_those_of_the_parameters(base_model: Path, model: ModelConfig) -> None:
    limited = model.model_copy(update={"image_min_pixels": 10_000, "image_max_pixels": 12_000})
    processor = load_processor(base_model, limited)
    side = 2 * model.family.patch_size
    assert processor.image_processor.get_number_of_image_patches(1000, 1000) * model.family.patch_size**2 <= 12_000
    assert processor.image_processor.get_number_of_image_patches(side, side) * model.family.patch_size**2 >= 10_000
    image = Image.new("RGB", (1000, 1000))
    assert (
        len(processor.image_processor(image, return_tensors="pt")["pixel_values"]) * model.family.patch_size**2
        <= 12_000
    )


def altered(base_model: Path, folder: Path, part: str, **changes: object) -> Path:
    shutil.copytree(base_model, folder)
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config[part].update(changes)
    file.write_text(json.dumps(config))
    return folder


def test_another_patch_size_is_an_error(base_model: Path, model: ModelConfig, tmp_path: Path) -> None:
    folder = altered(base_model, tmp_path / "model", "video_processor", patch_size=8)
    with pytest.raises(UserError, match=f"patches of {model.family.patch_size} pixels and videos into patches of 8"):
        load_processor(folder, model)


def test_images_and_videos_normalised_differently_are_an_error(
    base_model: Path, model: ModelConfig, tmp_path: Path
) -> None:
    folder = altered(base_model, tmp_path / "model", "video_processor", image_mean=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="normalises images and videos differently"):
        load_processor(folder, model)


def test_a_processor_that_is_not_there_is_an_error(model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"path": "x", "processor": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"the processor '.*gone' cannot be loaded"):
        load_processor(tmp_path, model)
