"""The file type of a source, told by what is in it, and where that does not tell, by its name."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa

from qvl_pipeline.data.sources.files.texts import decompressed
from qvl_pipeline.data.sources.raw import ENDINGS
from qvl_pipeline.errors import UserError

_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}
# What the first character of a text says; `json` is a list of rows.
_FIRST = {b"[": "json", b"{": "jsonl"}
# In a folder. Arrow files are also those of Hugging Face datasets, which are told by their `state.json`.
_IN_FOLDERS = {kind: endings for kind, endings in ENDINGS.items() if kind != "hf_dataset"}
_HEAD_BYTES = 4096
_TAR_AT = 257  # where the magic of a tar archive is


def detect_type(path: Path) -> str:
    """Return the `data_type` of a file, or of the files of a folder.

    Raises:
        UserError: There is none, more than one, or none that is known.
    """
    if path.is_dir():
        return _folder_type(path)
    if not path.is_file():
        raise UserError(f"the data '{path}' does not exist: name a file of rows, or a folder of such files")
    try:
        with path.open("rb") as raw:
            head = decompressed(raw).read(_HEAD_BYTES)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"the data '{path}' cannot be read: {' '.join(str(error).split())}") from error
    by_name = next((kind for kind, endings in _IN_FOLDERS.items() if path.name.lower().endswith(endings)), None)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None and head[_TAR_AT:].startswith(b"ustar"):
        kind = "webdataset"
    if kind is None and by_name not in ("csv", "arrow", "webdataset"):
        kind = _FIRST.get(head.lstrip()[:1])
    if not head or (kind or by_name) is None:
        what = "is empty" if not head else f"is of no known type ({', '.join(ENDINGS)})"
        raise UserError(f"the data '{path}' {what}: name a file of rows, or a folder of such files")
    return kind or by_name


def _folder_type(folder: Path) -> str:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "hf_dataset"
    names = [path.name.lower() for path in folder.rglob("*") if path.is_file()]
    found = Counter(kind for name in names for kind, endings in _IN_FOLDERS.items() if name.endswith(endings))
    if not found:
        raise UserError(f"the folder '{folder}' holds no file of rows ({', '.join(_IN_FOLDERS)}): name another one")
    if len(found) > 1:
        found.pop("webdataset", None)  # beside rows, archives are their media
    if len(found) > 1:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
        raise UserError(
            f"the folder '{folder}' holds files of several types ({kinds}): name one of them, not the folder"
        )
    return next(iter(found))
