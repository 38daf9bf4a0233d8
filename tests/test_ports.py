from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qvl_pipeline import ports
from qvl_pipeline.ports import free_port


def test_a_port_is_one_that_no_connection_is_given() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    chosen = {free_port() for _ in range(50)}
    assert [port for port in chosen if first <= port <= last] == [], "given to connections, too"
    assert len(chosen) > 40, "two that ask at once get different ones"


def test_a_port_that_is_listened_on_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "_LOWEST", taken)
        range_file = tmp_path / "range"
        range_file.write_text(f"{taken + 102}\t60999\n")
        monkeypatch.setattr(ports, "_EPHEMERAL", range_file)
        assert taken < min(free_port() for _ in range(500)) < taken + 102


@pytest.mark.parametrize("ephemeral", ["1024\t65535\n", None], ids=["all are ephemeral", "not Linux"])
def test_there_is_one_where_all_are_ephemeral_or_nobody_says(
    ephemeral: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if ephemeral:
        (tmp_path / "range").write_text(ephemeral)
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_an_address_that_is_not_here_is_an_error() -> None:
    with pytest.raises(OSError, match="Cannot assign requested address"):
        free_port("192.0.2.1")
