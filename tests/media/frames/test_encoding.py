from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.encoding import decode_frame, encode_frame

FRAMES = hnp.arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 40), st.integers(1, 40)))


def decoded(data: bytes, encoding: str, shape: tuple[int, ...]) -> np.ndarray:
    out = np.full(shape, 77, dtype=np.uint8)
    decode_frame(pa.py_buffer(data), encoding, out)
    return out


@pytest.mark.parametrize("encoding", ["zstd", "png"])
@settings(max_examples=60, deadline=None)
@given(frame=FRAMES)
@example(frame=np.array([[[255]], [[0]], [[128]]], dtype=np.uint8))
@example(frame=np.random.default_rng(0).integers(0, 256, (3, 1, 639), dtype=np.uint8))
@example(frame=np.random.default_rng(1).integers(0, 256, (3, 359, 1), dtype=np.uint8))
@example(frame=np.random.default_rng(2).integers(0, 256, (3, 101, 67), dtype=np.uint8))
def test_a_frame_of_any_size_comes_back_as_it_was(encoding: str, frame: np.ndarray) -> None:
    before = frame.copy()
    np.testing.assert_array_equal(decoded(encode_frame(frame, encoding, jpeg_quality=95), encoding, frame.shape), frame)
    np.testing.assert_array_equal(frame, before)


def test_a_frame_need_not_be_contiguous() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    frame = picture.transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded(encode_frame(frame, "zstd", 95), "zstd", frame.shape), frame)


def test_zstd_is_smaller_than_png_on_smooth_pictures_in_colour() -> None:
    rows, columns = np.mgrid[:120, :160]
    light = 90 + 60 * np.sin(rows / 17) * np.cos(columns / 23) + np.random.default_rng(0).normal(0, 2, rows.shape)
    frame = np.stack([light + 30, light, light - 20]).astype(np.uint8)
    sizes = {encoding: len(encode_frame(frame, encoding, 95)) for encoding in ("raw", "zstd", "png")}
    assert sizes["zstd"] < 0.8 * sizes["png"] < 0.8 * sizes["raw"]


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(
        UserError, match=r"encoded as 'webp', which this version cannot read: run the pipeline 'sample'"
    ):
        decoded(b"", "webp", (3, 2, 2))
