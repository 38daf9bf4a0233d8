"""Benchmarks are read in the layout of their repositories, asked with lmms-eval's prompts, and never trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from qvl_pipeline.config import DataEngineConfig, DatasetSource, IngestConfig
from qvl_pipeline.config.data.ingest import BenchmarkName
from qvl_pipeline.data.sources.forms.benchmarks import BENCHMARKS
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.tasks import TASKS

OWN = {"path": "own.jsonl", "data_type": "jsonl"}
PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
VIDEO_MME = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n"
)


def picture(seed: int = 0) -> dict[str, Any]:
    """An image as `datasets` embeds it."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (seed, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


NO_PICTURES = {f"image_{number}": None for number in range(1, 8)}
MMMU = {
    "id": "validation_Art_1",
    "question": "Is <image 1> like <image 2>, or <image 1> itself?",
    "options": "['yes', 'as $5\\\\%$', '<image 3>']",
    "explanation": "",
    **NO_PICTURES,
    **{f"image_{number}": picture(number) for number in (1, 2, 3)},
    "answer": "C",
    "question_type": "multiple-choice",
}
MATHVISTA = {
    "pid": "1",
    "question": "How long?",
    "image": "images/1.jpg",
    "decoded_image": picture(),
    "choices": None,
    "unit": "cm",
    "precision": 1.0,
    "answer": "1.2",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"split": "testmini", "skills": ["arithmetic reasoning"]},
    "query": "Hint: …",
}
# By benchmark: the name of its file, a row of it, the text that is asked, what is said, and what is expected.
PUBLISHED: dict[str, tuple[str, dict[str, Any], str, str, Any]] = {
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        {"type": "human_test", "question": "How many?", "answer": "14", "image": picture()},
        "How many?\nAnswer the question with a single word.",
        "14",
        "14",
    ),
    "docvqa": (
        "DocVQA/validation-00000-of-00006.parquet",
        {"questionId": "1", "question": "Which date?", "image": picture(), "answers": ["3 May", "May 3", "May 3"]},
        f"Which date?{PHRASE}",
        "May 3",
        ["3 May", "May 3", "May 3"],
    ),
    "textvqa": (
        "data/validation-00000-of-00003.parquet",
        {"question": "what is the Brand?", "image": picture(), "answers": ["nokia"] * 9 + ["unanswerable"]},
        f"What is the brand?{PHRASE}",
        "nokia",
        ["nokia"] * 9 + ["unanswerable"],
    ),
    "mmmu": (
        "Art/validation-00000-of-00001.parquet",
        MMMU,
        f"Is|like|, or <image 1> itself?\nA. yes\nB. as $5\\%$\nC.|{LETTER.strip()}",
        "C",
        {"answer": "C", "options": ["yes", "as $5\\%$", "<image 3>"]},
    ),
    "mathvista": (
        "data/testmini-00000-of-00001-725687bf7a18d64b.parquet",
        MATHVISTA,
        "How long? (Unit: cm)\nAnswer the question using a single floating-point number with one decimal place.",
        "1.2",
        {"answer": "1.2", "answer_type": "float", "choices": None, "precision": 1},
    ),
    "ai2d": (
        "data/test-00000-of-00001.parquet",
        {"question": "Which eats?", "options": ["leaf", "owl"], "answer": "1", "image": picture()},
        f"Which eats?\nA. leaf\nB. owl{LETTER}",
        "B",
        "B",
    ),
    "realworldqa": (
        "data/test-00000-of-00002.parquet",
        {"image": picture(), "question": " How far?\n\nA. Near\nB. Far\nOnly the letter. ", "answer": "B"},
        "How far?\n\nA. Near\nB. Far\nOnly the letter.",
        "B",
        "B",
    ),
    "videomme": (
        "videomme/test-00000-of-00001.parquet",
        {
            "video_id": "001",
            "duration": "short",
            "videoID": "fFjv93ACGo8",
            "question": "What happens?",
            "options": ["A. Rain.", "B. Snow."],
            "answer": "A",
        },
        f"{VIDEO_MME}What happens?\nA. Rain.\nB. Snow.\n{LETTER}",
        "A",
        "A",
    ),
    "mlvu": (
        "data/test-00000-of-00001.parquet",
        {"video_name": "1_plotQA/1.mp4", "question": "Who?\n(A) He\n(B) She", "answer": "B", "task_type": "plotQA"},
        "Who?\n(A) He\n(B) She\nOnly give the best option.\nBest option: (",
        "B",
        "B",
    ),
}
GROUPS = {"chartqa": "/human_test", "videomme": "/short", "mlvu": "/plotQA"}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    Path("own.jsonl").write_text(json.dumps({"messages": turns}) + "\n")


