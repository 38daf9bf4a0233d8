"""The table `media_index`: every media file that samples refer to, as probed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import daft
import pyarrow as pa

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.tables import MEDIA_INDEX
from qvl_pipeline.data.validation.rules import Probes, broken_by_media, first_error
from qvl_pipeline.media.probe import Probe
from qvl_pipeline.media.probe_worker import ProbeWorker

_STRING_FACTS = ("missing", "failure", "content_hash", "codec", "mode")
_FACTS = pa.struct(
    [(name, pa.string()) for name in _STRING_FACTS]
    + [(name, pa.int64()) for name in ("width", "height", "n_frames", "size_bytes", "sample_rate", "channels")]
    + [(name, pa.float64()) for name in ("fps", "duration_s", "declared_duration_s", "longest_gap", "peak")]
)
# A batch has a process of its own, which takes as long to start as some hundred small files to probe.
_BATCH_FILES = (16, 1024)


def probe_files(media: Iterable[Media], config: ValidateConfig, folders: Sequence[str] | None = None) -> Probes:
    """Probe every file once, on all cores.

    Args:
        media: Uses of files.
        config: Limits; `probe_timeout_s` and `max_image_pixels` hold back the decoders.
        folders: Real paths of the folders that files must be inside of; `None` where they may be anywhere.

    Returns:
        What was found, by (type, path) in sorted order.

    Raises:
        RuntimeError: Daft ended early, as it does on Ctrl-C, or the probing processes do not start.
    """
    files = sorted({use[:2] for use in media})
    if not files:
        return {}

    @daft.func.batch(
        return_dtype=daft.DataType.from_arrow_type(_FACTS), unnest=True, batch_size=_batch_size(len(files))
    )
    def probe(kinds: daft.Series, paths: daft.Series) -> pa.Array:
        limits = {"timeout_s": config.probe_timeout_s, "max_pixels": config.max_image_pixels}
        with ProbeWorker(**limits, folders=folders) as worker:
            pairs = zip(kinds.to_pylist(), paths.to_pylist(), strict=True)
            return pa.array([asdict(worker.probe(path, kind)) for kind, path in pairs], _FACTS)

    kinds, paths = zip(*files, strict=True)
    frame = daft.from_pydict({"kind": list(kinds), "path": list(paths)})
    facts = frame.select(probe(daft.col("kind"), daft.col("path"))).to_pylist()
    if len(facts) != len(files):
        raise RuntimeError(f"only {len(facts)} of {len(files)} media files were probed: Daft was interrupted")
    return {file: Probe(**found) for file, found in zip(files, facts, strict=True)}


def index_media(probes: Probes, config: ValidateConfig) -> pa.Table:
    """Make the table `media_index`, sorted by path; `rule` is the first rule that the whole file breaks."""
    rows = []
    for (kind, path), probe in sorted(probes.items(), key=lambda entry: entry[0][::-1]):
        broken = broken_by_media([Media(kind, path)], probes, config)
        rule, detail = first_error(broken, config) or (None, None)
        rows.append(asdict(probe) | {"path": path, "type": kind, "rule": rule, "detail": detail})
    return pa.Table.from_pylist(rows, MEDIA_INDEX)


def _batch_size(files: int) -> int:
    fewest, most = _BATCH_FILES
    return min(max(files // (4 * (os.cpu_count() or 1)), fewest), most)
