"""What a source can be told: its form, its share, its files, and what it must not be told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, Image, Value
from pydantic import ValidationError

from qvl_pipeline.config import DataEngineConfig, DatasetSource, IngestConfig
from qvl_pipeline.data.plan.steps import source_weights
from qvl_pipeline.data.sources.forms.conversations import FORMATS
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.errors import UserError

SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
OPENAI = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
SOURCE = {"name": "a", "path": "a.jsonl", "data_type": "jsonl"}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _write(path: str, rows: list[Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def _ingest(*sources: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    config = IngestConfig(datasets=list(sources))
    ingest_sources(config, list_files(config), DataEngineConfig(), Path())
    return tuple(pq.read_table(f"{name}.parquet").to_pylist() for name in ("samples", "rejects"))


def test_every_form_can_be_stated() -> None:
    assert get_args(DatasetSource.model_fields["format"].annotation) == ("auto", *FORMATS)


@pytest.mark.parametrize(
    ("form", "accepted"), [("auto", [0, 1, 2, 3]), ("openai", [0]), ("sharegpt", [1, 2]), ("llava", [1, 3])]
)
def test_a_stated_form_rejects_rows_of_any_other(form: str, accepted: list[int]) -> None:
    marked = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Ho"}]
    rows = [OPENAI, SHAREGPT, {"conversations": marked, "images": ["a.png"]}]
    _write("a.jsonl", [*rows, {"conversations": marked, "image": "a.png"}])
    samples, rejects = _ingest({**SOURCE, "format": form})
    assert [sample["row"] for sample in samples] == accepted
    assert {reject["rule"] for reject in rejects} <= {"unknown_format"}
    assert len(samples) + len(rejects) == 4


def test_limit_reads_the_first_rows_of_a_source() -> None:
    _write("rows/1.jsonl", [OPENAI, 3])
    _write("rows/2.jsonl", [OPENAI] * 9)
    samples, rejects = _ingest({**SOURCE, "path": "rows", "limit": 5})
    assert [sample["row"] for sample in samples] == [0, 2, 3, 4]
    assert [reject["row"] for reject in rejects] == [1]
    assert len(_ingest({**SOURCE, "path": "rows", "limit": 50})[0]) == 10


def test_repeat_multiplies_the_weight_and_stores_nothing_twice() -> None:
    source = {**SOURCE, "weight": 0.5, "repeat": 3}
    assert source_weights(IngestConfig(datasets=[source])) == {"a": 1.5}
    _write("a.jsonl", [OPENAI])
    assert len(_ingest(source)[0]) == 1


def test_a_folder_stands_for_compressed_files_too() -> None:
    import gzip

    Path("rows").mkdir()
    Path("rows/1.jsonl.gz").write_bytes(gzip.compress(orjson.dumps(OPENAI)))
    _write("rows/2.jsonl", [SHAREGPT])
    Path("rows/3.json").write_bytes(b"[]")
    assert [sample["answer"] for sample in _ingest({**SOURCE, "path": "rows"})[0]] == ["Ho", "Ho"]


def test_csv_rows_hold_json_texts() -> None:
    turns = orjson.dumps(SHAREGPT["conversations"]).decode().replace('"', '""')
    Path("a.csv").write_text(f'conversations,images,split\n"{turns}","[""a.png"", ""b.png""]",eval\nx,y\n')
    (sample,), (reject,) = _ingest({"path": "a.csv", "data_type": "csv"})
    assert [use["path"] for use in sample["media"]] == ["a.png", "b.png"]
    assert (sample["sample_id"], sample["split"]) == ("a/0", "eval")
    assert reject["detail"] == "row 1: it has 2 fields, the header 3"


def _hf_rows(*names: str) -> Dataset:
    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": [turn], "image": Image(decode=False), "id": Value("string")})
    rows = [
        {"messages": [{"role": "user", "content": "<image>Hi"}, OPENAI["messages"][1]], "id": name}
        | {"image": {"bytes": name.encode(), "path": None}}
        for name in names
    ]
    return Dataset.from_list(rows, features)


def test_a_folder_of_hugging_face_datasets() -> None:
    _hf_rows(*"abcde").save_to_disk("hf", num_shards=2)
    samples, rejects = _ingest({"path": "hf", "data_type": "hf_dataset"})
    assert rejects == []
    assert [orjson.loads(sample["metadata"])["id"] for sample in samples] == [*"abcde"]
    # Pictures that the table embeds have become files.
    assert [Path(sample["media"][0]["path"]).read_bytes() for sample in samples] == [b"a", b"b", b"c", b"d", b"e"]
    assert {sample["split"] for sample in samples} == {"train"}


def test_splits_of_a_dataset_dict_are_kept() -> None:
    DatasetDict({"train": _hf_rows("a", "b"), "validation": _hf_rows("c")}).save_to_disk("hf")
    samples, _ = _ingest({"path": "hf", "data_type": "hf_dataset"})
    assert [sample["split"] for sample in samples] == ["train", "train", "eval"]
    samples, _ = _ingest({"path": "hf/validation", "data_type": "hf_dataset", "split": "train"})
    assert [sample["split"] for sample in samples] == ["train"]


def test_what_is_no_such_folder_is_refused() -> None:
    DatasetDict({"train": _hf_rows("a"), "odd": _hf_rows("c")}).save_to_disk("hf")
    with pytest.raises(UserError, match="'hf' has the split 'odd'; known are train, eval, validation"):
        _ingest({"path": "hf", "data_type": "hf_dataset"})
    next(Path("hf/train").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"'hf/train/data-.*arrow' is missing, which its state.json lists"):
        _ingest({"path": "hf/train", "data_type": "hf_dataset"})
    _write("rows/a.json", [])
    with pytest.raises(UserError, match=r"holds no state\.json, so it was not made by `save_to_disk`"):
        _ingest({"path": "rows", "data_type": "hf_dataset"})


GUIDE = {"datasets": [{"path": "path/to/your/dataset.parquet", "data_folder": "", "data_type": "parquet"}]}


def test_the_list_of_a_yaml_file_is_as_good_as_the_list_here() -> None:
    Path("data.yaml").write_text(yaml.safe_dump(GUIDE))
    config = IngestConfig(dataset_format="yaml", dataset_path="data.yaml")
    assert config.datasets == IngestConfig(**GUIDE).datasets
    assert config.datasets[0].name == "dataset"


@pytest.mark.parametrize(
    ("content", "values", "sentence"),
    [
        (None, {}, "dataset_path: 'data.yaml' cannot be read"),
        ("datasets: [", {}, "dataset_path: 'data.yaml' cannot be read"),
        ("- path: a", {}, "must hold one key, 'datasets', with a list of sources"),
        ("datasets: []\nextra: 1", {}, "must hold one key, 'datasets'"),
        ("datasets: [{path: a, data_typ: json}]", {}, "unknown key 'data_typ': did you mean 'data_type'"),
        ("datasets: []", {"datasets": [SOURCE]}, "datasets and dataset_path are both set"),
        ("datasets: []", {}, "at least 1 item"),
    ],
)
def test_a_yaml_file_that_says_something_else_is_refused(
    content: str | None, values: dict[str, Any], sentence: str
) -> None:
    if content is not None:
        Path("data.yaml").write_text(content)
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        IngestConfig(dataset_path="data.yaml", **values)


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b.c.jsonl.gz", "b"), ("s3://bucket/my rows/", "my_rows"), ("/", "source"), ("ä.json", "_")],
)
def test_a_source_is_named_by_its_path(path: str, name: str) -> None:
    assert DatasetSource(path=path, data_type="json").name == name


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"storage_options": {"secret": "x"}}, "storage_options.secret looks like a credential"),
        ({"storage_options": {"key": "x"}}, "storage_options.key looks like a credential"),
        ({"storage_options": {"account_key": "x"}}, "storage_options.account_key looks like a credential"),
        (
            {"storage_options": {"client_kwargs": {"aws_session_token": "x"}}},
            "storage_options.client_kwargs.aws_session",
        ),
        ({"path": "https://me:hunter2@example.org/a"}, "path holds a password"),
        ({"data_folder": "ftp://me:hunter2@example.org/a"}, "data_folder holds a password"),
        ({"path": "https://x.blob.core.windows.net/a.jsonl?sv=2024&sig=hunter2"}, "path holds a signature"),
        ({"data_folder": "https://b.s3/a?X-Amz-Signature=hunter2"}, "data_folder holds a signature"),
    ],
)
def test_secrets_in_parameters_are_refused_and_not_repeated(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)) as caught:
        DatasetSource(**{**SOURCE, **values})
    (error,) = caught.value.errors()
    assert "hunter2" not in error["msg"]


def test_options_that_are_no_secrets_are_accepted() -> None:
    options = {"endpoint_url": "http://x", "anon": True, "client_kwargs": {"region_name": "eu"}, "keep_alive": 3}
    source = DatasetSource(**SOURCE | {"path": "s3://bucket/a.jsonl"}, storage_options=options)
    assert source.storage_options == options
