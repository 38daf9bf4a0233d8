"""One row of a source to one sample, or to the reason why there is none."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from qvl_pipeline.config import DatasetSource, IngestConfig
from qvl_pipeline.data.messages import Media, Message
from qvl_pipeline.data.rejection import RejectedRowError, quote, type_name
from qvl_pipeline.data.sources.embedded import is_embedded, store_embedded
from qvl_pipeline.data.sources.files.webdataset import read_sample
from qvl_pipeline.data.sources.forms.benchmarks import benchmark_row
from qvl_pipeline.data.sources.forms.checked import Row
from qvl_pipeline.data.sources.forms.conversations import TURN_COLUMNS, read_columns, to_conversation
from qvl_pipeline.data.sources.forms.tools import without_null_keys
from qvl_pipeline.data.sources.paths import media_folder, name_of, name_prefixes
from qvl_pipeline.data.tables import AUTO, MEDIA
from qvl_pipeline.kinds import BENCHMARK
from qvl_pipeline.tokens.thoughts import without_thoughts

SPLITS = ("train", "eval")
_SAMPLE_COLUMNS = frozenset({"split", "kind", "task", "answer"})

# A row before its number is known: what a sample is made of, or why there is none.
READ_ROW = pa.struct(
    [(name, pa.string()) for name in ("rule", "detail", "split", "kind", "task", "answer", "messages", "metadata")]
    + [("media", MEDIA)]
)

# By the types of the media; where there are several of one, or of different types, by which types there are.
_KINDS = {
    (): "text",
    ("image",): "single_image",
    ("image", "image"): "two_images",
    ("video",): "video",
    ("video", "video"): "two_videos",
    ("audio",): "audio",
}
_MANY_KINDS = {
    ("image",): "multi_image",
    ("video",): "multi_video",
    ("audio",): "multi_audio",
    ("image", "video"): "image_and_video",
    ("audio", "image"): "audio_and_image",
    ("audio", "video"): "audio_and_video",
    ("audio", "image", "video"): "audio_image_and_video",
}


class RowReader:
    """Reads the rows of one source; also in another process, to which it is sent."""

    def __init__(self, source: DatasetSource, config: IngestConfig) -> None:
        """Take the source, and the block that declares it."""
        self._source = source
        self._config = config
        self._folder = media_folder(source.data_folder)
        self._embedded = Path(config.cache_folder).absolute() / "embedded"
        self._root = f"{Path.cwd()}/"
        self._prefixes = name_prefixes(other.data_folder for other in config.datasets)

    def read(self, record: bytes | Row, problem: str | None, split: str | None) -> dict[str, Any]:
        """Read one row.

        Args:
            record: JSON of the row, its columns, or a sample of a shard.
            problem: Why the row could not be taken out of its file; `None` when it could.
            split: Split that the file of the row is for; `None` when it is for none.

        Returns:
            A `READ_ROW`: `rule` and `detail`, or all of the others. `split` is null where none is stated and no medium
            decides it.
        """
        try:
            if problem is not None:
                raise RejectedRowError("unreadable_row", problem)
            return self._to_sample(record, split)
        except RejectedRowError as error:
            return {"rule": error.rule, "detail": error.detail}
        except (RecursionError, orjson.JSONEncodeError) as error:
            return {"rule": "unreadable_row", "detail": f"it is nested too deeply ({error})"}

    def _to_sample(self, record: bytes | Row, split: str | None) -> dict[str, Any]:
        if self._source.data_type == "webdataset":
            row, (messages, found) = read_sample(record, self._source.format, _parse)
        else:
            row = _parse(record)
            if self._source.benchmark:
                row = benchmark_row(row, self._source.benchmark, self._source.name)
            messages, found = to_conversation(row, self._source.format)
        media = [Media(use.type, self._locate(use), use.start, use.end) for use in found]
        split = self._source.split or split or _text(row, "split")
        if split not in (*SPLITS, self._source.split, None):
            raise RejectedRowError(
                "unknown_format",
                f"its split is {quote(split)}; known are train and eval, or set the split of the source",
            )
        if split is None and media:
            # By the first medium instead of the row, so that rows about one picture do not leak into the other split.
            name = self._name(found[0], media[0].path) if self._config.eval_fraction else ""
            split = assign_split(name, self._config)
        kind = _text(row, "kind") or derive_kind(media)
        if kind.startswith(BENCHMARK) and not self._source.benchmark:
            raise RejectedRowError(
                "unknown_format",
                f"its kind is {quote(kind)}, which is that of a benchmark: rename it, or say `benchmark` of the source",
            )
        answer = _text(row, "answer")
        read = read_columns(row, self._source.format)
        return {
            "split": split,
            "kind": kind,
            "task": _text(row, "task") or AUTO,
            "answer": _last_answer(messages) if answer is None else answer,
            "messages": orjson.dumps(messages).decode(),
            "media": [{"type": use.type, "path": use.path, "start": use.start, "end": use.end} for use in media],
            "metadata": _to_json({key: row[key] for key in row.keys() - read - _SAMPLE_COLUMNS}),
        }

    def _locate(self, use: Media) -> str:
        if not is_embedded(use.path):
            return self._folder.locate(use.path)
        return str(store_embedded(use.path, use.type, self._embedded)).removeprefix(self._root)

    def _name(self, use: Media, path: str) -> str:
        """What a medium is called wherever it lies; embedded media, which have no name, by their content."""
        return Path(path).stem if is_embedded(use.path) else name_of(path, self._prefixes)


def assign_split(key: str, config: IngestConfig) -> str:
    """Assign `train` or `eval` by a hash of `key`: the same for ever, whatever rows come and go around it."""
    if not config.eval_fraction:
        return "train"
    digest = hashlib.sha256(f"{config.seed}:{key}".encode()).digest()
    return "eval" if int.from_bytes(digest[:8]) < config.eval_fraction * 2**64 else "train"


def derive_kind(media: Sequence[Media]) -> str:
    """Name the kind of a sample by its media, when its row does not."""
    types = tuple(sorted([use.type for use in media]))
    return _KINDS.get(types) or _MANY_KINDS[tuple(sorted(set(types)))]


def _parse(record: bytes | Row) -> Row:
    if isinstance(record, dict):
        return without_null_keys(record, TURN_COLUMNS)
    if not record.strip():
        raise RejectedRowError("unreadable_row", "the line is empty")
    try:
        row = orjson.loads(record)
    except orjson.JSONDecodeError as error:
        raise RejectedRowError("unreadable_row", f"it is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RejectedRowError("unreadable_row", f"it is {type_name(row)}, not an object")
    # orjson keeps the last of two values of a key. If it did, fewer colons are left; an escaped colon hides as one.
    if record.count(b":") != orjson.dumps(row).count(b":") or b"\\u003" in record:
        json.loads(record, object_pairs_hook=_unique_keys)
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise RejectedRowError("duplicated_key", f"an object in it has the key {quote(key)} twice")
    return row


def _last_answer(messages: Sequence[Message]) -> str:
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns or turns[-1].get("tool_calls"):
        return ""  # how a call is written is the template's business: `tokenize` fills it in
    said = "".join(item["text"] for item in turns[-1]["content"] if item["type"] == "text")
    text = without_thoughts(said)
    # A JSON list of texts would be a choice of acceptable answers. This one is what the assistant says.
    return orjson.dumps([text]).decode() if text.lstrip().startswith('["') else text


def _text(row: Row, column: str) -> str | None:
    """Return the text of a column, `None` when the row has none; a number counts as its text."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    given = value if isinstance(value, float) else type_name(value)
    raise RejectedRowError("unknown_format", f"'{column}' is {given}, not a text")


def _to_json(columns: Row) -> str:
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(columns, default=_stand_in, option=options).decode()


def _stand_in(value: Any) -> str:
    """What stands in JSON for a value of Parquet that JSON has no form for; of bytes only their number."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
