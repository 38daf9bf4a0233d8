"""From the declared sources to one table of samples, and one of the rows that could not be read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import daft
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from qvl_pipeline.config import DatasetSource, IngestConfig
from qvl_pipeline.data.messages import CONVERSATION_COLUMNS, Media, Message, Row, to_conversation
from qvl_pipeline.data.paths import MediaFolder
from qvl_pipeline.data.readers import map_records
from qvl_pipeline.data.rejection import RejectedRowError, quote, type_name
from qvl_pipeline.data.tables import MEDIA, REJECTS, SAMPLES

DEFAULT_TASK = "exact_match"
SPLITS = ("train", "eval")
OWN_COLUMNS = CONVERSATION_COLUMNS | {"system", "tools", "split", "kind", "task", "answer"}

_BATCH_ROWS = 4096
_KINDS = {(0, 0): "text", (1, 0): "single_image", (2, 0): "two_images", (0, 1): "video", (0, 2): "two_videos"}
# A row before its number is known: what a sample is made of, or why there is none.
_READ_ROW = pa.struct(
    [(name, pa.string()) for name in ("rule", "detail", "split", "kind", "task", "answer", "messages", "metadata")]
    + [("media", MEDIA)]
)


def ingest_sources(config: IngestConfig, files: Sequence[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    """Read every row of every source.

    Args:
        config: Declared sources, and how splits are assigned.
        files: Files of the raw manifest: `source` and `path` of each, those of a source in order.

    Returns:
        The tables `samples` and `rejects`, in the order of the sources and of their rows. Each row is in one of them.

    Raises:
        UserError: A file as a whole cannot be read.
    """
    samples, rejects = [SAMPLES.empty_table()], [REJECTS.empty_table()]
    for source in config.datasets:
        rows = _number(_read_files(source, files, config), source.name)
        samples.append(_as_samples(rows.filter(pc.is_null(rows["rule"])), config))
        rejects.append(rows.filter(pc.is_valid(rows["rule"])).select(REJECTS.names).cast(REJECTS))
    return pa.concat_tables(samples), pa.concat_tables(rejects)


def _read_files(source: DatasetSource, files: Sequence[dict[str, Any]], config: IngestConfig) -> pa.Table:
    """Read the files of a source one after the other, on all cores; rows keep their order."""

    @daft.func.batch(return_dtype=daft.DataType.from_arrow_type(_READ_ROW), unnest=True, batch_size=_BATCH_ROWS)
    def read_rows(records: daft.Series) -> pa.Array:
        return pa.array([_read_row(record, folder, source, config) for record in records.to_pylist()], _READ_ROW)

    folder = MediaFolder(Path(source.data_folder))
    tables = [pa.schema(_READ_ROW).empty_table()]
    for path in (Path(file["path"]) for file in files if file["source"] == source.name):
        tables.append(map_records(path, source.data_type, read_rows).cast(pa.schema(_READ_ROW)))
    return pa.concat_tables(tables)


def _number(rows: pa.Table, source: str) -> pa.Table:
    """Add `source` and `row`, and say in each detail which row it is about."""
    numbers = pa.array(range(rows.num_rows), pa.int64())
    details = pc.binary_join_element_wise("row ", numbers.cast(pa.string()), ": ", rows["detail"], "")
    rows = rows.set_column(rows.column_names.index("detail"), "detail", details)
    return rows.append_column("row", numbers).append_column("source", pa.array([source] * rows.num_rows, pa.string()))


def _as_samples(rows: pa.Table, config: IngestConfig) -> pa.Table:
    ids = pc.binary_join_element_wise(rows["source"], rows["row"].cast(pa.string()), "/")
    pairs = zip(rows["split"].to_pylist(), ids.to_pylist(), strict=True)
    splits = pa.array([split or assign_split(sample_id, config) for split, sample_id in pairs], pa.string())
    rows = rows.set_column(rows.column_names.index("split"), "split", splits).append_column("sample_id", ids)
    return rows.select(SAMPLES.names).cast(SAMPLES)


def assign_split(key: str, config: IngestConfig) -> str:
    """Assign `train` or `eval` by a hash of `key`: the same for ever, whatever rows come and go around it."""
    digest = hashlib.sha256(f"{config.seed}:{key}".encode()).digest()
    return "eval" if int.from_bytes(digest[:8]) < config.eval_fraction * 2**64 else "train"


def _read_row(record: bytes | Row, folder: MediaFolder, source: DatasetSource, config: IngestConfig) -> dict[str, Any]:
    try:
        return _to_sample(_parse(record), folder, source, config)
    except RejectedRowError as error:
        return {"rule": error.rule, "detail": error.detail}
    except (RecursionError, orjson.JSONEncodeError) as error:
        return {"rule": "unreadable_row", "detail": f"it is nested too deeply ({error})"}


def _parse(record: bytes | Row) -> Row:
    if isinstance(record, dict):
        return record
    if not record.strip():
        raise RejectedRowError("unreadable_row", "the line is empty")
    try:
        row = orjson.loads(record)
    except orjson.JSONDecodeError as error:
        raise RejectedRowError("unreadable_row", f"it is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RejectedRowError("unreadable_row", f"it is {type_name(row)}, not an object")
    return row


def _to_sample(row: Row, folder: MediaFolder, source: DatasetSource, config: IngestConfig) -> dict[str, Any]:
    messages, found = to_conversation(row)
    media = [use._replace(path=folder.locate(use.path)) for use in found]
    split = source.split or _text(row, "split")
    if split not in (*SPLITS, None):
        raise RejectedRowError(
            "unknown_format", f"its split is {quote(split)}; known are train and eval, or set the split of the source"
        )
    if split is None and media:
        # By the first medium instead of the row, so that rows about one picture do not leak into the other split.
        split = assign_split(media[0].path, config)
    answer = _text(row, "answer")
    return {
        "split": split,
        "kind": _text(row, "kind") or derive_kind(media),
        "task": _text(row, "task") or DEFAULT_TASK,
        "answer": _last_answer(messages) if answer is None else answer,
        "messages": orjson.dumps(messages).decode(),
        "media": [use._asdict() for use in media],
        "metadata": _to_json({key: value for key, value in row.items() if key not in OWN_COLUMNS}),
    }


def derive_kind(media: Sequence[Media]) -> str:
    """Name the kind of a sample by its media, when its row does not."""
    count = Counter(use.type for use in media)
    images, videos = count["image"], count["video"]
    if images and videos:
        return "image_and_video"
    return _KINDS.get((images, videos)) or ("multi_image" if images else "multi_video")


def _last_answer(messages: Sequence[Message]) -> str:
    turns = [message["content"] for message in messages if message["role"] == "assistant"]
    return "".join(item["text"] for item in turns[-1] if item["type"] == "text") if turns else ""


def _text(row: Row, column: str) -> str | None:
    """Return the text of a column, `None` when the row has none; a number counts as its text."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RejectedRowError("unknown_format", f"'{column}' is {type_name(value)}, not a text")


def _to_json(columns: Row) -> str:
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(columns, default=_stand_in, option=options).decode()


def _stand_in(value: Any) -> str:
    """What stands in JSON for a value of Parquet that JSON has no form for; of bytes only their number."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
