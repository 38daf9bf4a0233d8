"""Where the safetensors files of a model are."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files


def weights_folder(path: str) -> Path:
    """Return the folder of the safetensors files, fetched from the hub where need be.

    Args:
        path: Folder or hub id.

    Raises:
        ValueError: There are none.
    """
    options = {"_raise_exceptions_for_missing_entries": False}
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options):
        files, _ = get_checkpoint_shard_files(path, index)
        return Path(files[0]).parent
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **options):
        return Path(single).parent
    raise ValueError(f"'{path}' has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: only safetensors are read")
