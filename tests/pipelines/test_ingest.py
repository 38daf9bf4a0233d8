"""The stage `ingest`: the embedded dataset is built when it must be, and every planted bad row is found."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset
from kedro_datasets.text import TextDataset

from qvl_pipeline.config import DataEngineConfig, IngestConfig, ValidateConfig
from qvl_pipeline.data.sources.raw import fingerprint, hash_folder
from qvl_pipeline.datasets import TableDataset
from qvl_pipeline.errors import UserError
from qvl_pipeline.pipelines.ingest import embedded
from qvl_pipeline.pipelines.ingest.nodes import prepare_raw
from qvl_pipeline.pipelines.ingest.pipeline import create_pipeline as create_ingest
from qvl_pipeline.pipelines.validate.pipeline import create_pipeline as create_validate
from qvl_pipeline.unfinished import unfinished_folder

TABLES = {
    "samples": "SAMPLES",
    "rejects": "REJECTS",
    "valid_samples": "SAMPLES",
    "quarantine": "QUARANTINE",
    "validation_warnings": "WARNINGS",
    "media_index": "MEDIA_INDEX",
}
DIGITS = {
    "demo": {"folder": "data/digits", "seed": 3, "train_samples": 30, "eval_samples": 14},
    "datasets": [
        {"name": name, "path": f"data/digits/{file}", "data_folder": "data/digits", "data_type": Path(file).suffix[1:]}
        for name, file in (
            ("digits_parquet", "messages.parquet"),
            ("digits_jsonl", "messages.jsonl"),
            ("digits_sharegpt", "sharegpt.json"),
        )
    ],
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(folder: Path) -> dict[str, Any]:
    """Run both stages with the digits, and return what they left on disk."""
    entries = {
        name: TableDataset(
            filepath=str(folder / f"{name}.parquet"),
            schema=f"qvl_pipeline.data.tables.{schema}",
            streamed=name == "samples",  # as in the catalog
        )
        for name, schema in TABLES.items()
    }
    for name in ("raw_manifest", "validation_report"):
        entries[name] = JSONDataset(filepath=str(folder / f"{name}.json"))
    entries["validation_page"] = TextDataset(filepath=str(folder / "validation.html"))
    entries["params:ingest"] = MemoryDataset(IngestConfig(**DIGITS))
    entries["params:data_engine"] = MemoryDataset(DataEngineConfig())
    entries["params:validate"] = MemoryDataset(ValidateConfig(max_reject_fraction=0.5, max_text_chars=4000))
    SequentialRunner().run(create_ingest() + create_validate(), DataCatalog(entries))
    return {name: dataset.load() for name, dataset in entries.items() if not name.startswith("params:")}


def test_every_planted_row_is_found_and_nothing_else(project: Path) -> None:
    found = _run(project / "out")
    planted = orjson.loads(Path("data/digits/planted.json").read_bytes())
    for stage in ("rejects", "quarantine"):
        rows = found[stage].itertuples()
        assert sorted((row.source, row.row, row.rule) for row in rows) == sorted(
            (row["source"], row["row"], row["rule"]) for row in planted if row["stage"] == stage
        )
    counts, rules = found["validation_report"]["counts"], found["validation_report"]["rules"]
    assert counts["ingested"] == 44 + len(planted) == sum(counts[key] for key in ("valid", "quarantined", "rejected"))
    assert +Counter(rules) == Counter(row["rule"] for row in planted)
    assert set(found["valid_samples"]["split"]) == {"train", "eval"}
    media = [use for uses in found["valid_samples"]["media"] for use in uses]
    assert {use["path"].partition("-")[0] for use in media} == {
        f"data/digits/{name}" for name in ("images/train", "images/eval", "videos/train", "videos/eval")
    }
    assert found["media_index"]["width"].dropna().astype(int).eq(64).all()


def test_two_runs_leave_the_same_bytes(project: Path) -> None:
    for run in ("1", "2"):
        _run(project / run)
    files = sorted(path.name for path in (project / "1").iterdir())
    assert len(files) == 9
    for name in files:
        assert (project / "1" / name).read_bytes() == (project / "2" / name).read_bytes(), name


@pytest.fixture
def builds(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every build of the embedded dataset, done by a stand-in that is quick."""
    done: list[Path] = []

    def build(folder: Path, demo: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "messages.jsonl").write_text('{"messages": []}\n')
        (folder / "image.png").write_text("an image")
        done.append(folder)

    monkeypatch.setattr(embedded, "_build", build)
    return done


