"""The files of a checkpoint: written with their digests, and checked before they are loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qvl_pipeline.storage.digests import DamagedError, damage_of, digest_of, file_parts, read_sealed, sealed

COMPLETE = "COMPLETE"
_NAME = re.compile(r"checkpoint-(\d+)")
_INDEX = ".metadata"
_OF_A_RANK = ".digests.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written; the message says which of its files."""


class DigestingWriter(FileSystemWriter):
    """Writes as DCP does, and in the same thread, aside from training, reads once more what this rank has written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, and beside them their digests."""
        written = super().write_data(plan, planner)
        names = {result.storage_data.relative_path for result in written.wait()}
        digests = {name: digest_of(file_parts(Path(self.path) / name)) for name in names}
        if digests:
            (Path(self.path) / f"{min(names)}{_OF_A_RANK}").write_text(json.dumps(digests), encoding="utf-8")
        return written


def mark_complete(folder: Path, facts: dict[str, Any]) -> None:
    """Write the marker that makes a checkpoint one: facts of it, and the digests that all ranks have left in it."""
    digests = {_INDEX: digest_of(file_parts(folder / _INDEX))}
    for path in folder.glob(f"*{_OF_A_RANK}"):
        digests |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    marker = sealed(facts | {"files": dict(sorted(digests.items()))})
    (folder / COMPLETE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def completed(folder: Path) -> list[tuple[int, Path]]:
    """List the complete checkpoints in a folder as `(step, path)`, oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and (path / COMPLETE).exists())


def read_marker(path: Path) -> dict[str, Any]:
    """Read what a complete checkpoint says of itself: `step`, `world_size`, the `identity` of its run, its `files`.

    Raises:
        CheckpointError: There is no checkpoint, or it is not complete.
        DamagedCheckpointError: The marker is not what was written.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give the folder of a checkpoint, such as …/checkpoint-200")
    marker = path / COMPLETE
    if not marker.exists():
        names = ", ".join(found.name for _, found in completed(path) or completed(path.parent)) or "none"
        raise CheckpointError(f"{path} is not a complete checkpoint (no {COMPLETE} in it); complete ones here: {names}")
    try:
        return read_sealed(marker)
    except DamagedError as error:
        raise DamagedCheckpointError(str(error)) from error


def damage(path: Path, share: slice = slice(None)) -> str | None:
    """Say which file of a complete checkpoint is not what was written.

    Args:
        path: The checkpoint.
        share: Which of its files to look at, by their order.
    """
    try:
        digests = read_marker(path).get("files", {})
    except DamagedCheckpointError as error:
        return str(error)
    return damage_of(path, {name: digests[name] for name in sorted(digests)[share]})


def set_aside(path: Path) -> None:
    """Take a damaged checkpoint out of those that count. It stays until its run is published."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def newest_sound(folder: Path) -> tuple[int, list[str]]:
    """Find the newest checkpoint that is what was written, and set aside the damaged ones that are newer.

    Returns:
        Its step, 0 when there is none, and what is wrong with each of those that were newer.
    """
    wrong: list[str] = []
    for step, path in reversed(completed(folder)):
        if (found := damage(path)) is None:
            return step, wrong
        set_aside(path)
        wrong.append(found)
    return 0, wrong
