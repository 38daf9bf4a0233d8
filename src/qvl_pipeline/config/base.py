"""The closed schema every parameters block shares."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from qvl_pipeline.errors import did_you_mean


@dataclass(frozen=True)
class Indifferent:
    """Marks a parameter that decides nothing of what is written: `threads: Annotated[int, Indifferent()] = 1`.

    Attributes:
        to: What it does not decide, where it does decide something else; see `Block.decisive`.
    """

    to: str | None = None


class Block(BaseModel):
    """A parameters block that refuses unknown keys and names the nearest known one.

    No key is accepted and ignored: a misspelt `learning_rat` would otherwise train with the default for days. Numbers
    are finite, and `true` is none: pydantic would take `limit: yes` for one row.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return, as JSON values, what decides what is written; not where and how fast it is worked on.

        Args:
            of: Of what, where more than one thing depends on the block, and each on other parameters: `frames` (all
                tables up to the frames of clips) or `tokens`. By default, of anything.
        """
        fields = type(self).model_fields.items()
        marks = (Indifferent(), Indifferent(of))
        kept = {name for name, field in fields if not any(mark in field.metadata for mark in marks)}
        values = self.model_dump(mode="json", include=kept)
        return {name: _decisive(getattr(self, name), value, of) for name, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _reject_switches_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("a number is needed")
        return value

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = list(cls.model_fields)
        for key in values:
            if key not in known:
                hint = did_you_mean(str(key), known, f"known keys: {', '.join(sorted(known))}")
                raise ValueError(f"unknown key '{key}': {hint}")
        return values


def _decisive(value: Any, dumped: Any, of: str | None) -> Any:
    """Return what is decisive of a value that may be a block, a list of them, or some by name."""
    if isinstance(value, Block):
        return value.decisive(of)
    if isinstance(value, list) and any(isinstance(block, Block) for block in value):
        return [block.decisive(of) for block in value]
    if isinstance(value, dict) and any(isinstance(block, Block) for block in value.values()):
        return {name: block.decisive(of) for name, block in value.items()}
    return dumped


def _kinds(annotation: Any) -> set[Any]:
    """Return the members of a union, without their limits; of any other annotation itself."""
    if get_origin(annotation) in (Union, UnionType):
        return {kind for member in get_args(annotation) for kind in _kinds(member)}
    return _kinds(get_args(annotation)[0]) if get_origin(annotation) is Annotated else {annotation}
