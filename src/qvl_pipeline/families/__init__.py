"""Model families: everything that differs between the models the engine trains. A new family is one new file here."""

from __future__ import annotations

from qvl_pipeline.families import qwen2_5_omni, qwen2_5_vl, qwen3_vl
from qvl_pipeline.families.family import ModelFamily

FAMILIES: dict[str, ModelFamily] = {
    family.name: family for family in (qwen3_vl.FAMILY, qwen2_5_vl.FAMILY, qwen2_5_omni.FAMILY)
}

__all__ = ["FAMILIES", "ModelFamily"]
