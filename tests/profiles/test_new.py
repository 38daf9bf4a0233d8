"""`kedro profile new`: a newcomer's rows, in every file type, become a profile that can be run at once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner, Result
from datasets import Dataset
from PIL import Image

from qvl_pipeline.cli import cli
from qvl_pipeline.config import DatasetSource
from qvl_pipeline.data.sources.detection import detect_type
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.loader import ProfileLoader
from qvl_pipeline.profiles.trial import FRACTIONS, try_source
from qvl_pipeline.settings import CONFIG_LOADER_ARGS

Row = dict[str, Any]


def openai(number: int) -> Row:
    question = [
        {"type": "image_url", "image_url": {"url": f"pictures/{number}.png"}},
        {"type": "text", "text": "What?"},
    ]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"A {number}."}]}


def sharegpt(number: int) -> Row:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"A {number}."}]
    return {"conversations": turns, "images": [f"pictures/{number}.png"]}


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_gzip(path: Path, rows: list[Row]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(path: Path, rows: list[Row]) -> None:
    pd.DataFrame(rows).to_parquet(path)


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in rows)


def write_arrow(path: Path, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_folder(path: Path, rows: list[Row]) -> None:
    path.mkdir()
    write_jsonl(path / "part-0.jsonl", rows[:2])
    write_jsonl(path / "part-1.jsonl", rows[2:])


def write_hf(path: Path, rows: list[Row]) -> None:
    Dataset.from_list(rows).save_to_disk(path)


def write_shard(path: Path, rows: list[Row]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            content = json.dumps(row).replace(f"pictures/{number}.png", "png").encode()
            header = tarfile.TarInfo(f"{number:03}.json")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
            archive.add(path.parent / "pictures" / f"{number}.png", f"{number:03}.png")


def pictures(folder: Path, count: int) -> None:
    (folder / "pictures").mkdir()
    for number in range(count):
        Image.new("RGB", (60, 60), (number * 5, 255 - number * 5, 0)).save(folder / "pictures" / f"{number}.png")


def profile_new(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["profile", "new", *map(str, arguments)])


def parameters(project: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((project / "conf" / name / "parameters.yml").read_text())


@pytest.mark.parametrize(
    ("file", "write", "kind", "row"),
    [
        ("cups.jsonl", write_jsonl, "jsonl", openai),
        ("cups.jsonl.gz", write_gzip, "jsonl", openai),
        ("cups.json", write_json, "json", sharegpt),
        ("cups.json", write_jsonl, "jsonl", openai),  # as many name it
        ("cups", write_json, "json", openai),
        ("cups.parquet", write_parquet, "parquet", sharegpt),
        ("cups.csv", write_csv, "csv", sharegpt),
        ("cups.arrow", write_arrow, "arrow", sharegpt),
        ("cups", write_folder, "jsonl", openai),
        ("cups", write_hf, "hf_dataset", sharegpt),
        ("cups.tar", write_shard, "webdataset", openai),
    ],
)
def test_rows_of_every_type_become_a_profile(
    project: Path, file: str, write: Callable[[Path, list[Row]], None], kind: str, row: Callable[[int], Row]
) -> None:
    folder = project / "data" / "01_raw"
    folder.mkdir(parents=True)
    pictures(folder, 20)
    write(folder / file, [row(number) for number in range(20)])
    given = ["--data-folder", folder] if (folder / file).is_dir() else []
    result = profile_new("mine", "--data", folder / file, *given)
    assert result.exit_code == 0, result.output
    path = f"data/01_raw/{file}"
    shown = 2 if write is write_folder else 5  # of the first file
    about = "" if write is write_folder else "about 20 rows"
    assert f"{path}: {kind}, {about}" in result.output
    assert result.output.count("single_image, 1 media file found") == shown
    assert "kedro run --env mine --pipelines ingest,validate" in result.output
    assert f"  mine: {{env: mine, raw: {path}}}\n  mine: mine\n" in result.output
    assert yaml.safe_load((project / "conf/mine/globals.yml").read_text()) == {"profile": "mine", "dataset": "mine"}
    ingest = parameters(project, "mine")["ingest"]
    assert ingest["datasets"] == [{"name": "cups", "path": path, "data_folder": "data/01_raw", "data_type": kind}]
    loader = ProfileLoader(str(project / "conf"), env="mine", **CONFIG_LOADER_ARGS)
    blocks = check_parameters(loader["parameters"], loader.origins)
    assert blocks["ingest"].demo is None
    like = ProfileLoader(str(project / "conf"), env="qwen3_vl_8b", **CONFIG_LOADER_ARGS)
    expected = check_parameters(like["parameters"], like.origins)
    expected["validate"] = expected["validate"].model_copy(update={"dataset": "mine"})  # the title of its page
    for block in blocks.keys() - {"ingest", "evaluate"}:
        assert blocks[block] == expected[block]
    assert "# 224 * 224" in (project / "conf/mine/parameters.yml").read_text(), "comments stay"


@pytest.mark.parametrize(("rows", "least"), [(3, 1), (10, 2), (40, 8), (2000, 10)])
def test_there_is_something_to_evaluate_on_and_to_train_on(tmp_path: Path, rows: int, least: int) -> None:
    pictures(tmp_path, 1)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cup."}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns} for _ in range(rows)])
    trial = try_source(DatasetSource(path=str(tmp_path / "rows.jsonl"), data_type="jsonl"))
    assert trial.total == rows
    assert trial.eval_fraction in FRACTIONS
    assert least <= trial.eval_samples < rows
    assert trial.eval_fraction == 0.02 or trial.eval_samples <= rows // 2 + 1


def test_the_rows_of_a_long_file_are_estimated(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?" * 1000}, {"role": "assistant", "content": "A cup."}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns} for _ in range(3000)])
    trial = try_source(DatasetSource(path=str(tmp_path / "rows.jsonl"), data_type="jsonl"))
    assert trial.total == pytest.approx(3000, rel=0.3)
    assert trial.eval_fraction == FRACTIONS[0]


def test_rows_that_state_their_split_get_no_other(project: Path) -> None:
    pictures(project, 4)
    write_jsonl(project / "a.jsonl", [openai(n) | {"split": "eval" if n else "train"} for n in range(4)])
    assert "eval split: as the rows say" in profile_new("mine", "--data", "a.jsonl").output
    assert parameters(project, "mine")["ingest"].keys() == {"datasets"}


def test_rows_about_one_picture_cannot_be_split(project: Path) -> None:
    pictures(project, 1)
    write_jsonl(project / "a.jsonl", [openai(0)] * 30)
    assert "give them a column `split` (train, eval)" in profile_new("mine", "--data", "a.jsonl").output


def test_what_is_for_short_answers_is_not_taken_over(project: Path) -> None:
    pictures(project, 4)
    write_jsonl(project / "a.jsonl", [openai(n) for n in range(4)])
    assert profile_new("mine", "--like", "tiny_qwen3_vl", "--data", "a.jsonl").exit_code == 0
    like, made = parameters(project, "tiny_qwen3_vl"), parameters(project, "mine")
    assert made.pop("ingest").keys() == {"datasets", "eval_fraction"}
    del like["ingest"], like["validate"]["max_text_chars"], like["evaluate"]["max_new_tokens"]
    assert made == like
    # A profile that is like this one has nothing of the example any more.
    (project / "conf/mine/parameters.yml").write_text(
        "validate: {max_text_chars: 3}\nmodel: {processor_type: qwen3_vl}\n"
    )
    assert profile_new("other", "--like", "mine", "--data", "a.jsonl").exit_code == 0
    assert list(parameters(project, "other")) == ["ingest", "validate", "model"]
    assert parameters(project, "other")["validate"] == {"max_text_chars": 3}


def test_bad_rows_are_named_with_rule_and_reason_and_the_good_ones_are_enough(project: Path) -> None:
    pictures(project, 3)
    lines = [json.dumps(openai(0)), "{", json.dumps({"text": "a"}), json.dumps(openai(7)), json.dumps(openai(1))]
    (project / "a.jsonl").write_text("\n".join(lines))
    result = profile_new("mine", "--data", "a.jsonl")
    assert result.exit_code == 0
    shown = result.output.splitlines()
    assert shown[2].startswith("  row 1: unreadable_row: it is not JSON")
    assert shown[3].startswith(
        "  row 2: unknown_format: it has neither 'messages' nor 'conversations', but 'text'; known"
    )
    assert shown[4] == "  row 3: missing_media: there is no file 'pictures/7.png'"


def test_embedded_media_leave_no_trace(project: Path) -> None:
    pictures(project, 1)
    content = (project / "pictures/0.png").read_bytes()
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cup."}]
    write_parquet(project / "a.parquet", [{"messages": turns, "images": [{"bytes": content, "path": None}]}] * 3)
    result = profile_new("mine", "--data", "a.parquet")
    assert "row 0: single_image, 1 media file found" in result.output
    assert not (project / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mine", "--data", "none.jsonl"], "none.jsonl' does not exist: name a file of rows"),
        (["mine", "--data", "empty.jsonl"], "empty.jsonl' is empty: name a file"),
        (["mine", "--data", "notes.txt"], "notes.txt' is of no known type (parquet, arrow,"),
        (["mine", "--data", "cut.jsonl.gz"], "cut.jsonl.gz' cannot be read"),
        (["mine", "--data", "cut.parquet"], "'cut.parquet' cannot be read as parquet"),
        (["mine", "--data", "nothing"], "nothing' holds no file of rows"),
        (["mine", "--data", "mixed"], "mixed' holds files of several types (2 csv, 1 json): name one of them"),
        (["mine", "--data", "s3://team/a.jsonl"], "'s3://team/a.jsonl' is a URL: make the profile with a local file"),
        (["mine", "--data", "bad.jsonl"], "none of the first 5 rows of 'bad.jsonl' can be used, so nothing is written"),
        (
            ["mine", "--data", "a.jsonl", "--data-folder", "conf"],
            "or name the folder where its media paths start",
        ),
        (["mine", "--data", "a.jsonl", "--data-folder", "no"], "--data-folder: the folder 'no' does not exist"),
        (["tiny_qwen3_vl", "--data", "a.jsonl"], "there is a profile 'tiny_qwen3_vl' already: take another name"),
        (["digits", "--data", "a.jsonl"], "'digits' is the dataset of the profile 'tiny_qwen2_5_vl'"),
        (["local", "--data", "a.jsonl"], "'local' cannot be the name of a profile"),
        (["../up", "--data", "a.jsonl"], "'../up' is no name for a profile: take letters"),
        (["mine", "--like", "qwen3_vl", "--data", "a.jsonl"], "no profile 'qwen3_vl': did you mean 'qwen3_vl_8b'?"),
        (["mine", "--like", "base", "--data", "a.jsonl"], "no profile 'base': the profiles are frozen_vision, long_v"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_nothing_is_written(
    project: Path, arguments: list[str], sentence: str
) -> None:
    pictures(project, 5)
    write_jsonl(project / "a.jsonl", [openai(number) for number in range(5)])
    (project / "bad.jsonl").write_text('{"text": "a"}\n' * 6)
    (project / "empty.jsonl").touch()
    (project / "notes.txt").write_text("Remember the milk.\n")
    (project / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:12])
    (project / "cut.parquet").write_bytes(b"PAR1 and no more")
    for folder, names in (("nothing", ["a.png"]), ("mixed", ["a.csv", "b.csv", "c.json"])):
        (project / folder).mkdir()
        for name in names:
            (project / folder / name).touch()
    before = sorted((project / "conf").rglob("*"))
    result = profile_new(*arguments)
    assert result.exit_code == 1
    assert sentence in result.output
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    assert sorted((project / "conf").rglob("*")) == before


def test_it_is_found_from_a_folder_inside_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "notes").mkdir()
    pictures(project / "notes", 3)
    write_jsonl(project / "notes/a.jsonl", [openai(number) for number in range(3)])
    monkeypatch.chdir(project / "notes")
    assert profile_new("mine", "--data", "a.jsonl").exit_code == 0
    (source,) = parameters(project, "mine")["ingest"]["datasets"]
    assert (source["path"], source["data_folder"]) == ("notes/a.jsonl", "notes")


def test_when_it_cannot_be_written_nothing_is_left(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(project, 3)
    write_jsonl(project / "a.jsonl", [openai(number) for number in range(3)])
    shutil.copytree(project / "conf/tiny_qwen3_vl", project / "conf/broken")
    (project / "conf/broken/parameters.yml").write_text("train: [\n")
    result = profile_new("mine", "--like", "broken", "--data", "a.jsonl")
    assert result.exit_code == 1
    assert not (project / "conf/mine").exists()


def test_a_byte_order_mark_hides_no_type(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b'\xef\xbb\xbf  [{"messages": []}]')
    assert detect_type(tmp_path / "a.txt") == "json"
