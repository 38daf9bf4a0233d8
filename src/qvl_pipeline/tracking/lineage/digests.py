"""Digests of what lies on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

# Above this size a digest covers file names and sizes only: hashing a base model would delay every start by minutes.
MAX_HASHED_BYTES = 2**30


def weights_digest(folder: Path) -> str:
    """Return a digest of a model's weights alone, whatever its size: its card names the commit and the profile."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\0".encode())
    return f"sha:{digest.hexdigest()[:32]}"


def content_digest(path: Path) -> str:
    """Return a digest of a file or folder in 36 characters, MLflow's limit.

    It starts with `sha:` when it covers the content, and with `len:` when only names and sizes (see
    `MAX_HASHED_BYTES`).
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = sum(file.stat().st_size for file in files) <= MAX_HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        if whole:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{'sha' if whole else 'len'}:{digest.hexdigest()[:32]}"
