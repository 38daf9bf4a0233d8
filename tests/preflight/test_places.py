"""Host memory of loader processes: what they prepare ahead is bounded by bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qvl_pipeline.preflight.places import host

LOADER, PIECE = 300 << 20, 128 << 20
TOKEN, PATCH = 41, 3 * 2 * 16**2


def loaders_bytes(tokens: int, workers: int | str) -> int:
    data = SimpleNamespace(dataloader_num_workers=workers, dataloader_prefetch_factor=2)
    spec = SimpleNamespace(data=data, run=SimpleNamespace(save_async=False))
    vision = SimpleNamespace(temporal_patch_size=2, patch_size=16)
    needed = SimpleNamespace(
        heavy=SimpleNamespace(tokens=tokens, patches=4 * tokens),
        config=SimpleNamespace(vision_config=vision),
        offloaded=0,
    )
    needed.checkpoint = needed.bytes = 0
    return host(spec, needed, SimpleNamespace(ranks=1, device="cuda", per_node=1), packs=0)["loaders_bytes"]


@pytest.mark.parametrize("workers", [0, 4])
def test_light_micro_batches_are_prepared_whole(workers: int) -> None:
    batch = 16_000 * (TOKEN + 4 * PATCH)
    assert batch < PIECE
    assert loaders_bytes(16_000, workers) == workers * (LOADER + 2 * batch) + batch


def test_an_automatic_number_of_processes_is_taken_to_be_that_of_a_stream() -> None:
    assert loaders_bytes(16_000, "auto") == loaders_bytes(16_000, 4)


def test_of_heavy_ones_each_process_has_its_share_of_the_pieces_ready_and_one_more() -> None:
    tokens = 256 * 1024
    batch = tokens * (TOKEN + 4 * PATCH)
    pieces = -(-batch // PIECE)
    assert pieces == 13
    assert loaders_bytes(tokens, 4) == 4 * (LOADER + (4 + 1) * PIECE) + batch
    assert loaders_bytes(tokens, 0) == batch
