from __future__ import annotations

import filecmp
import json
from collections import Counter
from pathlib import Path
from typing import get_args

import av
import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from qvl_pipeline.config.data.ingest import DemoKind
from qvl_pipeline.demo.digits import TRAIN_WEIGHTS, _of_split, build_digits
from qvl_pipeline.demo.questions import KINDS

SOURCES = {"digits_parquet": "messages.parquet", "digits_jsonl": "messages.jsonl", "digits_sharegpt": "sharegpt.json"}


def read_source(folder: Path, source: str) -> list:
    """Every row of a source, a line that is not JSON as bytes."""
    path = folder / SOURCES[source]
    if source == "digits_parquet":
        return pq.read_table(path).to_pylist()
    if source == "digits_sharegpt":
        return orjson.loads(path.read_bytes())
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            rows.append(line)
    return rows


def planted_in(folder: Path, source: str) -> dict[int, str]:
    return {
        bad["row"]: bad["rule"] for bad in json.loads((folder / "planted.json").read_text()) if bad["source"] == source
    }


def items(row: dict) -> list[dict]:
    """Content items of an OpenAI row in reading order, nulls left out."""
    contents = [
        [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        for message in row["messages"]
    ]
    return [
        {key: value for key, value in item.items() if value is not None} for content in contents for item in content
    ]


def media_of(row: dict) -> list[str]:
    if "conversations" in row or "images" in row:
        return row["images"] + row["videos"]
    return [item[item["type"]]["url"] for item in items(row) if item["type"] != "text"]


def good_rows(folder: Path) -> list[dict]:
    return [
        row
        for source in SOURCES
        for number, row in enumerate(read_source(folder, source))
        if number not in planted_in(folder, source)
    ]


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_good_rows_are_as_many_as_asked_for(digits_folder: Path) -> None:
    splits = Counter(row["split"] for row in good_rows(digits_folder))
    assert splits == {"train": 220, "eval": 70}


def test_every_kind_is_in_both_splits_and_eval_has_equal_shares(digits_folder: Path) -> None:
    kinds = Counter((row["split"], row["kind"]) for row in good_rows(digits_folder))
    assert {kind for split, kind in kinds if split == "train"} == set(TRAIN_WEIGHTS)
    assert {kind: kinds["eval", kind] for kind in TRAIN_WEIGHTS} == dict.fromkeys(TRAIN_WEIGHTS, 10)


def test_kinds_that_are_asked_for_are_all_there_is(tmp_path: Path) -> None:
    assert set(get_args(DemoKind)) == set(KINDS)
    assert set(KINDS) - set(TRAIN_WEIGHTS) == {"next_digit", "audio", "audio_and_image"}
    build_digits(tmp_path / "digits", seed=0, train_samples=80, eval_samples=8, kinds={"next_digit": 1})
    rows = good_rows(tmp_path / "digits")
    assert {row["kind"] for row in rows} == {"next_digit"}
    texts = [[item["text"] for item in items(row) if item["type"] == "text"] for row in rows if "messages" in row]
    assert {question for question, _ in texts} == {"Which digit comes after this one?"}
    assert {answer for _, answer in texts} == set("0123456789")


def test_most_samples_are_in_the_parquet_source(digits_folder: Path) -> None:
    rows = {source: len(read_source(digits_folder, source)) for source in SOURCES}
    assert rows["digits_parquet"] / sum(rows.values()) == pytest.approx(0.7, abs=0.03)
    assert rows["digits_jsonl"] > 30
    assert rows["digits_sharegpt"] > 30


def test_rows_have_unique_ids(digits_folder: Path) -> None:
    ids = [row["id"] for source in SOURCES for row in read_source(digits_folder, source) if isinstance(row, dict)]
    assert len(set(ids)) == len(ids)


def test_good_media_decode_at_the_canvas_size(digits_folder: Path) -> None:
    for name in {name for row in good_rows(digits_folder) for name in media_of(row)}:
        if name.endswith(".png"):
            assert np.asarray(Image.open(digits_folder / name)).shape == (64, 64, 3)
        else:
            assert decode(digits_folder / name).shape == (8, 64, 64, 3)


def test_clips_are_h264_yuv420p(digits_folder: Path) -> None:
    clip = next(name for row in good_rows(digits_folder) for name in media_of(row) if name.endswith(".mp4"))
    with av.open(str(digits_folder / clip)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 4)


def test_sharegpt_markers_match_media(digits_folder: Path) -> None:
    bad = planted_in(digits_folder, "digits_sharegpt")
    for number, row in enumerate(read_source(digits_folder, "digits_sharegpt")):
        if number not in bad:
            text = "".join(turn["value"] for turn in row["conversations"])
            assert (text.count("<image>"), text.count("<video>")) == (len(row["images"]), len(row["videos"]))


def test_jsonl_mixes_plain_strings_and_lists(digits_folder: Path) -> None:
    bad = planted_in(digits_folder, "digits_jsonl")
    rows = [row for number, row in enumerate(read_source(digits_folder, "digits_jsonl")) if number not in bad]
    contents = {type(message["content"]) for row in rows for message in row["messages"] if message["role"] == "user"}
    assert contents == {str, list}


def test_multi_turn_has_rounds_and_media(digits_folder: Path) -> None:
    for row in read_source(digits_folder, "digits_parquet"):
        if row["kind"] == "multi_turn":
            roles = [message["role"] for message in row["messages"]]
            assert roles in (["user", "assistant"] * 2, ["user", "assistant"] * 3)
            assert media_of(row)


def test_splits_share_no_digit_and_no_number() -> None:
    train, evaluation = (_of_split(np.arange(1797), split, 3) for split in ("train", "eval"))
    assert len(train) + len(evaluation) == 1797
    assert not set(train) & set(evaluation)
    assert len(evaluation) == 359


def test_text_questions_are_not_repeated(digits_folder: Path) -> None:
    texts = [items(row)[0]["text"] for row in good_rows(digits_folder) if row["kind"] == "text" and "messages" in row]
    assert len(set(texts)) == len(texts)


def test_answers_to_text_questions_are_right(digits_folder: Path) -> None:
    rows = [
        row for row in read_source(digits_folder, "digits_parquet") if row["kind"] == "text" and media_of(row) == []
    ]
    planted = planted_in(digits_folder, "digits_parquet")
    for number, row in enumerate(read_source(digits_folder, "digits_parquet")):
        if row["kind"] == "text" and number not in planted:
            question, answer = (item["text"] for item in items(row))
            asked = question.removesuffix("?").split()[-1]
            assert answer == asked[0 if " first " in question else -1]
    assert rows


def test_reversed_motion_is_the_opposite_direction(digits_folder: Path) -> None:
    moves = {"left": (-1, 1), "right": (1, 1), "up": (-1, 0), "down": (1, 0)}
    seen = set()
    for row in good_rows(digits_folder):
        if "messages" in row and row["kind"] == "video" and "move" in items(row)[1]["text"]:
            frames = decode(digits_folder / media_of(row)[0]).mean(axis=-1)
            ink = np.where(frames > 150, frames, 0)
            centres = [np.argwhere(frame).mean(axis=0) for frame in ink]
            sign, axis = moves[items(row)[2]["text"]]
            assert sign * (centres[-1] - centres[0])[axis] > 15
            assert abs((centres[-1] - centres[0])[1 - axis]) < 3
            seen.add(items(row)[2]["text"])
    assert len(seen) >= 3


def test_planted_rows_are_what_they_claim(digits_folder: Path) -> None:
    rules = Counter()
    for source in SOURCES:
        rows = read_source(digits_folder, source)
        for number, rule in planted_in(digits_folder, source).items():
            assert breaks(rows[number], rule, digits_folder), (source, number, rule)
            rules[source, rule] += 1
    assert {rule for _, rule in rules} == {
        *("unreadable_row", "unknown_format", "missing_media", "undecodable_media"),
        *("placeholder_mismatch", "no_assistant_turn", "too_long"),
    }
    assert {source for source, _ in rules} == set(SOURCES)


def test_no_good_row_breaks_a_rule(digits_folder: Path) -> None:
    for row in good_rows(digits_folder):
        for rule in ("unknown_format", "missing_media", "placeholder_mismatch", "no_assistant_turn", "too_long"):
            assert not breaks(row, rule, digits_folder), (row["id"], rule)


def breaks(row: dict | bytes, rule: str, folder: Path) -> bool:
    """Whether a row breaks a rule, judged independently of how it was spoilt."""
    if rule == "unreadable_row":
        return isinstance(row, bytes)
    if rule == "unknown_format":
        return not {"messages", "conversations"} & set(row)
    turns = row.get("messages") or row.get("conversations")
    texts = [str(turn.get("content", turn.get("value"))) for turn in turns]
    return {
        "missing_media": lambda: not all((folder / name).exists() for name in media_of(row)),
        "undecodable_media": lambda: any(undecodable(folder / name) for name in media_of(row)),
        "placeholder_mismatch": lambda: "images" in row and "".join(texts).count("<image>") != len(row["images"]),
        "no_assistant_turn": lambda: not {"assistant", "gpt"} & {turn.get("role", turn.get("from")) for turn in turns},
        "too_long": lambda: sum(map(len, texts)) > 4000,
    }[rule]()


def undecodable(path: Path) -> bool:
    try:
        Image.open(path).load() if path.suffix == ".png" else decode(path)
    except (UnidentifiedImageError, OSError, av.FFmpegError):
        return True
    return False


def test_same_seed_gives_the_same_bytes(digits_folder: Path, tmp_path: Path) -> None:
    build_digits(tmp_path / "again", seed=3, train_samples=220, eval_samples=70)
    names = [path.relative_to(digits_folder) for path in sorted(digits_folder.rglob("*")) if path.is_file()]
    same, different, missing = filecmp.cmpfiles(digits_folder, tmp_path / "again", names, shallow=False)
    assert (different, missing) == ([], [])
    assert len(same) > 300


def test_another_seed_gives_other_samples(digits_folder: Path, tmp_path: Path) -> None:
    build_digits(tmp_path / "other", seed=4, train_samples=220, eval_samples=70)
    assert (tmp_path / "other" / "sharegpt.json").read_bytes() != (digits_folder / "sharegpt.json").read_bytes()


def test_an_earlier_build_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    build_digits(folder, seed=0, train_samples=40, eval_samples=7)
    stale = folder / "images" / "stale.png"
    stale.touch()
    build_digits(folder, seed=0, train_samples=20, eval_samples=7)
    assert not stale.exists()
    assert len(good_rows(folder)) == 27
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_of_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not the digits dataset"):
        build_digits(tmp_path, seed=0, train_samples=20, eval_samples=7)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
