"""The frames of a clip as the model sees them, decoded and resized: for the frame store, and in place of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.backends import decode_with
from qvl_pipeline.media.frames.decoding import FrameTable, MediaPath, read_frame_table
from qvl_pipeline.media.opening import open_media
from qvl_pipeline.media.pixels import resize


def resized_frames(
    backend: str,
    path: MediaPath,
    table: FrameTable,
    indices: Sequence[int],
    size: Callable[[int, int], tuple[int, int]],
) -> Iterator[np.ndarray]:
    """Decode chosen frames and resize them, one at a time.

    Args:
        backend: Decoder.
        path: Video file.
        table: Its frame table.
        indices: Frame numbers, ascending.
        size: Says the height and width that a frame of the given height and width gets.

    Yields:
        Uint8 `[3, H, W]`.

    Raises:
        UserError: A frame cannot be decoded.
    """
    for frame in decode_with(backend, path, table, indices):
        yield np.ascontiguousarray(resize(frame.transpose(2, 0, 1), *size(*frame.shape[:2])))


def frames_from_source(info: Mapping[str, Any], part: slice = slice(None)) -> np.ndarray:
    """Decode the frames that a row of the store's index names: what the store would hold with a lossless encoding.

    Args:
        info: Row of `index.arrow`.
        part: Which of them; the others are decoded only as far as these refer to them.

    Returns:
        Uint8 `[T, 3, H, W]`.

    Raises:
        UserError: The file is gone, damaged, or not the one that was sampled.
    """
    indices, size = info["frame_indices"][part], (info["height"], info["width"])
    try:
        with open_media(info["path"], content_hash=info["content_hash"]) as file:
            table = read_frame_table(file)
            if indices[-1] >= len(table.seconds) or table.seconds[indices].tolist() != info["seconds"][part]:
                raise UserError(
                    f"video '{file}' shows its frames at other times than when it was sampled: run the pipeline "
                    "'sample' again"
                )
            frames = np.empty((len(indices), 3, *size), dtype=np.uint8)
            for number, frame in enumerate(resized_frames(info["backend"], file, table, indices, lambda *_: size)):
                frames[number] = frame
            return frames
    except OSError as error:
        raise UserError(f"video '{info['path']}' cannot be read ({error}); run the pipeline 'validate'") from error
