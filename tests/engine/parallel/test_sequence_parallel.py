"""Sequence parallelism against one rank (invariant 2), and how a pack is shared out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText

from qvl_pipeline.engine.model.flops import flops_of
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.parallel.sequence_parallel import (
    SequenceShare,
    check_degree,
    feature_routes,
    gather_heads,
    gather_tokens,
    split_media,
    temporal_patches,
    visual_tokens,
)
from qvl_pipeline.engine.spec import RecomputeSpec
from tests.engine.model.test_packed_vlm import KINDS, assert_same_gradients, gradients
from tests.engine.packs import load_packed, make_builder, make_samples
from tests.engine.ranks import run_ranks

# Micro-batches: the kinds of their samples, and whether a rank of another group has media.
MICRO_BATCHES = (
    ((*KINDS,), False),
    ((*KINDS[::-1], "text"), False),
    (("text",), False),
    (("text",), True),
    (("video",), False),
    ((), True),
)


def compare_with_one_rank(folder: str, family: str, alone: str) -> None:
    """Run on all ranks, which form one group: losses and gradients must be those of one rank alone."""
    dist.init_process_group("gloo")
    rank, degree = dist.get_rank(), dist.get_world_size()
    model = load_packed(Path(folder), family, sp_group=dist.group.WORLD)
    idle = 0
    for expected in torch.load(alone):
        kinds, vision = expected["micro_batch"]
        losses, grads, calls = train(model, family, kinds, vision, SequenceShare(rank, degree))
        assert calls == expected["calls"], "every rank calls its vision tower equally often"
        parts: list[torch.Tensor] = [torch.empty(0)] * degree
        dist.all_gather_object(parts, losses)
        idle += any(len(part) == 0 for part in parts)
        torch.testing.assert_close(torch.cat(parts), expected["losses"], rtol=1e-5, atol=1e-6)
        for grad in grads.values():
            dist.all_reduce(grad)
        if kinds:
            assert_same_gradients(grads, expected["gradients"])
        else:
            assert not any(grad.any() for grad in grads.values())
    assert idle >= 2, "some rank must have had nothing but ignored tokens"
    dist.destroy_process_group()


def train(
    model: PackedVLM, family: str, kinds: Sequence[str], vision: bool, share: SequenceShare
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return losses, gradients and the number of forward passes of the vision tower, recomputed ones included."""
    samples = [make_samples(model.hf.config, family)[kind] for kind in kinds]
    vision = vision or any(sample["media"] for sample in samples)
    calls: list[None] = []
    hook = model.hf.model.visual.blocks[0].norm1.register_forward_pre_hook(lambda *_: calls.append(None))
    model.train()
    recompute_activations(model.hf, RecomputeSpec("full", "full", 1, False))
    model.zero_grad()
    losses = model(make_builder(model.hf.config, family, share=share).build(samples, vision=vision))
    losses.sum().backward()
    hook.remove()
    return losses.detach(), gradients(model), len(calls)


