"""Model families: everything that differs between the models the engine trains. A new family is one new file here."""

from __future__ import annotations

from qvl_pipeline.families import qwen2_5_omni, qwen2_5_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe
from qvl_pipeline.families.family import ModelFamily, divided_heads

FAMILIES: dict[str, ModelFamily] = {
    family.name: family
    for family in (
        qwen3_vl.FAMILY,
        qwen2_5_vl.FAMILY,
        qwen3_5.FAMILY,
        qwen3_vl_moe.FAMILY,
        qwen3_5_moe.FAMILY,
        qwen2_5_omni.FAMILY,
    )
}


def family_of(model_type: str) -> ModelFamily:
    """Return the family of a model, by what its `config.json` says.

    Raises:
        KeyError: There is none.
    """
    for family in FAMILIES.values():
        if model_type in (family.model_types or (family.name,)):
            return family
    raise KeyError(model_type)


__all__ = ["FAMILIES", "ModelFamily", "divided_heads", "family_of"]
