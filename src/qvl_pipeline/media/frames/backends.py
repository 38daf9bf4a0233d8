"""The decoders to choose from: all of them return the frames that the file's own frame table names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.decoding import FrameTable, MediaPath, decode_frames

Decoder = Callable[[MediaPath, FrameTable, Sequence[int]], Iterator[np.ndarray]]

_OPTIONAL = {
    "torchcodec": ("torchcodec.decoders", "install 'qvl-pipeline[torchcodec]' and FFmpeg"),
    "decord": ("decord", "install decord"),
}
# Decoders disagree about where time starts, so the distance from the first frame is compared.
TIME_TOLERANCE_S = 1e-3


def choose_backend(asked: str) -> str:
    """Choose the decoder.

    Args:
        asked: `pyav`, `torchcodec`, `decord`, or `qwen_vl_utils`: its rules hold for all of them, and PyAV, which
            decodes fastest here, gives the same frames on every machine.

    Returns:
        `pyav`, `torchcodec` or `decord`.

    Raises:
        UserError: The decoder cannot be loaded.
    """
    if asked in ("pyav", "qwen_vl_utils"):
        return "pyav"
    module, remedy = _OPTIONAL[asked]
    try:
        importlib.import_module(module)
    # torchcodec raises RuntimeError when it finds no FFmpeg libraries that it can load.
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"video_backend is {asked}, but it cannot be loaded ({_first_line(error)}): {remedy}, or set "
            "video_backend: pyav"
        ) from error
    return asked


def decode_with(backend: str, path: MediaPath, table: FrameTable, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode chosen frames one by one.

    Args:
        backend: What `choose_backend` returned.
        path: Video file.
        table: Its frame table. It was read by PyAV, so the file is of a format that is read (`media/opening.py`);
            the other decoders cannot be told which ones are.
        indices: Frame numbers, ascending; a frame may be asked for several times.

    Yields:
        RGB frames, uint8 `[H, W, 3]`, upright.

    Raises:
        UserError: A frame cannot be decoded, or the decoder has it at another time than the file.
    """
    decoders: dict[str, Decoder] = {"pyav": decode_frames, "torchcodec": _torchcodec, "decord": _decord}
    return decoders[backend](path, table, indices)


def _torchcodec(path: MediaPath, table: FrameTable, indices: Sequence[int]) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    try:
        # One thread, as for PyAV: clips are decoded side by side.
        decoder = VideoDecoder(os.fspath(path), dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=1)
        start = decoder.get_frame_at(0).pts_seconds
        for index in indices:
            frame = decoder.get_frame_at(index)
            _check_time("torchcodec", path, table, index, frame.pts_seconds - start)
            yield frame.data.numpy()
    except (RuntimeError, IndexError) as error:
        raise _undecodable("torchcodec", path, error) from error


def _decord(path: MediaPath, table: FrameTable, indices: Sequence[int]) -> Iterator[np.ndarray]:
    import decord

    try:
        reader = decord.VideoReader(os.fspath(path), num_threads=1)
        if len(reader) != len(table.seconds):
            raise UserError(
                f"video '{path}': decord counts {len(reader)} frames, but {len(table.seconds)} are shown: "
                "set video_backend: pyav"
            )
        start = reader.get_frame_timestamp(0)[0]
        for index in indices:
            _check_time("decord", path, table, index, reader.get_frame_timestamp(index)[0] - start)
            yield reader[index].asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise _undecodable("decord", path, error) from error


def _check_time(backend: str, path: MediaPath, table: FrameTable, index: int, found: float) -> None:
    expected = table.seconds[index] - table.seconds[0]
    if abs(found - expected) > TIME_TOLERANCE_S:
        raise UserError(
            f"video '{path}': {backend} has frame {index} {found:.3f} s after the first one, but its packets say "
            f"{expected:.3f} s: set video_backend: pyav"
        )


def _undecodable(backend: str, path: MediaPath, error: Exception) -> UserError:
    return UserError(
        f"video '{path}' cannot be decoded by {backend} ({_first_line(error)}); run the pipeline 'validate'"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