def write(name: str, *rows: dict[str, Any], file: str | None = None) -> None:
    """Write rows into the folder of a benchmark's repository, as its file is called, or another."""
    path = Path(name, file or PUBLISHED[name][0])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def ingest(*sources: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    config = IngestConfig(datasets=[OWN, *sources], eval_fraction=0.5)
    ingest_sources(config, list_files(config), DataEngineConfig(), Path())
    samples, rejects = (pq.read_table(f"{name}.parquet").to_pylist() for name in ("samples", "rejects"))
    return [sample for sample in samples if sample["source"] != "own"], rejects


def shown(sample: dict[str, Any]) -> str:
    """What the user says, `|` for a medium between texts."""
    turn = json.loads(sample["messages"])[0]["content"]
    return "".join(item.get("text", "|") for item in turn)


def test_every_benchmark_has_a_name_a_layout_and_a_score() -> None:
    assert get_args(BenchmarkName) == tuple(BENCHMARKS) == tuple(PUBLISHED)
    assert {benchmark.task for benchmark in BENCHMARKS.values()} <= set(TASKS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_is_asked_and_expected_as_published(name: str) -> None:
    _, row, asked, said, expected = PUBLISHED[name]
    write(name, row)
    (sample,), rejects = ingest({"benchmark": name, "path": name})
    assert rejects == []
    media = 3 if name == "mmmu" else 1
    assert shown(sample) == (asked if media == 3 else f"|{asked}")
    assert len(sample["media"]) == media
    assert json.loads(sample["messages"])[1]["content"] == [{"type": "text", "text": said}]
    answer = sample["answer"]
    assert (json.loads(answer) if isinstance(expected, list | dict) else answer) == expected
    assert (sample["sample_id"], sample["split"]) == (f"{name}/0", "benchmark")
    assert sample["kind"] == f"benchmark/{name}{GROUPS.get(name, '')}"
    assert sample["task"] == BENCHMARKS[name].task
    aside = {
        "docvqa": {"questionId"},
        "mathvista": {"pid", "question_type", "metadata", "query"},
        "videomme": {"video_id"},
    }
    aside["mmmu"] = {"id", "explanation", *(f"image_{number}" for number in range(4, 8))}
    assert json.loads(sample["metadata"]).keys() == aside.get(name, set()), "neither what is read nor pictures"


def test_clips_are_where_the_archives_put_them() -> None:
    for name, path in {"videomme": "data/fFjv93ACGo8.mp4", "mlvu": "1_plotQA/1.mp4"}.items():
        write(name, PUBLISHED[name][1])
        (sample,), _ = ingest({"benchmark": name, "path": name})
        assert sample["media"][0]["path"] == f"{name}/{path}"


def test_images_of_mmmu_are_at_their_places() -> None:
    write("mmmu", MMMU)
    (sample,), _ = ingest({"benchmark": "mmmu", "path": "mmmu"})
    colours = [Image.open(use["path"]).getpixel((0, 0))[0] for use in sample["media"]]
    assert colours == [1, 2, 3]


def test_open_questions_of_mmmu_and_options_of_mathvista() -> None:
    opened = {"question_type": "open", "options": "[]", "question": "<image 1> How much?"}
    write("mmmu", {**MMMU, **opened, "answer": "['6', 'six']"}, {**MMMU, **opened, "answer": "[1, 2]"})
    several, one = ingest({"benchmark": "mmmu", "path": "mmmu"})[0]
    assert shown(several) == f"|How much?\n\n{PHRASE.strip()}"
    assert json.loads(several["answer"]) == {"answer": ["6", "six"]}
    assert json.loads(one["answer"]) == {"answer": ["[1, 2]"]}
    chosen = {"choices": ["3", "4"], "answer": "4", "answer_type": "text", "unit": None, "precision": None}
    write("mathvista", {**MATHVISTA, **chosen})
    (sample,), _ = ingest({"benchmark": "mathvista", "path": "mathvista"})
    assert shown(sample) == f"|How long?\nA. 3\nB. 4{LETTER}"
    assert json.loads(sample["messages"])[1]["content"][0]["text"] == "B"


def test_only_the_quoted_split_of_the_quoted_subset_is_read() -> None:
    row = PUBLISHED["docvqa"][1]
    write("docvqa", row)
    for file in ("DocVQA/test-00000-of-00006.parquet", "InfographicVQA/validation-00000-of-00003.parquet"):
        write("docvqa", {**row, "question": "another"}, file=file)
    (sample,), _ = ingest({"benchmark": "docvqa", "path": "docvqa"})
    assert shown(sample).startswith("|Which date?")
    assert ingest({"benchmark": "docvqa", "path": "docvqa/DocVQA"})[0] == [sample]
    write("mathvista", MATHVISTA)
    write("mathvista", MATHVISTA, file="data/test-00000-of-00002.parquet")
    assert len(ingest({"benchmark": "mathvista", "path": "mathvista"})[0]) == 1
    with pytest.raises(
        UserError, match=r"InfographicVQA' holds no file test\*\.parquet, as the repository of chartqa has"
    ):
        ingest({"benchmark": "chartqa", "path": "docvqa/InfographicVQA"})


def test_a_file_that_is_named_may_be_of_any_split() -> None:
    row = PUBLISHED["chartqa"][1]
    write("chartqa", row, row, file="data/val-00000-of-00001.parquet")
    source = {"benchmark": "chartqa", "name": "charts", "limit": 1}
    (sample,), _ = ingest({**source, "path": "chartqa/data/val-00000-of-00001.parquet"})
    assert (sample["sample_id"], sample["kind"]) == ("charts/0", "benchmark/charts/human_test")


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("docvqa", {"answers": None}, "it has no 'answers': name the split whose answers are published"),
        ("mmmu", {"answer": "?"}, "'answer' is '?', and there are 3 options: name the split"),
        ("mmmu", {"options": "yes or no"}, "'options' is no list as Python writes it"),
        ("mmmu", {"image_2": None}, "'image_2' holds no image"),
        ("ai2d", {"answer": "2"}, "'answer' is 2, not the number of one of 2 options"),
        ("chartqa", {"question": None}, "it has no 'question'"),
        ("mathvista", {"precision": 3.0}, "answer_type is 'float' with a precision of 3, for which there is no prompt"),
    ],
)
def test_a_row_that_cannot_be_asked_is_a_reject(name: str, changed: dict[str, Any], said: str) -> None:
    write(name, {**PUBLISHED[name][1], **changed})
    samples, (reject,) = ingest({"benchmark": name, "path": name})
    assert (samples, reject["rule"]) == ([], "unknown_format")
    assert said in reject["detail"]


def test_no_other_source_is_a_benchmark() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    Path("kinds.jsonl").write_text(json.dumps({"messages": turns, "kind": "benchmark/chartqa"}) + "\n")
    _, (reject,) = ingest({"path": "kinds.jsonl", "data_type": "jsonl"})
    assert "which is that of a benchmark" in reject["detail"]
    for wrong, said in (
        ({**OWN, "split": "benchmark"}, "say which as `benchmark`"),
        ({"benchmark": "chartqa", "path": "a", "format": "llava"}, "drop format"),
        ({"benchmark": "chartqa", "path": "a", "weight": 2}, "split is 'benchmark': drop one"),
    ):
        with pytest.raises(ValidationError, match=said):
            DatasetSource(**wrong)
