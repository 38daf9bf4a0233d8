"""Images a second that `validate` probes: decoded whole, and hashed."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.data_plane import Row, Section

_ROWS_AN_IMAGE = 1000
_SIZE = (640, 480)


def measure(rows: int) -> Section:
    """Probe one JPEG of 640 x 480 for a thousand of `rows`."""
    from qvl_pipeline.config import ValidateConfig
    from qvl_pipeline.data.messages import Media
    from qvl_pipeline.data.validation.media_index import probe_files

    with TemporaryDirectory() as folder:
        images = [Media("image", str(path)) for path in _write_images(Path(folder), rows // _ROWS_AN_IMAGE)]
        started = time.perf_counter()
        probes = probe_files(images, ValidateConfig())
        row = Row("JPEG 640 x 480", len(images), time.perf_counter() - started)
    if any(probe.width != _SIZE[0] for probe in probes.values()):
        raise RuntimeError("images were not decoded")
    return Section([row], ratios={"images_per_second": row.per_second}, targets={})


def _write_images(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, size=(60, 80, 3), dtype=np.uint8))
        small.resize(_SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths
