from __future__ import annotations

from qvl_pipeline.errors import did_you_mean


def test_the_nearest_name_is_named() -> None:
    assert did_you_mean("trian", {"sample": 1, "train": 2}, otherwise="") == "did you mean 'train'?"


def test_nothing_far_off_is_suggested() -> None:
    assert did_you_mean("xyz", ["sample", "train"], "known are sample, train") == "known are sample, train"
