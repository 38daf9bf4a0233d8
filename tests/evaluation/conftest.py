from __future__ import annotations

import pytest

from tests.evaluation.world import KINDS, World, build_world


@pytest.fixture(scope="session", params=["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp(request.param), request.param, list(KINDS))
