from __future__ import annotations

from benchmarks.tracking import _ratio


def test_a_round_that_was_slow_as_a_whole_does_not_count() -> None:
    times = {"works": [10.0, 30.0, 10.0], "fails": [10.2, 30.3, 11.0]}
    rows = [
        {"round": number, "server": server, "training_s": seconds}
        for server, rounds in times.items()
        for number, seconds in enumerate(rounds)
    ]
    assert _ratio(rows, "training_s") == 10.2 / 10.0
