from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from qwen_vl_utils.vision_process import to_rgb
from torchvision.io import decode_jpeg
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

from qvl_pipeline.media.pixels import normalize_patches, open_image, patchify, resize

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
FAMILIES = {
    "qwen3_vl": (16, HALF, HALF, Qwen3VLVideoProcessor),
    "qwen2_5_vl": (14, CLIP_MEAN, CLIP_STD, Qwen2VLVideoProcessor),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple:
    return FAMILIES[request.param]


@pytest.fixture
def pixels() -> np.random.Generator:
    return np.random.default_rng(0)


def to_patches(frames: np.ndarray, patch_size: int) -> torch.Tensor:
    height, width = frames.shape[2:]
    count = -(-len(frames) // 2) * (height // patch_size) * (width // patch_size)
    patches = np.empty((count, 3 * 2 * patch_size**2), dtype=np.uint8)
    patchify(frames, patches, patch_size=patch_size, temporal_patch_size=2, merge_size=2)
    return torch.from_numpy(patches)


@pytest.mark.parametrize("size", [(97, 140), (64, 64), (300, 41), (1200, 900)])
def test_an_image_becomes_the_pixel_values_of_the_image_processor(
    family: tuple, pixels: np.random.Generator, size: tuple[int, int]
) -> None:
    patch_size, mean, std, _ = family
    image = pixels.integers(0, 256, size=(*size, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessor(patch_size=patch_size, image_mean=mean, image_std=std)
    expected = processor(Image.fromarray(image), return_tensors="pt")
    _, height, width = (expected["image_grid_thw"][0] * patch_size).tolist()
    resized = resize(np.ascontiguousarray(image.transpose(2, 0, 1)), height, width)
    values = normalize_patches(to_patches(resized[None], patch_size), mean, std)
    assert torch.equal(values, expected["pixel_values"])


@pytest.mark.parametrize("n_frames", [1, 2, 5, 8])
def test_a_clip_becomes_the_pixel_values_of_the_video_processor(
    family: tuple, pixels: np.random.Generator, n_frames: int
) -> None:
    patch_size, mean, std, video_processor = family
    frames = pixels.integers(0, 256, size=(n_frames, 3, 83, 130), dtype=np.uint8)
    limits = {"shortest_edge": 1, "longest_edge": 64 * 64 * max(2, n_frames)}
    processor = video_processor(
        patch_size=patch_size, image_mean=mean, image_std=std, size=limits, cap_pixels_per_frame=False
    )
    # Qwen3-VL refuses to resize a clip of one frame.
    options = {"do_sample_frames": False, "do_resize": n_frames > 1}
    if n_frames == 1:
        frames = resize(frames, 4 * patch_size, 6 * patch_size)
    expected = processor([torch.from_numpy(frames)], return_tensors="pt", **options)
    _, height, width = (expected["video_grid_thw"][0] * patch_size).tolist()
    values = normalize_patches(to_patches(resize(frames, height, width), patch_size), mean, std)
    assert torch.equal(values, expected["pixel_values_videos"])


def test_one_frame_and_all_frames_are_resized_alike(pixels: np.random.Generator) -> None:
    frames = pixels.integers(0, 256, size=(3, 3, 83, 130), dtype=np.uint8)
    one_by_one = np.stack([resize(frame, 56, 84) for frame in frames])
    np.testing.assert_array_equal(one_by_one, resize(frames, 56, 84))


@pytest.mark.parametrize("size", [(56, 84), (112, 28), (280, 308)])
def test_a_picture_is_resized_alike_however_its_pixels_lie(pixels: np.random.Generator, size: tuple[int, int]) -> None:
    view = pixels.integers(0, 256, size=(83, 130, 3), dtype=np.uint8).transpose(2, 0, 1)
    view.setflags(write=False)
    expected = resize(np.ascontiguousarray(view), *size)
    assert expected.flags.c_contiguous
    np.testing.assert_array_equal(resize(view, *size), expected)
    # And cut into the same patches.
    assert torch.equal(to_patches(resize(view, *size)[None], 14), to_patches(expected[None], 14))


def by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_is_decoded_to_the_pixels_of_pillow(
    tmp_path: Path, pixels: np.random.Generator, subsampling: int, progressive: bool
) -> None:
    options = {"subsampling": subsampling, "progressive": progressive}
    for number, (height, width) in enumerate([(48, 64), (53, 37), (1, 1)]):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, quality=85, **options)
        np.testing.assert_array_equal(open_image(path), by_pillow(path))


def test_a_jpeg_that_is_cut_off_is_an_error_and_one_of_a_camera_is_upright(
    tmp_path: Path, pixels: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "qvl_pipeline.media.fast_decoding.decode_jpeg", lambda *args: asked.append(1) or decode_jpeg(*args)
    )
    image = Image.fromarray(pixels.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg").shape == (3, 48, 64)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    with pytest.raises(OSError, match="truncated"):
        open_image(tmp_path / "b.jpg")
    assert len(asked) == 2
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    image.save(tmp_path / "c.jpg", exif=exif)
    assert open_image(tmp_path / "c.jpg").shape == (3, 64, 48)
    image.convert("CMYK").save(tmp_path / "d.jpg")
    assert open_image(tmp_path / "d.jpg").shape == (3, 48, 64)
    (tmp_path / "e.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + bytes(2 << 20))  # a film behind the photo
    assert open_image(tmp_path / "e.jpg").shape == (3, 48, 64)
    assert len(asked) == 2, "neither is the rest of a long file read into memory"


@pytest.mark.parametrize("size", [(48, 64), (53, 37), (1, 1)])
def test_a_png_of_three_colours_is_not_decoded_by_pillow_but_to_its_pixels(
    tmp_path: Path, pixels: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    Image.fromarray(pixels.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    expected = by_pillow(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), expected)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def behind_the_pixels(added: bytes) -> Callable[[Image.Image, Path], None]:
    def save(image: Image.Image, path: Path) -> None:
        image.save(path)
        png = path.read_bytes()
        path.write_bytes(png[:-12] + added + png[-12:])

    return save


def turned() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif.tobytes()


def xmp_says_that_it_is_turned(image: Image.Image, path: Path) -> None:
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=True)
    image.save(path, pnginfo=texts)


@pytest.mark.parametrize(
    "save",
    [
        behind_the_pixels(chunk(b"eXIf", turned().removeprefix(b"Exif\0\0"))),
        behind_the_pixels(chunk(b"tEXt", b"exif\0" + turned())),
        behind_the_pixels(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n42\n" + turned().hex().encode())),
        xmp_says_that_it_is_turned,
    ],
    ids=["eXIf", "a text that Pillow takes for it", "ImageMagick's", "XMP"],
)
def test_a_png_is_upright_wherever_it_says_that_it_is_turned(
    tmp_path: Path, pixels: np.random.Generator, save: Callable[[Image.Image, Path], None]
) -> None:
    save(Image.fromarray(pixels.integers(0, 256, (48, 64, 3), dtype=np.uint8)), tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").shape == (3, 64, 48)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), by_pillow(tmp_path / "a.png"))


def test_texts_and_colours_of_a_png_do_not_send_it_to_pillow(
    tmp_path: Path, pixels: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = PngInfo()
    for keyword in ("Software", "date:create"):
        texts.add_text(keyword, "a")
    image = Image.fromarray(pixels.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png", pnginfo=texts, dpi=(72, 72), icc_profile=b"a profile")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
def test_a_transparent_colour_of_a_png_is_white(tmp_path: Path, pixels: np.random.Generator, place: str) -> None:
    content = pixels.integers(1, 256, (48, 64, 3), dtype=np.uint8)
    content[0, 0] = (0, 0, 0)
    if place == "before the pixels":
        Image.fromarray(content).save(tmp_path / "a.png", transparency=(0, 0, 0))
    else:
        behind_the_pixels(chunk(b"tRNS", bytes(6)))(Image.fromarray(content), tmp_path / "a.png")
    content[0, 0] = (255, 255, 255)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), content.transpose(2, 0, 1))


def test_a_png_that_is_damaged_before_or_behind_its_pixels_is_an_error(
    tmp_path: Path, pixels: np.random.Generator
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    text = chunk(b"tEXt", b"Comment\0" + b"a" * 50)
    for damaged in (whole[:-300], whole[:3000] + bytes(8) + whole[3008:], whole[:-12] + text[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"truncated|broken|Truncated"):
            open_image(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_every_colour_mode_opens_as_the_image_processor_sees_it(
    tmp_path: Path, pixels: np.random.Generator, mode: str
) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(pixels.integers(0, 256, size=(32, 48, 3), dtype=np.uint8)).convert(mode).save(path)
    processor = Qwen2VLImageProcessor()
    with Image.open(path) as image:
        expected = processor.process_image(image, do_convert_rgb=True)
    np.testing.assert_array_equal(open_image(path), expected.numpy())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_over_white_as_in_qwen_vl_utils(
    tmp_path: Path, pixels: np.random.Generator, mode: str
) -> None:
    """transformers before 5.21 shows the hidden colours instead."""
    image = Image.fromarray(pixels.integers(0, 256, size=(32, 48, 4), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "image.png")
    expected = np.asarray(to_rgb(image.convert("RGBA"))).transpose(2, 0, 1)
    np.testing.assert_allclose(open_image(tmp_path / "image.png").astype(int), expected, atol=1)


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "image.png", transparency=0)
    picture = open_image(tmp_path / "image.png")
    assert picture[:, 0, 0].tolist() == [200, 100, 50]
    assert picture[:, 4, 4].tolist() == [255, 255, 255]


def test_an_image_is_turned_upright(tmp_path: Path, pixels: np.random.Generator) -> None:
    picture = pixels.integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held with its top to the right
    Image.fromarray(picture).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(open_image(tmp_path / "image.png"), np.rot90(picture, k=-1).transpose(2, 0, 1))


def test_normalising_leaves_the_patches_as_they_are() -> None:
    patches = torch.full((2, 24), 255, dtype=torch.uint8)
    values = normalize_patches(patches, HALF, HALF)
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.ones(2, 24))
    assert torch.equal(patches, torch.full((2, 24), 255, dtype=torch.uint8))
