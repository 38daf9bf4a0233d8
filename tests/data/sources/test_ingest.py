"""Every row of every source ends up in `samples` or `rejects`, in order, with the columns of the contract."""

from __future__ import annotations

import base64
import contextlib
import datetime
import decimal
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.data import batches
from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.rejection import REJECT_RULES
from qvl_pipeline.data.sources import ingest
from qvl_pipeline.data.sources.files import limits
from qvl_pipeline.data.sources.files.readers import RowFiles, Slab
from qvl_pipeline.data.sources.finished import begin_part
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.data.sources.row_workers import RowWorkers
from qvl_pipeline.data.sources.rows import assign_split, derive_kind
from qvl_pipeline.data.tables import REJECTS, SAMPLES
from qvl_pipeline.evaluation.metrics import references

Tables = tuple[pa.Table, pa.Table]


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _row(question: str = "Which?", *images: str, **columns: Any) -> dict[str, Any]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    return {"messages": [{"role": "user", "content": content}, answer], **columns}


def _write(name: str, rows: list[Any]) -> dict[str, str]:
    """Write rows as the kind of file that the suffix says, and declare it as a source."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        lines = [row if isinstance(row, bytes) else orjson.dumps(row) for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    else:
        path.write_bytes(orjson.dumps(rows))
    return {"name": path.stem, "path": name, "data_folder": "media", "data_type": path.suffix[1:]}


def _ingest(*sources: dict[str, Any], **options: Any) -> Tables:
    config = IngestConfig(datasets=list(sources), **options)
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    ingest_sources(config, list_files(config), DataEngineConfig(), folder)
    return pq.read_table(folder / "samples.parquet"), pq.read_table(folder / "rejects.parquet")


def test_a_sample_has_the_columns_of_the_contract() -> None:
    clip = {"type": "video", "video": "b.mp4", "video_start": 1, "video_end": 2}
    row = _row("Which?", "a.png", tags=["x"], kind="riddle", split="eval", task="f1", answer="Both.", id=7)
    row["messages"][0]["content"].insert(0, clip)
    samples, rejects = _ingest(_write("a.jsonl", [row]))
    assert samples.schema == SAMPLES
    assert (rejects.schema, rejects.num_rows) == (REJECTS, 0)
    assert samples.to_pylist() == [
        {
            "sample_id": "a/0",
            "source": "a",
            "row": 0,
            "split": "eval",
            "kind": "riddle",
            "task": "f1",
            "answer": "Both.",
            "messages": '[{"role":"user","content":'
            '[{"type":"video"},{"type":"image"},{"type":"text","text":"Which?"}]},'
            '{"role":"assistant","content":[{"type":"text","text":"This."}]}]',
            "media": [
                {"type": "video", "path": "media/b.mp4", "start": 1.0, "end": 2.0},
                {"type": "image", "path": "media/a.png", "start": None, "end": None},
            ],
            "metadata": '{"id":7,"tags":["x"]}',
        }
    ]


def test_a_row_with_messages_alone_gets_defaults() -> None:
    samples, _ = _ingest(_write("a.jsonl", [_row()]))
    columns = ("split", "kind", "task", "answer", "media", "metadata")
    assert samples.select(columns).to_pylist() == [
        dict(zip(columns, ("train", "text", "auto", "This.", [], "{}"), strict=True))
    ]


def test_default_answer_is_the_text_of_the_last_assistant_turn() -> None:
    turns = _row()["messages"] + _row()["messages"]
    turns[3] = {"role": "assistant", "content": [{"type": "text", "text": "No, "}, {"type": "text", "text": "that."}]}
    only_user = {"messages": turns[:1]}
    samples, _ = _ingest(_write("a.jsonl", [{"messages": turns}, only_user, _row(answer=5), _row(answer="")]))
    assert samples["answer"].to_pylist() == ["No, that.", "", "5", ""]


def test_a_source_without_rows_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    samples, rejects = _ingest(_write("a.jsonl", []))
    assert (samples.num_rows, rejects.num_rows) == (0, 0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "a: 0 rows read, 0 of them rejected")
    ]


def test_a_list_that_the_assistant_says_is_one_answer_and_no_choice_of_them() -> None:
    said = {"role": "assistant", "content": '["cat", "dog"]'}
    stated = '["7", "seven"]'
    samples, _ = _ingest(_write("a.jsonl", [{"messages": [said]}, {"messages": [said], "answer": stated}]))
    assert [references(answer) for answer in samples["answer"].to_pylist()] == [['["cat", "dog"]'], ["7", "seven"]]


def test_columns_that_only_another_form_reads_are_put_aside() -> None:
    alpaca = {"instruction": "Which?", "input": "", "output": "This.", "id": 1}
    samples, _ = _ingest(_write("a.jsonl", [_row(input="x", text="y"), alpaca]))
    assert [orjson.loads(text) for text in samples["metadata"].to_pylist()] == [{"input": "x", "text": "y"}, {"id": 1}]
    assert samples["answer"].to_pylist() == ["This.", "This."]


def test_calls_in_a_table_have_their_own_arguments_alone() -> None:
    """A column of calls gives each the arguments of all."""
    called = [
        {"tools": [{"name": name}], "messages": [{"role": "user", "content": "?"}, _calling(name, **arguments)]}
        for name, arguments in (("a", {"city": "Rome"}), ("b", {"days": 2}))
    ]
    tables = [_ingest(_write(f"a.{kind}", called))[0] for kind in ("jsonl", "parquet")]
    assert tables[0].num_rows == 2
    assert tables[0].equals(tables[1])
    null = [called[0], {"messages": [{"role": "user", "content": "?"}, _calling("b", days=None)]}]
    messages = orjson.loads(_ingest(_write("b.jsonl", null))[0]["messages"].to_pylist()[1])
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"days": None}


def _calling(name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


REJECTED = {
    b"{": ("unreadable_row", "row 0: it is not JSON ("),
    b'{"messages": NaN}': ("unreadable_row", "row 0: it is not JSON ("),
    b'{"text": "\xff"}': ("unreadable_row", "row 0: it is not JSON ("),
    b"": ("unreadable_row", "row 0: the line is empty"),
    b"  ": ("unreadable_row", "row 0: the line is empty"),
    b"null": ("unreadable_row", "row 0: it is null, not an object"),
    b"[1]": ("unreadable_row", "row 0: it is a list, not an object"),
    b'{"a":%s%s,"messages":[]}' % (b"[" * 500, b"]" * 500): ("unreadable_row", "row 0: it is nested too deeply ("),
    b'{"messages":[{"from":%s1%s}]}' % (b'{"a":' * 900, b"}" * 900): (
        "unreadable_row",
        "row 0: it is nested too deeply (",
    ),
    b"{}": ("unknown_format", "row 0: it has neither 'messages' nor 'conversations'"),
    b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}': (
        "duplicated_key",
        "row 0: an object in it has the key 'content' twice",
    ),
    b'{"messages": [], "a\\u003a": 1, "a\\u003a": 2}': ("duplicated_key", "the key 'a:' twice"),
    orjson.dumps(_row(label=False)): (
        "preference_data",
        "row 0: its column 'label' (false) makes it preference data, of which bad answers would be trained on",
    ),
    orjson.dumps(_row(split="test")): ("unknown_format", "row 0: its split is 'test'; known are train and eval"),
    orjson.dumps(_row(kind=["a"])): ("unknown_format", "row 0: 'kind' is a list, not a text"),
    orjson.dumps(_row(answer=["a", "b"])): ("unknown_format", "row 0: 'answer' is a list, not a text"),
    orjson.dumps(_row(task=True)): ("unknown_format", "row 0: 'task' is a boolean, not a text"),
    orjson.dumps(_row("Which?", "../a.png")): (
        "path_outside_data_folder",
        "row 0: '../a.png' is outside of 'media'",
    ),
    orjson.dumps(_row("Which?", "/etc/passwd")): ("path_outside_data_folder", "row 0: '/etc/passwd' is outside"),
    orjson.dumps(_row("Which?", "https://example.org/a.png")): ("url_not_allowed", "a.png' is a URL"),
    orjson.dumps(_row("Which?", "data:video/mp4;base64,AAAA")): ("embedded_media_invalid", "AAAA' is of type"),
}


@pytest.mark.parametrize(("line", "expected"), REJECTED.items())
def test_what_cannot_be_read_is_a_named_row(line: bytes, expected: tuple[str, str]) -> None:
    samples, rejects = _ingest(_write("a.jsonl", [line, _row()]))
    (reject,) = rejects.to_pylist()
    assert (reject["source"], reject["row"], reject["rule"]) == ("a", 0, expected[0])
    assert expected[1] in reject["detail"]
    assert samples["sample_id"].to_pylist() == ["a/1"]


def test_every_reject_rule_is_tested() -> None:
    # A URL may hold a secret where media are behind one: test_paths.py.
    assert {rule for rule, _ in REJECTED.values()} | {"url_with_secret"} == set(REJECT_RULES)


def test_link_out_of_the_folder_is_rejected() -> None:
    source = _write("a.jsonl", [_row("Which?", "inside.png"), _row("Which?", "link.png")])
    Path("media").mkdir()
    Path("media/link.png").symlink_to(Path("a.jsonl").absolute())
    samples, rejects = _ingest(source)
    assert samples["sample_id"].to_pylist() == ["a/0"]
    assert rejects["rule"].to_pylist() == ["path_outside_data_folder"]


def test_rows_of_a_json_list_that_are_no_objects_are_rejected() -> None:
    _, rejects = _ingest(_write("a.json", [_row(), "hello", None]))
    assert rejects["detail"].to_pylist() == [
        "row 1: it is a text, not an object",
        "row 2: it is null, not an object",
    ]


def test_all_file_types_give_the_same_samples() -> None:
    rows = [_row("Which?", "a.png", id=1), _row("What?", id=2)]
    first, *others = (_ingest(_write(f"a.{kind}", rows))[0] for kind in ("parquet", "json", "jsonl"))
    assert first.num_rows == 2
    assert all(first.equals(other) for other in others)


def test_parquet_with_messages_as_json_text() -> None:
    row = _row("Which?", "a.png")
    as_text = {"messages": orjson.dumps(row["messages"]).decode()}
    assert _ingest(_write("a.parquet", [as_text]))[0].equals(_ingest(_write("a.jsonl", [row]))[0])


def test_folder_of_parquet_files_whose_columns_differ() -> None:
    _write("shards/1.parquet", [_row(id=1), _row(id=2)])
    _write("shards/2.parquet", [{"messages": orjson.dumps(_row()["messages"]).decode(), "note": "text"}])
    _write("shards/10.parquet", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}])
    samples, _ = _ingest({"name": "s", "path": "shards", "data_type": "parquet"})
    assert samples["sample_id"].to_pylist() == ["s/0", "s/1", "s/2", "s/3"]
    assert samples["answer"].to_pylist() == ["This.", "This.", "Ho", "This."]  # 1, 10, 2
    assert samples["metadata"].to_pylist() == ['{"id":1}', '{"id":2}', "{}", '{"note":"text"}']


def test_metadata_holds_what_json_has_no_form_for() -> None:
    row = _row(
        when=datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        price=decimal.Decimal("1.50"),
        blob=b"\xff\x00",
        nested={"b": 1, "a": None},
    )
    samples, _ = _ingest(_write("a.parquet", [row]))
    assert orjson.loads(samples["metadata"][0].as_py()) == {
        "when": "2020-01-02T00:00:00+00:00",
        "price": "1.50",
        "blob": "2 bytes",
        "nested": {"a": None, "b": 1},
    }


def test_sources_and_rows_keep_their_order() -> None:
    sources = [_write("b.jsonl", [_row(), b"{", _row()]), _write("a.json", [_row(), {}])]
    samples, rejects = _ingest(*sources)
    assert samples["sample_id"].to_pylist() == ["b/0", "b/2", "a/0"]
    assert [(row["source"], row["row"]) for row in rejects.to_pylist()] == [("b", 1), ("a", 1)]


def test_many_rows_keep_their_numbers() -> None:
    rows = [_row(f"Question {number}?") if number % 7 else b"{" for number in range(20_000)]
    samples, rejects = _ingest(_write("a.jsonl", rows))
    assert sorted(samples["row"].to_pylist() + rejects["row"].to_pylist()) == list(range(20_000))
    questions = [orjson.loads(text)[0]["content"][0]["text"] for text in samples["messages"].to_pylist()]
    assert questions == [f"Question {number}?" for number in samples["row"].to_pylist()]


def test_no_rows_at_all() -> None:
    samples, rejects = _ingest(_write("a.jsonl", []))
    assert (samples.schema, samples.num_rows, rejects.num_rows) == (SAMPLES, 0, 0)


def test_split_is_that_of_the_source_then_of_the_row() -> None:
    rows = [_row(split="train"), _row(split="eval"), _row()]
    samples, _ = _ingest({**_write("a.jsonl", rows), "split": "eval"}, _write("b.jsonl", rows))
    assert samples["split"].to_pylist() == ["eval", "eval", "eval", "train", "eval", "train"]


def test_split_by_hash_keeps_to_the_fraction_and_to_its_rows() -> None:
    source = _write("a.jsonl", [_row() for _ in range(2000)])
    splits = _ingest(source, eval_fraction=0.25)[0]["split"].to_pylist()
    assert abs(splits.count("eval") / 2000 - 0.25) < 0.03
    assert _ingest(source, eval_fraction=0.25, seed=1)[0]["split"].to_pylist() != splits
    # More rows change nothing for those that were there, and a larger fraction only adds to the eval split.
    longer = _write("longer/a.jsonl", [_row() for _ in range(2500)])
    assert _ingest(longer, eval_fraction=0.25)[0]["split"].to_pylist()[:2000] == splits
    larger = _ingest(source, eval_fraction=0.5)[0]["split"].to_pylist()
    assert all(new == "eval" for new, old in zip(larger, splits, strict=True) if old == "eval")


def test_rows_about_one_picture_share_a_split() -> None:
    samples, _ = _ingest(_write("a.jsonl", [_row(f"{n}?", f"{n % 50}.png") for n in range(500)]), eval_fraction=0.5)
    split_of: dict[str, set[str]] = {}
    for sample in samples.to_pylist():
        split_of.setdefault(sample["media"][0]["path"], set()).add(sample["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    assert len(set.union(*split_of.values())) == 2


def _splits(source: dict[str, Any], *others: dict[str, Any], **options: Any) -> str:
    """First letters of the splits of a source."""
    samples, _ = _ingest(source, *others, eval_fraction=0.5, **options)
    own = samples.filter(pc.equal(samples["source"], source["name"]))
    return "".join(split[0] for split in own["split"].to_pylist())


def test_the_split_does_not_depend_on_where_the_dataset_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_row("?", f"{n}.png") for n in range(16)]
    source, expected = _write("a.jsonl", rows), "eetetttteteettee"
    assert _splits(source) == expected
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    for folder in ("data/deep", str(elsewhere)):
        absolute = [_row("?", f"{Path(folder).absolute()}/{n}.png") for n in range(16)]
        for given in (rows, absolute):
            assert _splits(_write("a.jsonl", given) | {"data_folder": f"{folder}/."}) == expected, folder
    # Nor on what else there is, nor on where the project lies.
    _write("a.jsonl", rows)
    for folder in ("other", ""):
        assert _splits(source, _write("b.jsonl", [_row()]) | {"data_folder": folder}) == expected
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert _splits(_write("a.jsonl", rows)) == expected


@pytest.mark.parametrize("named", ["real", "link"])
@pytest.mark.parametrize("stated", ["real", "link"])
def test_the_split_is_the_same_through_a_link(tmp_path: Path, stated: str, named: str) -> None:
    expected = _splits(_write("a.jsonl", [_row("?", f"{n}.png") for n in range(16)]))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rows = [_row("?", f"{tmp_path}/{named}/{n}.png") for n in range(16)]
    assert _splits(_write("a.jsonl", rows) | {"data_folder": f"{tmp_path}/{stated}"}) == expected


def test_sources_that_share_media_split_them_in_the_same_way() -> None:
    outer = _write("outer.jsonl", [_row("?", f"in/{n}.png") for n in range(16)])
    inner = _write("inner.jsonl", [_row("?", f"{n}.png") for n in range(16)]) | {"data_folder": "media/in"}
    project = _write("all.jsonl", [_row("?", f"media/in/{n}.png") for n in range(16)]) | {"data_folder": ""}
    splits = [
        _splits(source, *[other for other in (outer, inner, project) if other is not source])
        for source in (outer, inner, project)
    ]
    assert splits == [_splits(outer)] * 3
    assert set(splits[0]) == {"t", "e"}


def test_embedded_media_are_split_by_their_content() -> None:
    rows = [_row("?", f"data:image/png;base64,{base64.b64encode(bytes([n])).decode()}") for n in range(1, 17)]
    source = _write("a.jsonl", rows)
    assert _splits(source) == _splits(source, cache_folder="elsewhere/cache")
    assert set(_splits(source)) == {"t", "e"}


def test_assigned_split_never_changes() -> None:
    config = IngestConfig(datasets=[{"name": "a", "path": "a", "data_type": "json"}], eval_fraction=0.5)
    splits = "".join(assign_split(f"a/{row}", config)[0] for row in range(16))
    assert splits == "ttteteettteetttt"


@pytest.mark.parametrize(
    ("images", "videos", "kind"),
    [
        (0, 0, "text"),
        (1, 0, "single_image"),
        (2, 0, "two_images"),
        (3, 0, "multi_image"),
        (0, 1, "video"),
        (0, 2, "two_videos"),
        (0, 3, "multi_video"),
        (1, 1, "image_and_video"),
        (2, 3, "image_and_video"),
    ],
)
def test_kind_by_media(images: int, videos: int, kind: str) -> None:
    assert derive_kind([Media("image", "a.png")] * images + [Media("video", "a.mp4")] * videos) == kind


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab is about 1,000 rows of these tests, and tables are written in groups of 100 rows."""
    monkeypatch.setattr(limits, "_PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(ingest, "_SLABS_IN_LIMIT", 1 << 12)
    monkeypatch.setattr(batches, "ROW_GROUP_ROWS", 100)


def _many(rows: int) -> list[dict[str, Any]]:
    return [_row(f"Which is number {number}? " * 20, "a.png") for number in range(rows)]


def test_no_slab_is_in_memory_while_the_next_is_read(monkeypatch: pytest.MonkeyPatch, small_slabs: None) -> None:
    sizes, held, read = [], [], RowFiles.slabs

    def watched(*arguments: Any) -> Iterator[Slab]:
        slabs = read(*arguments)
        empty = pa.total_allocated_bytes()
        while (slab := next(slabs, None)) is not None:
            sizes.append(slab.rows.nbytes)
            handed_over = [slab]
            del slab
            yield handed_over.pop()
            held.append(pa.total_allocated_bytes() - empty)

    monkeypatch.setattr(RowFiles, "slabs", watched)
    _ingest(_write("a.jsonl", _many(8000)))
    assert len(held) > 3
    assert max(held) < max(sizes) / 2


def _ingest_until(slabs: int, *sources: dict[str, Any]) -> list[int]:
    """Ingest until so many slabs are worked on, and be interrupted then; the number of rows of each of them."""
    worked_on: list[int] = []
    start = RowWorkers.start

    def counted(workers: RowWorkers, *arguments: Any) -> Callable[[], pa.Table]:
        if len(worked_on) == slabs:
            raise KeyboardInterrupt
        *_, rows, _path = arguments
        worked_on.append(rows.num_rows)
        return start(workers, *arguments)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(RowWorkers, "start", counted)
        _ingest(*sources)
    return worked_on


def _written() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


def test_an_interrupted_run_goes_on_where_it_was(small_slabs: None) -> None:
    sources = [_write("a.jsonl", [*_many(5000), b"{"]), _write("b.jsonl", _many(5000)), _write("c.jsonl", _many(10))]
    undisturbed, expected = _ingest_until(99, *sources), _written()
    assert _ingest_until(4, *sources) == undisturbed[:4]
    assert _ingest_until(99, *sources) == undisturbed[4:]
    assert _written() == expected
    assert list(Path("data/01_raw/cache/unfinished").iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "while"])
