"""Validation of tables: every row is counted once, and no content of the eval split is in a training sample."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data import batches
from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.rejection import REJECT_RULES
from qvl_pipeline.data.tables import MEDIA_INDEX, QUARANTINE, REJECTS, SAMPLES
from qvl_pipeline.data.validation.media_index import probe_files
from qvl_pipeline.data.validation.rules import RULES
from qvl_pipeline.data.validation.validate import (
    TooManyRejectsError,
    Validation,
    check_reject_fraction,
    validate_samples,
    write_valid,
)
from qvl_pipeline.errors import UserError
from tests.data.samples import as_file
from tests.media.files import cut, write_image, write_png_bomb, write_video

CONFIG = ValidateConfig(max_image_pixels=1_000_000)
NO_REJECTS = REJECTS.empty_table()


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _row(*paths: str, split: str = "train", answer: str = "This.") -> dict[str, Any]:
    kinds = ["video" if Path(path).suffix == ".mp4" else "image" for path in paths]
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "Which?"}]
    return {
        "split": split,
        "messages": orjson.dumps(
            [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        ).decode(),
        "media": [{"type": kind, "path": path} for kind, path in zip(kinds, paths, strict=True)],
    }


def _samples(*rows: dict[str, Any]) -> pa.Table:
    numbered = [{"sample_id": f"s/{number}", "source": "s", "row": number, **row} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(numbered, SAMPLES)


def _validate(
    samples: pa.Table, rejects: pa.Table = NO_REJECTS, config: ValidateConfig = CONFIG, batch_rows: int = 2
) -> Validation:
    return validate_samples(as_file(samples), rejects, config, batch_rows)


def _valid(samples: pa.Table, outcome: Validation, path: Path = Path("valid.parquet")) -> pa.Table:
    write_valid(as_file(samples), outcome.quarantine, CONFIG, path, batch_rows=2)
    return pq.read_table(path)


def _broken(samples: pa.Table, config: ValidateConfig = CONFIG) -> dict[str, str]:
    quarantine = _validate(samples, NO_REJECTS, config).quarantine
    return dict(zip(quarantine["sample_id"].to_pylist(), quarantine["rule"].to_pylist(), strict=True))


def test_tables_have_the_columns_of_the_contract() -> None:
    write_image(Path("a.png"))
    samples = _samples(_row("a.png"), _row("none.png"))
    outcome = _validate(samples, NO_REJECTS, CONFIG)
    assert _valid(samples, outcome).equals(samples.slice(0, 1))
    assert outcome.quarantine.schema == QUARANTINE
    assert outcome.quarantine.to_pylist() == [
        {
            "sample_id": "s/1",
            "source": "s",
            "row": 1,
            "split": "train",
            "rule": "missing_media",
            "detail": "image 'none.png' does not exist",
        }
    ]
    assert outcome.media_index.schema == MEDIA_INDEX
    assert [(row["path"], row["rule"], row["detail"]) for row in outcome.media_index.to_pylist()] == [
        ("a.png", None, None),
        ("none.png", "missing_media", "image 'none.png' does not exist"),
    ]


def test_every_row_is_counted_once() -> None:
    write_image(Path("a.png"))
    rejects = pa.Table.from_pylist([{"source": "s", "row": 9, "rule": "unreadable_row", "detail": "row 9: …"}], REJECTS)
    rows = [_row("a.png"), _row("none.png"), _row(answer=" "), _row(answer="<|im_end|>"), _row("none.png", "a.png")]
    outcome = _validate(_samples(*rows), rejects, CONFIG)
    assert outcome.report["counts"] == {"ingested": 6, "valid": 1, "quarantined": 4, "rejected": 1}
    assert list(outcome.report["rules"]) == [*REJECT_RULES, *RULES]
    assert {rule: count for rule, count in outcome.report["rules"].items() if count} == {
        "unreadable_row": 1,
        "empty_turn": 1,
        "reserved_token": 1,
        "missing_media": 2,
    }
    assert outcome.quarantine["sample_id"].to_pylist() == ["s/1", "s/2", "s/3", "s/4"]


def test_corrupt_media_are_found_for_what_they_are() -> None:
    cut(write_video(Path("cut.mp4")), 0.5)
    cut(write_video(Path("tail.mp4"), movflags="faststart"), 0.9)
    Path("garbage.mp4").write_bytes(b"not media\n" * 99)
    Path("empty.mp4").touch()
    write_video(Path("short.mp4"), frames=1)
    cut(write_image(Path("cut.png"), 64, 64), 0.5)
    write_png_bomb(Path("bomb.png"), side=100_000)
    write_image(Path("strip.png"), width=402, height=2)
    write_image(Path("good.png"))
    write_video(Path("good.mp4"))
    expected = {
        "cut.mp4": "undecodable_media",
        "tail.mp4": "undecodable_media",
        "garbage.mp4": "undecodable_media",
        "empty.mp4": "empty_media",
        "short.mp4": "too_few_frames",
        "cut.png": "undecodable_media",
        "bomb.png": "image_too_large",
        "strip.png": "aspect_ratio",
        "good.png": None,
        "good.mp4": None,
    }
    samples = _samples(*(_row(path) for path in expected))
    outcome = _validate(samples, NO_REJECTS, CONFIG)
    index = outcome.media_index
    assert dict(zip(index["path"].to_pylist(), index["rule"].to_pylist(), strict=True)) == expected
    assert _broken(samples) == {f"s/{row}": rule for row, rule in enumerate(expected.values()) if rule}


def test_a_file_is_probed_once_for_each_type_it_is_used_as() -> None:
    write_image(Path("a.png"))
    uses = [
        Media("image", "a.png"),
        Media("video", "a.png"),
        Media("image", "a.png"),
        Media("video", "a.png", 0.0, 1.0),
    ]
    probes = probe_files(uses, CONFIG)
    assert list(probes) == [("image", "a.png"), ("video", "a.png")]
    assert (probes["image", "a.png"].codec, probes["image", "a.png"].failure) == ("png", None)
    assert probes["video", "a.png"].failure == "its format is not one of a video, or not one that is read"


def test_probes_belong_to_their_files() -> None:
    """More files than one batch holds, so that several processes share them."""
    sizes = {f"{number:03}.png": number + 8 for number in range(70)}
    for name, width in sizes.items():
        write_image(Path(name), width=width)
    probes = probe_files([Media("image", name) for name in sizes], CONFIG)
    assert {path: probe.width for (_, path), probe in probes.items()} == sizes


def test_slow_file_is_quarantined() -> None:
    Image.new("RGB", (8000, 6000)).save("slow.png", compress_level=1)
    config = ValidateConfig(probe_timeout_s=0.02)
    outcome = _validate(_samples(_row("slow.png")), NO_REJECTS, config)
    assert outcome.quarantine["rule"].to_pylist() == ["undecodable_media"]
    assert outcome.quarantine["detail"][0].as_py().endswith("took longer than 0.02 s to probe")


def test_training_samples_with_content_of_the_eval_split_are_quarantined() -> None:
    write_image(Path("a.png"), seed=1)
    shutil.copy("a.png", "copy.png")
    write_image(Path("b.png"), seed=2)
    rows = [_row("b.png"), _row("b.png", "copy.png"), _row("a.png", split="eval"), _row("a.png", split="eval")]
    outcome = _validate(_samples(*rows), NO_REJECTS, CONFIG)
    assert [(row["sample_id"], row["rule"], row["detail"]) for row in outcome.quarantine.to_pylist()] == [
        ("s/1", "leakage", "image 'copy.png' is also in the eval sample s/2")
    ]


def test_training_samples_with_content_of_a_benchmark_are_quarantined_and_the_row_is_named() -> None:
    for name in ("a.png", "b.png"):
        write_image(Path(name), seed=ord(name[0]))
    rows = [_row("a.png"), _row("b.png"), _row("b.png", split="eval"), _row("a.png", split="benchmark")]
    outcome = _validate(_samples(*rows), NO_REJECTS, CONFIG)
    assert [(row["sample_id"], row["detail"]) for row in outcome.quarantine.to_pylist()] == [
        ("s/0", "image 'a.png' is also in the eval sample s/3"),
        ("s/1", "image 'b.png' is also in the eval sample s/2"),
    ]


def test_what_samples_break_because_of_others_does_not_depend_on_the_batches() -> None:
    """Across batches: an eval sample after the training sample, a repeated one, and one that repeats a leaked one."""
    for name in ("a.png", "b.png"):
        write_image(Path(name), seed=ord(name[0]))
    again = _row("b.png", answer="Again.")
    rows = [_row("a.png"), again, _row("b.png"), _row("a.png"), again, _row(answer=" "), _row(answer=" "), again]
    samples = _samples(*rows, _row("a.png", split="eval"))
    outcomes = [_validate(samples, batch_rows=batch_rows) for batch_rows in (1, 3, 4096)]
    assert [(row["sample_id"], row["rule"]) for row in outcomes[0].quarantine.to_pylist()] == [
        ("s/0", "leakage"),
        ("s/3", "leakage"),
        ("s/5", "empty_turn"),
        ("s/6", "empty_turn"),
    ]
    assert [(row["sample_id"], row["detail"]) for row in outcomes[0].warnings.to_pylist()] == [
        ("s/4", "has the same turns and files as s/1"),
        ("s/7", "has the same turns and files as s/1"),
    ]
    for outcome in outcomes[1:]:
        assert outcome.quarantine.equals(outcomes[0].quarantine)
        assert outcome.warnings.equals(outcomes[0].warnings)
        assert outcome.report == outcomes[0].report


class Watched(pq.ParquetFile):
    """A table that notes how much memory Arrow has given out each time that rows are read of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, pre_buffer=False)
        self._before = pa.total_allocated_bytes()
        self.held: list[int] = []

    def iter_batches(self, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in super().iter_batches(*arguments, **options):
            self.held.append(pa.total_allocated_bytes() - self._before)
            yield batch


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROW_GROUP_ROWS", 500)
    peaks = []
    for count in (2000, 10_000):
        samples = _samples(*(_row(answer=f"{number} {'x' * 2000}") for number in range(count)))
        pq.write_table(samples, "samples.parquet", row_group_size=500)
        del samples
        table = Watched(Path("samples.parquet"))
        outcome = validate_samples(table, NO_REJECTS, CONFIG, batch_rows=100)
        write_valid(table, outcome.quarantine, CONFIG, Path("valid.parquet"), batch_rows=100)
        assert pq.read_metadata("valid.parquet").num_rows == count
        peaks.append(max(table.held))
    assert peaks[1] < 1.5 * peaks[0]


def test_an_eval_sample_that_is_not_valid_costs_no_training_sample() -> None:
    write_image(Path("a.png"))
    rows = [_row("a.png"), _row("a.png", split="eval", answer=" ")]
    assert _broken(_samples(*rows)) == {"s/1": "empty_turn"}


def test_no_samples_at_all() -> None:
    outcome = _validate(_samples(), NO_REJECTS, CONFIG)
    assert outcome.report["counts"] == {"ingested": 0, "valid": 0, "quarantined": 0, "rejected": 0}
    assert (outcome.media_index.num_rows, outcome.media_index.schema) == (0, MEDIA_INDEX)
    check_reject_fraction(outcome.report, CONFIG)


def test_two_runs_give_the_same_bytes() -> None:
    for number in range(40):
        write_image(Path(f"{number}.png"), seed=number % 30)
    cut(Path("7.png"), 0.5)
    samples = _samples(*(_row(f"{n}.png", split="eval" if n < 5 else "train") for n in reversed(range(41))))
    for run in ("1", "2"):
        outcome = _validate(samples, NO_REJECTS, CONFIG)
        _valid(samples, outcome, Path(f"valid_samples{run}"))
        for name in ("quarantine", "media_index"):
            pq.write_table(getattr(outcome, name), f"{name}{run}")
        Path(f"report{run}").write_bytes(orjson.dumps(outcome.report))
    for name in ("valid_samples", "quarantine", "media_index", "report"):
        assert Path(f"{name}1").read_bytes() == Path(f"{name}2").read_bytes()


def _report(valid: int, rules: dict[str, int]) -> dict[str, Any]:
    lost = sum(rules.values())
    counts = {"ingested": valid + lost, "valid": valid, "quarantined": lost - rules["unreadable_row"]}
    return {"counts": {**counts, "rejected": rules["unreadable_row"]}, "rules": rules}


def test_too_many_rejects_name_the_top_reasons() -> None:
    report = _report(88, {"unreadable_row": 2, "roles": 1, "leakage": 0, "too_long": 6, "missing_media": 3})
    with pytest.raises(TooManyRejectsError) as caught:
        check_reject_fraction(report, ValidateConfig(max_reject_fraction=0.11, dataset="digits"))
    assert str(caught.value) == (
        "12 of 100 rows (12.0%) are rejected or quarantined, more than the 11.0% that validate.max_reject_fraction "
        "allows; most of them by too_long (6), missing_media (3), unreadable_row (2): mend the rows, which "
        "data/08_reporting/digits/validation.html shows (all of them: data/03_primary/digits/quarantine.parquet, "
        "data/02_intermediate/digits/rejects.parquet), or raise the limit"
    )
    assert isinstance(caught.value, UserError)
    with pytest.raises(TooManyRejectsError, match="may lie elsewhere than ingest"):
        check_reject_fraction(_report(1, {"unreadable_row": 0, "missing_media": 9}), ValidateConfig())
    check_reject_fraction(report, ValidateConfig(max_reject_fraction=0.12))


def test_a_link_that_was_swapped_since_ingest_is_not_followed() -> None:
    folders = [str(Path.cwd() / "media")]
    write_image(Path("media/a.png"))
    write_image(Path("secret/a.png"), seed=1)
    Path("media/link.png").symlink_to("a.png")
    before = probe_files([Media("image", "media/link.png")], CONFIG, folders)["image", "media/link.png"]
    assert (before.missing, before.width) == (None, 8)
    Path("media/link.png").unlink()
    Path("media/link.png").symlink_to("../secret/a.png")
    samples = as_file(_samples(_row("media/link.png"), _row("media/a.png")))
    outcome = validate_samples(samples, NO_REJECTS, CONFIG, 2, folders)
    [lost] = outcome.quarantine.to_pylist()
    assert (lost["sample_id"], lost["rule"]) == ("s/0", "missing_media")
    assert "leads to" in lost["detail"]
    assert lost["detail"].endswith("secret/a.png', outside of data_folder")
    assert outcome.media_index["content_hash"].to_pylist()[1] is None
