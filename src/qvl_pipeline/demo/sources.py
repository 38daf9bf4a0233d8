"""The file formats of the embedded dataset: OpenAI messages in Parquet and JSONL, and ShareGPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from qvl_pipeline.demo.questions import Part, Sample

Row = dict[str, Any]

_URL = pa.struct([("url", pa.string())])
# Nested, as dataset libraries store messages: every item has every key, and the ones it does not use are null.
_KEYS = [("type", pa.string()), ("text", pa.string()), ("image_url", _URL), ("video_url", _URL)]


def parquet_schema(keys: list[tuple[str, pa.DataType]]) -> pa.Schema:
    """The columns of the Parquet file, whose items have these keys."""
    message = pa.struct([("role", pa.string()), ("content", pa.list_(pa.struct(keys)))])
    return pa.schema([*((name, pa.string()) for name in ("id", "kind", "split")), ("messages", pa.list_(message))])


PARQUET_SCHEMA = parquet_schema(_KEYS)


def to_messages(sample: Sample) -> Row:
    """The row of a sample in OpenAI form, each content a list of items."""
    messages = [{"role": turn.role, "content": [_item(part) for part in turn.parts]} for turn in sample.turns]
    return _columns(sample) | {"messages": messages}


def to_plain_messages(sample: Sample) -> Row:
    """The row of a sample in OpenAI form, content of text alone being a plain string."""
    row = to_messages(sample)
    for message in row["messages"]:
        if [item["type"] for item in message["content"]] == ["text"]:
            message["content"] = message["content"][0]["text"]
    return row


def to_sharegpt(sample: Sample) -> Row:
    """The row of a sample in ShareGPT form: markers in the text, media in lists beside it."""
    speakers = {"user": "human", "assistant": "gpt"}
    markers = {kind: f"<{kind}>" for kind in _kinds(sample)}
    conversations = [
        {"from": speakers[turn.role], "value": "".join(markers.get(part.type, part.value) for part in turn.parts)}
        for turn in sample.turns
    ]
    media = {f"{kind}s": [part.value for part in sample.media if part.type == kind] for kind in markers}
    return _columns(sample) | {"conversations": conversations} | media


def write_sources(folder: Path, rows: dict[str, list[Row | bytes]]) -> None:
    """Write every source.

    Args:
        folder: Folder to write into.
        rows: Rows of each source of `SOURCES`; bytes are a line of JSONL written as it is.
    """
    spoken = (folder / "sounds").exists()
    schema = parquet_schema([*_KEYS, ("audio_url", _URL)]) if spoken else PARQUET_SCHEMA
    table = pa.Table.from_pylist(rows["digits_parquet"], schema=schema)
    pq.write_table(table, folder / "messages.parquet")
    lines = [row if isinstance(row, bytes) else orjson.dumps(row) for row in rows["digits_jsonl"]]
    (folder / "messages.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    sharegpt = orjson.dumps(rows["digits_sharegpt"], option=orjson.OPT_INDENT_2)
    (folder / "sharegpt.json").write_bytes(sharegpt)


def _kinds(sample: Sample) -> list[str]:
    """Kinds of media that a row has a column for: of sounds, where there are any."""
    return ["image", "video", *(["audio"] if any(part.type == "audio" for part in sample.media) else [])]


def _columns(sample: Sample) -> Row:
    return {"id": sample.id, "kind": sample.kind, "split": sample.split}


def _item(part: Part) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.value}
    return {"type": f"{part.type}_url", f"{part.type}_url": {"url": part.value}}


SOURCES = {"digits_parquet": to_messages, "digits_jsonl": to_plain_messages, "digits_sharegpt": to_sharegpt}
