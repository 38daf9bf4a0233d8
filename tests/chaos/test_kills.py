"""Five kills in a small size; `make chaos` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.harness import Run, trial, undisturbed
from tests.chaos.kills import DISTURBANCES, kill


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return undisturbed(tmp_path_factory.mktemp("reference") / "project")


@pytest.mark.timeout(900)  # six runs of a command, of which each may wait for its processes
def test_a_project_whose_runs_are_killed_five_times_ends_up_the_same(reference: Run, tmp_path: Path) -> None:
    """One after the other, so that each goes on from what the kills before have left."""
    # Decoders first, which a run that came to its end leaves nothing to do for; they live for a second, so at once.
    # Last the one that may come too late.
    kinds = [kill("decoder", within_s=0), *(DISTURBANCES[kind] for kind in ("torchrun", "rank", "publication", "any"))]
    done: list[str] = []
    trial(tmp_path / "project", reference, kinds, random.Random(0), done)
    assert len(done) >= 4, done
    [log] = (tmp_path / "project/data/06_models").glob("*/scratch/*/engine.log")
    [result] = (tmp_path / "project/data/06_models").glob("*/scratch/*/result.json")
    assert log.stat().st_mtime <= result.stat().st_mtime + 60, "nothing was trained after the training had ended"
