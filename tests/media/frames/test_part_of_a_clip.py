"""Ranks that share a clip read their part of it, also where its frames are not stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qvl_pipeline.media.frames import clips
from qvl_pipeline.media.frames.store import FrameStore, FrameStoreWriter, StoredClip


def test_a_part_of_a_clip_that_is_decoded_on_the_fly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, axis=1)
    monkeypatch.setattr(clips, "frames_from_source", lambda info: whole)
    with FrameStoreWriter(tmp_path) as writer:
        writer.add(StoredClip("a.mp4", None, None, 1, 1, 2.0, "raw", [0, 1, 2, 3], [0.0, 0.5, 1.0, 1.5], None))
    np.testing.assert_array_equal(FrameStore(tmp_path).frames("a.mp4", slice(2, 4)), whole[2:])
