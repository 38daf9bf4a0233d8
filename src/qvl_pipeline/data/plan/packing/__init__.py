"""Which samples share a pack: bin packing within two budgets, tokens and vision patches. No sample is ever split."""

from __future__ import annotations

from qvl_pipeline.data.plan.packing.best_fit_decreasing import best_fit
from qvl_pipeline.data.plan.packing.equal_work import balanced
from qvl_pipeline.data.plan.packing.first_fit_shuffled import first_fit
from qvl_pipeline.data.plan.packing.packs import Packs, one_each

__all__ = ["Packs", "balanced", "best_fit", "first_fit", "one_each"]
