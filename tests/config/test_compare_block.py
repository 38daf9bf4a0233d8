from __future__ import annotations

import pytest
from pydantic import ValidationError

from qvl_pipeline.config import CompareConfig


@pytest.mark.parametrize("given", ["base+0a1b + wider", ["base", "0a1b", "wider"]])
def test_runs_are_a_list_or_names_joined_by_plus(given: str | list[str]) -> None:
    assert CompareConfig(runs=given).runs == ["base", "0a1b", "wider"]


def test_a_plus_with_nothing_beside_it_is_refused() -> None:
    with pytest.raises(ValidationError):
        CompareConfig(runs="base+")
