"""Which base model this is: a digest of its configuration and weights, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qvl_pipeline.data.base_model import read_base_model
from qvl_pipeline.errors import UserError
from qvl_pipeline.storage.soundness import torn_weights
from qvl_pipeline.tracking.lineage.digests import content_digest

MEMORY = "base_model_digests.json"
# Reading less than this takes a second or two, which needs no word.
_SAID_FROM_BYTES = 2**30
_READERS = 8

FileState = tuple[str, int, int, int, int]


def base_model_digest(base_model: Path) -> str:
    """Return a digest of a base model's configuration and weights, the same for every copy of them.

    Every byte of `config.json` and the safetensors files counts: weights that replace others often have their names,
    shapes and sizes, and may differ in a few rows. A file is read once and its SHA-256 then remembered in `scratch`,
    beside `base_model`, for as long as its place, size, times and inode stay. In the cache of the hub, large files are
    named by their SHA-256 and not read at all; those of a hub id that are not in it yet are fetched. The processor does
    not count: its work is in the tokens.

    Args:
        base_model: The catalog entry: a folder with `manifest.json`, which is the tiny model or points to another one.

    Returns:
        36 characters, as `content_digest` does.

    Raises:
        UserError: The model that it points to is not there, or cannot be fetched.
    """
    model = read_base_model(base_model)
    if model.is_own:
        return content_digest(base_model)
    files = _files(model.path)
    digest = hashlib.sha256()
    for file, sha256 in zip(files, _sha256_of(files, base_model.parent / "scratch" / MEMORY), strict=True):
        digest.update(f"{file.name}\0{sha256}\0".encode())
    return f"sha:{digest.hexdigest()[:32]}"


def _files(path: str) -> list[Path]:
    """Return the configuration and the files of the weights, as the engine will read them."""
    from transformers.utils import CONFIG_NAME, cached_file

    from qvl_pipeline.engine.model.weight_files import weights_folder

    if not Path(path).is_dir():
        print(f"base model: {path} from the hub; what is not in its cache is fetched now", flush=True)
    try:
        if (config := cached_file(path, CONFIG_NAME)) is None:
            raise ValueError(f"it has no {CONFIG_NAME}")
        weights = sorted(weights_folder(path).glob("*.safetensors"))
        if torn := next(filter(None, map(torn_weights, weights)), None):
            raise ValueError(f"{torn}; fetch or copy it again")
        return [Path(config), *weights]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the base model '{path}' of model.load_from_pretrained_path cannot be read: {reason}"
        ) from error


def _sha256_of(files: Sequence[Path], memory: Path) -> list[str]:
    """Return the SHA-256 of each file, reading those that are not remembered."""
    known = {tuple(state): sha256 for state, sha256 in json.loads(memory.read_bytes())} if memory.exists() else {}
    states = [_state(file) for file in files]  # before reading: what is changed meanwhile is read again next time
    unread = {
        state: file
        for file, state in zip(files, states, strict=True)
        if state not in known and _name_in_hub_cache(file) is None
    }
    if unread:
        if (size := sum(state[1] for state in unread)) >= _SAID_FROM_BYTES:
            print(f"base model: reading {size / 1e9:.1f} GB of {files[0].parent} once, to know it again", flush=True)
        with ThreadPoolExecutor(_READERS) as pool:
            known |= dict(zip(unread, pool.map(_sha256, unread.values()), strict=True))
        _remember({state: known[state] for state in states if state in known}, memory)
    return [_name_in_hub_cache(file) or known[state] for file, state in zip(files, states, strict=True)]


def _state(file: Path) -> FileState:
    """Return what changes with the content: the change time does even where size and modification time are kept."""
    stat = file.stat()
    return (str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _name_in_hub_cache(file: Path) -> str | None:
    """Return the SHA-256 of a large file in the cache of `huggingface_hub`: `snapshots/<commit>/<name>` links to it."""
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remember(known: dict[FileState, str], memory: Path) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    # Several nodes may do so at once.
    handle, partial = tempfile.mkstemp(dir=memory.parent, prefix=f".{memory.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(list(known.items()), stream)
    Path(partial).replace(memory)
