"""A table that is not what was written is named, whatever of its bytes it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.storage.digests import DamagedError
from qvl_pipeline.storage.tables import ATTRS, read_table, table_writer, write_table

TABLE = pa.table({"id": ["a", "b", None], "size": [1, 2, 3], "media": [[{"path": "a.png"}], [], None]})
ATTRIBUTES = {ATTRS: json.dumps({"made_with": {"sample.fps": 2}}).encode()}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def blanked(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :]


def cut_off(content: bytes, at: int) -> bytes:
    return content[:at]


@pytest.mark.parametrize("damage", [flipped, blanked, cut_off])
def test_no_byte_is_without_a_check(tmp_path: Path, damage: Callable[[bytes, int], bytes]) -> None:
    path = tmp_path / "table.parquet"
    write_table(TABLE.replace_schema_metadata(ATTRIBUTES), path)
    content = path.read_bytes()
    unnoticed = []
    for at in range(len(content)):
        path.write_bytes(damaged := damage(content, at))
        try:
            read_table(path)
        except DamagedError:
            continue
        if damaged != content:
            unnoticed.append(at)
    assert not unnoticed


def test_the_digest_is_no_attribute_of_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_table(TABLE.replace_schema_metadata(ATTRIBUTES), path)
    table = read_table(path)
    assert table == TABLE
    assert table.schema.metadata == ATTRIBUTES
    write_table(table, tmp_path / "again.parquet")
    assert read_table(tmp_path / "again.parquet").schema.metadata == ATTRIBUTES


def test_a_file_larger_than_a_piece_has_its_digest_too(tmp_path: Path) -> None:
    rows = pa.table({"value": pa.array(range(300_000), pa.int64())})
    path = tmp_path / "large.parquet"
    with table_writer(path, rows.schema) as writer:
        for start in range(0, rows.num_rows, 100_000):
            writer.write_table(rows.slice(start, 100_000))
    assert path.stat().st_size > 1 << 20
    assert read_table(path) == rows


def test_a_table_of_another_program_is_read_as_it_is(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "other.parquet")
    assert read_table(tmp_path / "other.parquet") == TABLE
