"""The closed schema every parameters block shares."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Block(BaseModel):
    """A parameters block that refuses unknown keys and names the nearest known one.

    No key is accepted and ignored: a misspelt `learning_rat` would otherwise train with the default for days.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = list(cls.model_fields)
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}"
                raise ValueError(f"unknown key '{key}': {hint}")
        return values