def _demo(**changes: Any) -> IngestConfig:
    source = {"name": "a", "path": "digits/messages.jsonl", "data_type": "jsonl"}
    return IngestConfig(demo={"folder": "digits", "seed": 3, **changes}, datasets=[source])


def test_dataset_that_is_there_is_not_built_again(builds: list[Path]) -> None:
    assert prepare_raw(_demo()) == prepare_raw(_demo())
    assert len(builds) == 1


def test_the_manifest_covers_the_media_too(builds: list[Path]) -> None:
    manifest = prepare_raw(_demo())
    assert [file["path"] for file in manifest["files"]] == ["digits/messages.jsonl"]
    assert manifest["demo"] == hash_folder(Path("digits"), exclude=embedded.MARKER)
    assert manifest["fingerprint"] == fingerprint({"files": manifest["files"], "demo": manifest["demo"]})


@pytest.mark.parametrize("reason", ["other settings", "other builder", "file changed", "file lost", "file added"])
def test_dataset_is_built_again(builds: list[Path], monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    prepare_raw(_demo())
    image = Path("digits/image.png")
    if reason == "other builder":
        monkeypatch.setattr(embedded, "hash_code", lambda package: "another")
    elif reason == "file changed":
        image.write_text("an imagE")
    elif reason == "file lost":
        image.unlink()
    elif reason == "file added":
        Path("digits/more.png").touch()
    prepare_raw(_demo(seed=4 if reason == "other settings" else 3))
    assert len(builds) == 2


def test_folder_with_something_else_is_not_touched(project: Path) -> None:
    Path("digits").mkdir()
    Path("digits/thesis.txt").touch()
    with pytest.raises(UserError, match=r"^ingest.demo.folder: 'digits' holds files that are not the digits dataset"):
        prepare_raw(_demo())
    assert Path("digits/thesis.txt").exists()


def test_missing_source_names_the_parameter(project: Path) -> None:
    config = IngestConfig(datasets=[{"name": "a", "path": "mine.jsonl", "data_type": "jsonl"}])
    with pytest.raises(UserError, match=r"^ingest.datasets\[0\].path: 'mine.jsonl' does not exist"):
        prepare_raw(config)


# Another run, until its input ends.
OTHER_RUN = """
import sys
from pathlib import Path
from qvl_pipeline.unfinished import unfinished_folder
folder = unfinished_folder(Path("cache"))
(Path(folder.name) / "samples.parquet").touch()
print(folder.name, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_run_left_is_removed_and_what_another_run_writes_is_not(project: Path) -> None:
    command = [sys.executable, "-c", OTHER_RUN]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") for _ in range(2)
    ]
    killed, living = (Path(other.stdout.readline().strip()) for other in others)
    others[0].kill()
    others[0].wait()
    assert (killed / "samples.parquet").exists()
    earlier = Path("cache/.unfinished-of-an-earlier-version")
    earlier.mkdir()
    own = unfinished_folder(Path("cache"))
    another = unfinished_folder(Path("cache"))
    assert {path.resolve() for path in Path("cache").iterdir()} == {
        living.resolve(),
        Path(own.name).resolve(),
        Path(another.name).resolve(),
    }
    assert (living / "samples.parquet").exists()
    del own, another
    for other in others:
        other.communicate()
    assert others[1].returncode == 0
    assert list(Path("cache").iterdir()) == []


DRAWS = """
import logging
from qvl_pipeline.config import DigitsDemoConfig
from qvl_pipeline.pipelines.ingest.embedded import ensure_digits
logging.basicConfig(level="INFO", format="%(message)s")
print(ensure_digits(DigitsDemoConfig(folder="data/digits", seed=3, train_samples=30, eval_samples=14)))
"""


def test_two_first_runs_draw_the_same_digits_once(project: Path) -> None:
    command = [sys.executable, "-c", DRAWS]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [each.communicate(timeout=120) for each in runs]
    assert [each.returncode for each in runs] == [0, 0], printed
    assert printed[0][0] == printed[1][0] == hash_folder(Path("data/digits"), exclude=embedded.MARKER) + "\n"
    assert sum(errors.count("Drawing") for _, errors in printed) == 1
    assert [path.name for path in Path("data").iterdir()] == ["digits"]
