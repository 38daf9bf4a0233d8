"""Ranks and loader processes that share a clip read their part of it, also where its frames are not stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvl_pipeline.media.frames import clips
from qvl_pipeline.media.frames.decoding import read_frame_table
from qvl_pipeline.media.frames.store import FrameStore, FrameStoreWriter, StoredClip
from tests.media.files import write_video


def test_only_the_part_of_a_clip_that_is_asked_for_is_decoded_on_the_fly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_video(tmp_path / "a.mp4", frames=8))
    indices = [0, 2, 4, 7]
    seconds = read_frame_table(path).seconds[indices].tolist()
    with FrameStoreWriter(tmp_path / "frames") as writer:
        writer.add(StoredClip(path, None, None, 16, 32, 2.0, "raw", indices, seconds, None))
    asked, decode = [], clips.decode_with

    def recording(backend: str, path: Any, table: Any, indices: Sequence[int]) -> Any:
        asked.append(list(indices))
        return decode(backend, path, table, indices)

    monkeypatch.setattr(clips, "decode_with", recording)
    store = FrameStore(tmp_path / "frames")
    whole, part = store.frames(path), store.frames(path, slice(2, 4))
    np.testing.assert_array_equal(part, whole[2:])
    assert not np.array_equal(whole[2], whole[3])
    assert asked == [indices, indices[2:]]
