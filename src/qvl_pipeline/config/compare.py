"""Parameters of the pipeline `compare`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from qvl_pipeline.config.base import Block


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split("+")] if isinstance(value, str) else value


_Runs = list[Annotated[str, Field(min_length=1)]]


class CompareConfig(Block):
    """Block `compare`.

    Attributes:
        runs: The trainings to compare, two to eight; the first is what the others are compared with. Each is a profile
            or a DVC experiment, of which the newest finished training is taken, or the id of an MLflow run. A list, or
            one string with `+` between them (Kedro takes a comma in `--params` for the start of another parameter).
            Empty: the newest training of every profile.
    """

    runs: Annotated[_Runs, BeforeValidator(_split, json_schema_input_type=_Runs | str)] = Field(default_factory=list)
