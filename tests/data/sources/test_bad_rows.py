"""A corpus of bad rows, and of rows that nobody thought of: each is a sample or a named reject, and none is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.data.rejection import REJECT_RULES
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.data.sources.rows import READ_ROW, RowReader

ANSWER = {"role": "assistant", "content": "This."}


def _content(content: Any) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": content}, ANSWER]})


def _item(**item: Any) -> bytes:
    return _content([item])


def _image(path: Any) -> bytes:
    return _item(type="image", image=path)


def _video(**item: Any) -> bytes:
    return _item(type="video", video="a.mp4", **item)


def _column(**columns: Any) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": "Which?"}, ANSWER], **columns})


def _sharegpt(value: Any, **columns: Any) -> bytes:
    return orjson.dumps({"conversations": [{"from": "human", "value": value}], **columns})


BAD: dict[str, list[bytes]] = {
    "unreadable_row": [
        b"",
        b"   ",
        b"\x00",
        b"{",
        b'{"messages": [',
        b'{"messages": [],}',
        b'{"messages": [{"role": "user", "content": "a"},]}',
        b"{'messages': []}",
        b"{messages: []}",
        b'{"messages": []} {"messages": []}',
        b'{"messages": []} // a comment',
        b'{"messages": NaN}',
        b'{"messages": -Infinity}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\xc0\xaf"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a\nb"}]}'.replace(b"\n", b"\x01"),
        '{"messages": []}'.encode("utf-16"),
        b'\xef\xbb\xbf{"messages": []}',  # a byte order mark that is not at the start of its file
        b"null",
        b"true",
        b"3",
        b'"messages"',
        b"[]",
        b'[{"role": "user", "content": "a"}]',
        b'{"messages": %s%s}' % (b"[" * 5000, b"]" * 5000),
        b'{"a": %s1%s, "messages": []}' % (b'{"b":' * 400, b"}" * 400),
        b"<html></html>",
        b"messages,image",
    ],
    "duplicated_key": [
        b'{"messages": [], "messages": []}',
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        b'{"messages": [], "id": {"a": 1, "a": 1}}',
        b'{"messages": [], "k\\u003a": 1, "k:": "x"}',
    ],
    "unknown_format": [
        b"{}",
        b'{"text": "hello"}',
        b'{"messages": null}',
        b'{"messages": "hello"}',
        b'{"messages": "[{]"}',
        b'{"messages": "3"}',
        b'{"messages": 3}',
        b'{"messages": {"role": "user", "content": "a"}}',
        b'{"messages": [null]}',
        b'{"messages": [[]]}',
        b'{"messages": ["hello"]}',
        b'{"messages": [{}]}',
        b'{"messages": [{"role": null, "content": "a"}]}',
        b'{"messages": [{"role": 1, "content": "a"}]}',
        b'{"messages": [{"role": ["user"], "content": "a"}]}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"Role": "user", "Content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
        b'{"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}',
        b'{"messages": [], "conversations": []}',
        b'{"messages": [], "tools": [{"name": "f"}]}',
        b'{"messages": [], "system": 3}',
        _content(None),
        _content(3),
        _content(1.5),
        _content(True),
        _content({"type": "text", "text": "a"}),
        _content(["a"]),
        _content([None]),
        _content([[{"type": "text", "text": "a"}]]),
        _item(),
        _item(type=None),
        _item(type="document"),
        _item(type=["text"]),
        _item(type="text"),
        _item(type="text", text=3),
        _item(type="text", text=None),
        _item(type="text", text=["a"]),
        _item(type="text", text="a", image="a.png"),
        _image(3),
        _image(""),
        _image({"path": None, "url": None, "detail": "low"}),
        _image({"bytes": "AAAA"}),
        _image(["a.png", "b.png"]),
        _image("a\0.png"),
        _image("a" * 5000),
        _item(type="image", image="a.png", url="b.png"),
        _item(type="image", image="a.png", max_pixels=9),
        _item(type="image", image="a.png", video_start=1),
        _video(video_start=-1),
        _video(video_start="1"),
        _video(video_end=True),
        _video(video_end=0),
        _video(video_start=2, video_end=1),
        _video(fps=2),
        _item(type="video", video=["1.png", "2.png"]),
        _column(split="test"),
        _column(split=["train"]),
        _column(kind={"a": 1}),
        _column(task=False),
        _column(answer=["a"]),
        _column(images=[None]),
        _column(images=[3]),
        _column(image={"path": 3}),
        _sharegpt(None),
        _sharegpt(3),
        _sharegpt("<image>", image="a.png", images=["a.png"]),
        b'{"conversations": [{"from": "human", "value": "a", "weight": 2}]}',
        b'{"conversations": [{"from": 3, "value": "a"}]}',
        _item(type="audio", audio={"array": [0.1, 0.2], "sampling_rate": 16_000}),
        _item(type="audio", audio="a.wav", audio_start=3, audio_end=1),
        _item(type="audio", audio="a.wav", video_start=1),
        _item(type="input_audio", input_audio={"data": "AAAA"}),
        _sharegpt("<audio>", audio="a.wav", audios=["a.wav"]),
    ],
    "path_outside_data_folder": [
        _image("../a.png"),
        _image("x/../../a.png"),
        _image("/etc/passwd"),
        _image("file:///etc/passwd"),
        _image("file://../a.png"),
        _image({"url": "../media2/a.png"}),
        _item(type="audio_url", audio_url={"url": "../a.wav"}),
        _sharegpt("<image>", images=["../../a.png"]),
    ],
    "url_not_allowed": [
        _image("http://example.org/a.png"),
        _image("HTTPS://example.org/a.png"),
        _image("s3://bucket/a.png"),
        _image("ftp://example.org/a.png"),
        _column(images=["https://example.org/a.png"]),
        _item(type="audio", audio="https://example.org/a.wav"),
    ],
    "embedded_media_invalid": [
        _image("data:image/png;base64,AAA"),
        _image("data:image/png;base64,"),
        _image("data:image/png;base64,<svg>"),
        _image("data:image/png,abc"),
        _image("data:text/html;base64,AAAA"),
        _image("data:video/mp4;base64,AAAA"),
        _image("data:"),
        _item(type="input_audio", input_audio={"data": "AAA", "format": "wav"}),
        _item(type="audio", audio="data:image/png;base64,AAAA"),
    ],
    "preference_data": [
        _column(chosen={"role": "assistant", "content": "This."}, rejected={"role": "assistant", "content": "That."}),
        _column(rejected_response="That."),
        _column(label=False),
        _column(kto_tag="True"),
        orjson.dumps({"prompt": "Which?", "chosen": "This.", "rejected": "That."}),
        _sharegpt("Which?", rejected={"from": "gpt", "value": "That."}),
    ],
}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _ingest(path: str, data_type: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    config = IngestConfig(datasets=[{"name": "a", "path": path, "data_folder": "media", "data_type": data_type}])
    ingest_sources(config, list_files(config), DataEngineConfig(), Path())
    return tuple(pq.read_table(f"{name}.parquet").to_pylist() for name in ("samples", "rejects"))


def test_every_bad_row_is_named_and_good_ones_beside_them_are_read() -> None:
    good = _content("Which?")
    expected = [(rule, line) for rule, lines in BAD.items() for line in lines]
    assert len(expected) >= 60
    # A URL may hold a secret where media are behind one: test_paths.py.
    assert BAD.keys() | {"url_with_secret"} == REJECT_RULES.keys()
    # Every bad line is between good ones; UTF-16 may hold what ends a line.
    lines = [line for _, bad in expected for line in (good, bad.replace(b"\n", b""))]
    Path("a.jsonl").write_bytes(b"\n".join([*lines, good]))
    samples, rejects = _ingest("a.jsonl", "jsonl")
    found = {reject["row"]: (reject["rule"], reject["detail"]) for reject in rejects}
    for number, (rule, line) in enumerate(expected):
        row = 2 * number + 1
        assert found.get(row, ("it was accepted",))[0] == rule, line[:200]
        assert found[row][1].startswith(f"row {row}: ")
        assert len(found[row][1]) < 500
    assert [sample["row"] for sample in samples] == list(range(0, len(lines) + 1, 2))
    assert len(samples) + len(rejects) == len(lines) + 1


def test_bad_rows_of_a_table_are_named_too() -> None:
    turns = [{"role": "user", "content": "a"}]
    nan = float("nan")
    rows = [
        {"messages": turns, "answer": nan},
        {"messages": turns, "split": "train"},
        {"messages": None},
        {"messages": [None]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": turns, "images": [{"path": "../a.png", "bytes": None}]},
        {"messages": turns, "images": [{"path": "a.png", "bytes": b""}]},
        {"messages": turns, "images": [{"path": None, "bytes": b"image"}]},
    ]
    columns = {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "answer": pa.float64(),
        "split": pa.string(),
        "images": pa.list_(pa.struct({"path": pa.string(), "bytes": pa.binary()})),
    }
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), "a.parquet")
    samples, rejects = _ingest("a.parquet", "parquet")
    assert [(reject["row"], reject["rule"]) for reject in rejects] == [
        (0, "unknown_format"),
        (2, "unknown_format"),
        (3, "unknown_format"),
        (4, "unknown_format"),
        (5, "path_outside_data_folder"),
        (6, "embedded_media_invalid"),
    ]
    assert rejects[0]["detail"] == "row 0: 'answer' is nan, not a text"
    assert [sample["row"] for sample in samples] == [1, 7]
    assert Path(samples[1]["media"][0]["path"]).read_bytes() == b"image"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = st.text(max_size=12) | st.sampled_from(["a.png", "../a", "/a", "s3://b/a", "data:image/png;base64,AAAA", "a\0"])
LOCATION = PATHS | JSON | st.fixed_dictionaries({}, optional={"url": PATHS, "path": PATHS, "bytes": st.binary() | JSON})
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image", "image_url", "video", "video_url", "audio"]) | JSON,
        "text": st.text() | JSON,
        "image": LOCATION,
        "image_url": LOCATION,
        "video": LOCATION,
        "video_start": st.floats() | JSON,
        "video_end": st.floats() | JSON,
    },
)
CONTENT = st.sampled_from(["<image>a<video>", "a"]) | st.lists(ITEM | JSON, max_size=3) | JSON
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant"]) | JSON,
        "content": CONTENT,
        "from": st.sampled_from(["human", "gpt"]) | JSON,
        "value": CONTENT,
    },
)
TURNS = st.lists(TURN | JSON, max_size=3) | JSON
ROW = st.fixed_dictionaries(
    {"messages": TURNS},
    optional={
        "conversations": TURNS,
        "system": JSON,
        "image": LOCATION,
        "images": st.lists(LOCATION, max_size=3) | JSON,
        "videos": st.lists(LOCATION, max_size=3) | JSON,
        "split": st.sampled_from(["train", "eval", "test"]) | JSON,
        "kind": JSON,
        "answer": JSON,
        "more": JSON,
    },
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> RowReader:
    config = IngestConfig(
        datasets=[{"name": "a", "path": "a", "data_folder": "media", "data_type": "jsonl"}],
        eval_fraction=0.5,
        cache_folder=str(tmp_path_factory.mktemp("cache")),
    )
    return RowReader(config.datasets[0], config)


def _is_sample_or_named_reject(row: dict[str, Any]) -> None:
    # As it is written: of the right types, and as UTF-8.
    (row,) = pa.array([row], READ_ROW).to_pylist()
    if row["rule"] is not None:
        assert row["rule"] in REJECT_RULES
        assert row["detail"]
        return
    items = [item["type"] for turn in orjson.loads(row["messages"]) for item in turn["content"]]
    assert set(items) <= {"text", "image", "video"}
    assert row["split"] in ("train", "eval", None)
    assert isinstance(orjson.loads(row["metadata"]), dict)
    assert all(use["path"] for use in row["media"])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=ROW | JSON)
def test_any_columns_are_a_sample_or_a_named_reject(reader: RowReader, row: Any) -> None:
    if isinstance(row, dict):
        _is_sample_or_named_reject(reader.read(row, None, None))


def _as_json(row: Any) -> bytes:
    return orjson.dumps(row, default=lambda value: value.hex() if isinstance(value, bytes) else str(value))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=ROW | JSON, data=st.data())
def test_any_line_is_a_sample_or_a_named_reject(reader: RowReader, row: Any, data: st.DataObject) -> None:
    try:
        line = _as_json(row)
    except TypeError:  # a surrogate or a large integer, which orjson does not write
        line = repr(row).encode(errors="replace")
    _is_sample_or_named_reject(reader.read(line, None, None))
    # One byte is lost, and one damaged.
    place = data.draw(st.integers(0, len(line)))
    _is_sample_or_named_reject(reader.read(line[:place] + line[place + 1 :], None, None))
    _is_sample_or_named_reject(reader.read(line[:place] + b"\xff" + line[place + 1 :], None, None))
