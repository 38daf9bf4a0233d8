"""Arguments of generation that transformers would take and never look at."""

from __future__ import annotations

import pytest

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.generation import check_generation


def test_misspelt_arguments_of_generation_are_refused() -> None:
    with pytest.raises(UserError, match=r"evaluate\.generation\.temprature .*: did you mean 'temperature'\?"):
        check_generation(EvaluateConfig(generation={"do_sample": True, "temprature": 0.7}))
    check_generation(EvaluateConfig(generation={"do_sample": True, "temperature": 0.7, "top_k": 5, "num_beams": 2}))