@pytest.mark.parametrize("degree", [2, 4])
def test_losses_and_gradients_are_those_of_one_rank(
    family: str, degree: int, packed: PackedVLM, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    # With two key heads, each of four ranks gets a repeated one.
    assert_shared_as_alone(packed, tiny_folders(family), degree, tmp_path)


def test_eight_ranks_share_a_pack(tiny_folders: Callable[[str], Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_folders("qwen3_vl"))
    config.text_config.num_attention_heads, config.text_config.num_hidden_layers = 8, 2
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    packed = load_packed(tmp_path / "model", "qwen3_vl")
    assert_shared_as_alone(packed, tmp_path / "model", 8, tmp_path, (MICRO_BATCHES[0], *MICRO_BATCHES[2:4]))


def assert_shared_as_alone(
    packed: PackedVLM,
    folder: Path,
    degree: int,
    tmp_path: Path,
    micro_batches: Sequence[tuple[Sequence[str], bool]] = MICRO_BATCHES,
    compare: Callable[[str, str, str], None] = compare_with_one_rank,
) -> None:
    alone = []
    for kinds, vision in micro_batches:
        losses, grads, calls = train(packed, packed.family.name, kinds, vision, SequenceShare())
        assert calls == (2 if vision or set(kinds) != {"text"} else 0)
        alone.append({"micro_batch": (kinds, vision), "losses": losses, "gradients": grads, "calls": calls})
    torch.save(alone, tmp_path / "alone.pt")
    arguments = (str(folder), packed.family.name, str(tmp_path / "alone.pt"))
    run_ranks(compare, degree, *arguments, log_dir=tmp_path)


def compare_attention(heads: tuple[tuple[int, int], ...]) -> None:
    """Run on all ranks: attention with traded heads must be attention over all tokens."""
    dist.init_process_group("gloo")
    rank, degree = dist.get_rank(), dist.get_world_size()
    for query_heads, key_heads in heads:
        torch.manual_seed(query_heads)
        tokens = 3 * degree
        whole = [torch.randn(1, n, tokens, 8, requires_grad=True) for n in (query_heads, key_heads, key_heads)]
        weight = torch.randn(1, tokens, query_heads, 8)
        expected = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True).transpose(1, 2)
        expected_gradients = torch.autograd.grad((expected * weight).sum(), whole)
        mine = SequenceShare(rank, degree).of(tokens)
        parts = [tensor.detach()[:, :, mine].requires_grad_() for tensor in whole]
        query, key, value = gather_tokens(*parts, dist.group.WORLD)
        assert query.shape[1] * degree == query_heads
        local = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
        output = gather_heads(local, dist.group.WORLD)
        torch.testing.assert_close(output, expected[:, mine])
        for actual, gradient in zip(
            torch.autograd.grad((output * weight[:, mine]).sum(), parts), expected_gradients, strict=True
        ):
            torch.testing.assert_close(actual, gradient[:, :, mine])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("degree", "heads"),
    [(4, ((8, 8), (8, 4), (8, 2), (8, 1), (12, 6), (12, 3))), (8, ((16, 16), (16, 8), (32, 4), (8, 2), (24, 12)))],
)
def test_any_number_of_key_heads_is_shared(degree: int, heads: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    run_ranks(compare_attention, degree, heads, log_dir=tmp_path)


def medium(t: int, h: int, w: int) -> dict:
    return {"grid_t": t, "grid_h": h, "grid_w": w}


class TestSplittingMedia:
    def test_clip_is_cut_between_frames_and_keeps_its_order(self) -> None:
        assert split_media([medium(5, 4, 4)], 2) == [
            [medium(5, 4, 4) | {"part": (0, 2)}],
            [medium(5, 4, 4) | {"part": (2, 5)}],
        ]

    def test_a_share_is_shared_again_in_the_same_order(self) -> None:
        shares = split_media([medium(9, 4, 4), medium(1, 4, 6), medium(4, 2, 2)], 2)
        pieces = [item for share in shares for piece in split_media(share, 3) for item in piece]
        frames = [(item["grid_w"], n) for item in pieces for n in range(*item.get("part", (0, item["grid_t"])))]
        assert frames == [*((4, n) for n in range(9)), (6, 0), *((2, n) for n in range(4))]

    def test_image_is_never_cut(self) -> None:
        shares = split_media([medium(1, 8, 8), medium(1, 2, 2)], 4)
        assert [item for share in shares for item in share] == [medium(1, 8, 8), medium(1, 2, 2)]

    @pytest.mark.parametrize("degree", [2, 4, 8])
    def test_no_share_is_more_than_a_frame_above_the_average(self, degree: int) -> None:
        grids = np.random.default_rng(0).integers(1, [9, 20, 20], size=(30, 3)).tolist()
        shares = split_media([medium(*grid) for grid in grids], degree)
        sizes = [sum(temporal_patches(i) * i["grid_h"] * i["grid_w"] for i in share) for share in shares]
        assert sum(sizes) == sum(t * h * w for t, h, w in grids)
        assert max(sizes) <= sum(sizes) / degree + max(h * w for _, h, w in grids)

    def test_no_media_are_no_shares(self) -> None:
        assert split_media([], 2) == [[], []]


def test_routes_lead_each_feature_from_its_maker_to_its_placeholder() -> None:
    # Two ranks of eight tokens; the clip's features are made half and half, but five of six are used by the second.
    mask = np.array([0] * 7 + [1] * 6 + [0] * 3, dtype=bool)
    shares = split_media([medium(2, 2, 6)], 2)
    assert feature_routes(mask, [visual_tokens(share) for share in shares]).tolist() == [[1, 2], [0, 3]]


def test_targets_are_shifted_before_the_pack_is_cut(tiny_folders: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_folders("qwen3_vl"))
    samples = [make_samples(config, "qwen3_vl")["text"]]
    whole = make_builder(config, "qwen3_vl").build(samples, vision=False)
    parts = [
        make_builder(config, "qwen3_vl", share=SequenceShare(rank, 4)).build(samples, vision=False) for rank in range(4)
    ]
    assert torch.cat([part.input_ids for part in parts], dim=1)[:, :7].tolist() == whole.input_ids.tolist()
    assert torch.cat([part.targets for part in parts]).tolist() == whole.targets.tolist()
    assert [part.target_index.tolist() for part in parts] == [[], [0, 1], [0], []]
    assert all(part.cu_seqlens.tolist() == [0, 7, 8] for part in parts)


def test_work_of_the_ranks_adds_up_to_that_of_one(family: str, packed: PackedVLM) -> None:
    config, flops = packed.hf.config, flops_of(packed)
    samples = list(make_samples(config, family).values())
    parts = [
        make_builder(config, family, share=SequenceShare(rank, 4)).build(samples, vision=True) for rank in range(4)
    ]
    whole = make_builder(config, family).build(samples, vision=True)
    assert sum(flops.count(part) for part in parts) == pytest.approx(flops.count(whole))


class TestDegree:
    def test_that_does_not_divide_the_heads_is_refused(self) -> None:
        with pytest.raises(ValueError, match="8 does not divide the model's 28 attention heads"):
            check_degree(8, world_size=8, heads={"attention heads": 28})

    def test_that_does_not_divide_the_processes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="4 does not divide the number of processes, 6"):
            check_degree(4, world_size=6, heads={"attention heads": 32})
