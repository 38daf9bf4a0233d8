"""Milliseconds that a small image costs a training loader: opened, resized, cut into patches."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.data_plane import Row, Section

_IMAGES, _ROUNDS = 50, 5


def measure(rows: int) -> Section:
    """Make patches of a PNG of 64 x 64, fifty times a round; the best round counts. `rows` decides nothing."""
    from qvl_pipeline.media.pixels import open_image, patchify, resize

    patches = np.empty((16, 3 * 2 * 14**2), dtype=np.uint8)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(path)
        rounds = []
        for _ in range(_ROUNDS):
            started = time.process_time()
            for _ in range(_IMAGES):
                picture = resize(open_image(path), 56, 56)[None]
                patchify(picture, patches, patch_size=14, temporal_patch_size=2, merge_size=2)
            rounds.append(time.process_time() - started)
    row = Row("PNG 64 x 64 to patches of 14", _IMAGES, min(rounds))
    return Section([row], {"ms_an_image": 1e3 * row.seconds / row.count}, {"ms_an_image": "<= 0.5"})
