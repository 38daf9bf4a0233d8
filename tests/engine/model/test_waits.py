"""A micro-batch makes the host wait for its device nowhere (counted on the CPU: `tests/engine/waits.py`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from tests.engine.waits import DeviceWaits


@pytest.mark.parametrize("kinds", [["text"], ["text", "two_images", "image_and_video"]], ids="+".join)
def test_host_waits_nowhere_in_a_micro_batch(
    kinds: list[str], packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict[str, Any]]
) -> None:
    batch = builder.build([samples[kind] for kind in kinds], vision=len(kinds) > 1).to(torch.device("cpu"))
    # The kernels of a CPU ask for the lengths of samples; those of a GPU are told the longest.
    with DeviceWaits(ignored=["by_length", "_by_sample"]) as waits:
        waits.put([*packed.parameters(), *packed.buffers(), *_tensors_on_device(batch)])
        packed(batch).sum().backward()
    assert waits.found == [], Counter(waits.found)


def _tensors_on_device(batch: Any) -> list[torch.Tensor]:
    values = {name: value for name, value in vars(batch).items() if name != "grid_thw"}
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