def test_another_run_that_is_done_sooner_does_not_disturb(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """It takes away what both have kept."""
    folder, part, new_file = Path("kept"), pa.table({"a": [1, 2]}), pa.ipc.new_file

    def new_file_of_two(path: str, *arguments: Any, **options: Any) -> Any:
        if moment == "before":
            shutil.rmtree(folder)
        file = new_file(path, *arguments, **options)
        shutil.rmtree(folder)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_file", new_file_of_two)
        assert begin_part(folder, "x", lambda: lambda: part)() == part
    assert not folder.exists()
    assert [begin_part(folder, "x", lambda made=made: lambda: made)() for made in (part, None)] == [part, part]


@pytest.mark.parametrize("change", ["split", "file", "code"])
def test_what_was_finished_otherwise_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, small_slabs: None, change: str
) -> None:
    source = _write("a.jsonl", _many(5000))
    assert len(_ingest_until(2, source)) == 2
    if change == "split":
        source |= {"split": "train"}
    elif change == "file":
        _write("a.jsonl", _many(5001))
    else:
        monkeypatch.setattr(ingest, "hash_code", lambda package: "another")
    assert sum(_ingest_until(99, source)) == (5001 if change == "file" else 5000)


def test_two_runs_give_the_same_bytes() -> None:
    rows = [_row(f"{number}?", "a.png", b=1, a=2) for number in range(5000)]
    sources = [_write("a.parquet", rows), _write("b.jsonl", [b"{", *rows])]
    for run in ("1", "2"):
        for table, name in zip(_ingest(*sources, eval_fraction=0.3), ("samples", "rejects"), strict=True):
            pq.write_table(table, f"{name}{run}")
    for name in ("samples", "rejects"):
        assert Path(f"{name}1").read_bytes() == Path(f"{name}2").read_bytes()
