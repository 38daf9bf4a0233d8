"""What `benchmarks.gpu` measured on a GPU, and what the preflight says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu import OPTIM, PARALLEL
from benchmarks.gpu_models import MODELS, make_samples
from benchmarks.report import RESULTS
from qvl_pipeline.engine.spec import RecomputeSpec
from qvl_pipeline.preflight.estimate import estimate
from qvl_pipeline.preflight.hardware import GIB, Hardware
from qvl_pipeline.preflight.packs import Heavy

TOKENS = 16_384


def measured_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of our own stack, with the name of their model."""
    for name in MODELS:
        for row in json.loads((RESULTS / f"gpu_{name}.json").read_text())["rows"]:
            if row["stack"] == "ours" and row["memory_gib"]:
                yield name, row


def expected_gib(name: str, row: dict[str, Any]) -> float:
    """GiB of tensors that the preflight says such a row needs."""
    config, kept = MODELS[name], row["recomputed"]
    full = {tower: "full" if tower in kept else "none" for tower in ("llm", "vit")}
    spec = SimpleNamespace(
        model=SimpleNamespace(
            family=config.model_type,
            freeze_modules=(),
            attn_implementation=row["attention"],
            vit_attn_implementation=row["attention"],
            use_liger_kernel=row["blocks"] == "liger",
            torch_compile=row["blocks"] == "compiled",
        ),
        recompute=RecomputeSpec(**full, every=1, offload=False),
        parallel=replace(PARALLEL, reshard_after_forward="weights" in kept),
        optim=OPTIM,
        adapter=SimpleNamespace(used=False),
        data=SimpleNamespace(use_rmpad=True, per_device_train_batch_size=1),
    )
    heavy = Heavy("", make_samples(config, TOKENS))
    return estimate(spec, config, [heavy], Hardware("H200", 1, 1, 140 * GIB, 9.89e14), 1).peak.bytes / GIB
