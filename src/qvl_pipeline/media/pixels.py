"""Pictures to patches, exactly as the Qwen-VL image and video processors of transformers make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from qvl_pipeline.media.fast_decoding import decode_picture
from qvl_pipeline.media.opening import open_media, open_picture


def open_image(path: Path, content_hash: str | None = None) -> np.ndarray:
    """Open an image the way it is meant to be seen: upright, and over white where it is transparent.

    A white ground is the rule of qwen_vl_utils, vLLM, and of transformers' processors since 5.21 where they are given
    pictures. Given a path, transformers' `load_image` (to 5.23) drops the transparency and shows the colours below it.
    Upright (EXIF) is the rule of transformers and vLLM.

    Args:
        path: Image file.
        content_hash: Sha256 of the file that is meant; `None` takes whatever is there.

    Returns:
        RGB picture, uint8 `[3, H, W]`: a view, not to be written to, in which the channels of a pixel lie together.

    Raises:
        OSError: The file is missing or is no image.
        UserError: It is another one (`ChangedMediaError`), or a folder.
    """
    with open_media(path, content_hash=content_hash) as file, open_picture(file) as image:
        picture = decode_picture(file, image)
        if picture is not None:
            return picture
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        # Without copies: of what is RGB a conversion would be one. The view is resized twice as fast as its copy, too.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize as transformers does: torchvision's bicubic with antialiasing, on uint8.

    Args:
        picture: One or more pictures, uint8 `[..., C, H, W]`; fastest where the channels of a pixel lie together.
        height: Wanted height in pixels.
        width: Wanted width in pixels.

    Returns:
        Uint8 `[..., C, height, width]`; the picture itself when it has that size already.
    """
    if picture.shape[-2:] == (height, width):
        return picture
    if not picture.flags.writeable:
        picture = picture.copy(order="K")  # torch has no tensors that may not be written to, and warns
    resized = tvf.resize(torch.from_numpy(picture), [height, width], InterpolationMode.BICUBIC, antialias=True)
    return resized.numpy()


def patchify(
    frames: np.ndarray, out: np.ndarray, *, patch_size: int, temporal_patch_size: int, merge_size: int
) -> None:
    """Cut frames into patches, in the order in which the vision tower merges them.

    Patches run over (time, merged row, merged column, row within, column within); the values of a patch over (channel,
    time, row, column). An image is a clip of one frame. Missing frames of the last temporal patch repeat the last one.

    Args:
        frames: Uint8 `[T, C, H, W]`, H and W multiples of `patch_size * merge_size`.
        out: Where to write, contiguous uint8 `[patches, C * temporal_patch_size * patch_size**2]`.
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Frames in a patch.
        merge_size: Side of a merged token in patches.
    """
    frames = np.ascontiguousarray(frames)
    missing = -len(frames) % temporal_patch_size
    if len(frames) == 1:
        frames = np.broadcast_to(frames, (temporal_patch_size, *frames.shape[1:]))  # an image is not copied for it
    elif missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, channels, height, width = frames.shape
    side = patch_size * merge_size
    times, rows, columns = count // temporal_patch_size, height // side, width // side
    split = (times, temporal_patch_size, channels, rows, merge_size, patch_size, columns, merge_size)
    # A row of a patch is one element: NumPy moves it as a whole, many times as fast as pixel by pixel.
    row = np.dtype((np.void, patch_size))
    pixels = frames.view(row).reshape(split).transpose(0, 3, 6, 4, 7, 2, 1, 5)
    out.view(row).reshape(pixels.shape)[...] = pixels


def normalization(processor: Any) -> tuple[list[float], list[float]]:
    """Return channel means and deviations, which images and clips share: both go through the tower in one call.

    Raises:
        ValueError: They do not share them.
    """
    image, video = processor.image_processor, processor.video_processor
    mean, std = list(image.image_mean), list(image.image_std)
    if (mean, std) != (list(video.image_mean), list(video.image_std)):
        raise ValueError(
            "normalises images and videos differently, but both go through the vision tower in one call: give "
            "image_processor and video_processor the same image_mean and image_std"
        )
    return mean, std


def normalize_patches(
    patches: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """Normalise patches, on whatever device they are.

    The arithmetic is that of transformers' `rescale_and_normalize`: mean and deviation are scaled to 0..255, so that
    bytes need no rescaling of their own.

    Args:
        patches: Uint8 `[N, C * values]`, channel first within a patch.
        mean: Mean of each channel, of pixels in 0..1. A tensor on that device is not copied, nor waited for.
        std: Deviation of each channel.

    Returns:
        Float32 `[N, C * values]`.
    """
    channels = patches.to(torch.float32).view(len(patches), len(mean), -1)
    scaled_mean, scaled_std = (
        torch.as_tensor(values, device=patches.device).view(-1, 1) * 255.0 for values in (mean, std)
    )
    return channels.sub_(scaled_mean).div_(scaled_std).view(patches.shape)
