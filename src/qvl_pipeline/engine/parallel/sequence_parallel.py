"""Ulysses sequence parallelism: neighbouring ranks share the tokens, the attention heads and the media of one pack.

Every rank of a group holds a contiguous part of the pack's tokens through the whole decoder. Around attention, an
all-to-all trades tokens for heads: each rank sees all tokens, but only its share of the heads (Jacobs et al.,
"DeepSpeed Ulysses", arXiv:2309.14509). The vision tower has no such exchange: each rank runs it on its share of the
pack's images and frames, and the features go to the ranks that hold their placeholders.

All exchanges are differentiable, and the loss of a pack is the sum of its ranks' losses, so that summing gradients over
all ranks of the job gives what one rank alone would compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qvl_pipeline.families.hearing import audio_tokens

# Two by two patches become one token of the language model, in every Qwen-VL model.
PATCHES_PER_TOKEN = 4


def check_degree(degree: int, world_size: int, heads: Mapping[str, int]) -> None:
    """Refuse a degree of sequence parallelism that cannot work.

    Args:
        degree: `sp_ulysses_degree`.
        world_size: Ranks of the whole job.
        heads: What `families.divided_heads` says of the model.

    Raises:
        ValueError: The degree divides the ranks or the heads not evenly.
    """
    for kind, number in heads.items():
        if number % degree:
            raise ValueError(
                f"sp_ulysses_degree {degree} does not divide the model's {number} {kind}, which so many ranks would "
                f"share: use a divisor of {math.gcd(*heads.values())}"
            )
    if world_size % degree:
        raise ValueError(
            f"sp_ulysses_degree {degree} does not divide the number of processes, {world_size}: start a multiple of "
            "it, or lower it"
        )


@dataclass(frozen=True)
class SequenceShare:
    """The share of one rank in the tokens of a pack.

    Attributes:
        rank: Rank within the group.
        degree: Ranks in the group.
    """

    rank: int = 0
    degree: int = 1

    def padding(self, tokens: int) -> int:
        """Tokens to add to a pack so that all shares are equally long."""
        return -tokens % self.degree

    def of(self, tokens: int) -> slice:
        """Positions of this rank in a pack of `tokens`, a multiple of `degree`."""
        length = tokens // self.degree
        return slice(self.rank * length, (self.rank + 1) * length)


def split_media(media: Sequence[dict[str, Any]], degree: int) -> list[list[dict[str, Any]]]:
    """Share out the media of a pack, balanced by patches and in reading order.

    The vision towers attend within a frame (or a window of it) and know no temporal position, so a clip can be cut
    between any two temporal patches with exactly the same features.

    Args:
        media: Entries with `grid_t`, `grid_h`, `grid_w`; of a clip that is cut already, its `part`.
        degree: Number of shares.

    Returns:
        The entries of each share; a clip that is cut gets the key `part`, a range `(start, end)` of temporal patches.
        No share is more than one frame larger than the average.
    """
    if not media:
        return [[] for _ in range(degree)]
    patches = np.array([item["grid_h"] * item["grid_w"] for item in media], dtype=np.int64)
    frames = np.array([temporal_patches(item) for item in media], dtype=np.int64)
    weight = np.repeat(patches, frames)
    middle = weight.cumsum() - weight / 2
    # Each frame belongs to the share in which its middle lies when all patches are cut into equal lengths.
    owner = np.minimum(middle * degree // max(1, weight.sum()), degree - 1).astype(np.int64)
    shares: list[list[dict[str, Any]]] = [[] for _ in range(degree)]
    for item, owners in zip(media, np.split(owner, frames.cumsum()[:-1]), strict=True):
        for rank in range(degree):
            start, end = np.searchsorted(owners, [rank, rank + 1]).tolist()
            if end - start == temporal_patches(item):
                shares[rank].append(item)
            elif end > start:
                first, _ = item.get("part", (0, item["grid_t"]))
                shares[rank].append({**item, "part": (first + start, first + end)})
    return shares


def split_sounds(media: Sequence[dict[str, Any]], degree: int, chunk: int) -> list[list[dict[str, Any]]]:
    """Share out the sounds of a pack, balanced by spectra and in reading order.

    An audio tower attends within chunks of spectra, so a sound can be cut between two of them with exactly the same
    features.

    Args:
        media: Entries with `spectra`; those that have none are left out.
        degree: Number of shares.
        chunk: Spectra of a chunk.

    Returns:
        The entries of each share; a sound that is cut gets the key `heard_part`, a range `(start, end)` of spectra. No
        share is more than one chunk larger than the average.
    """
    sounds = [item for item in media if item.get("spectra")]
    chunks = [
        {"grid_t": -(-item["spectra"] // chunk), "grid_h": 1, "grid_w": 1, "number": number}
        for number, item in enumerate(sounds)
    ]
    return [
        [sounds[found["number"]] | _heard_part(found, sounds[found["number"]]["spectra"], chunk) for found in share]
        for share in split_media(chunks, degree)
    ]


def _heard_part(found: dict[str, Any], spectra: int, chunk: int) -> dict[str, Any]:
    if "part" not in found:
        return {}
    start, end = found["part"]
    return {"heard_part": (start * chunk, min(end * chunk, spectra))}


def heard_spectra(item: dict[str, Any]) -> int:
    """Spectra of a sound, or of the part of it that is this rank's."""
    start, end = item.get("heard_part", (0, item["spectra"]))
    return end - start


def temporal_patches(item: dict[str, Any]) -> int:
    """Temporal patches of a medium, or of the part of it that is this rank's."""
    start, end = item.get("part", (0, item["grid_t"]))
    return end - start


def visual_tokens(share: Sequence[dict[str, Any]]) -> int:
    """Features that the vision tower makes of a share of the media."""
    return sum(temporal_patches(item) * item["grid_h"] * item["grid_w"] for item in share) // PATCHES_PER_TOKEN


def heard_tokens(share: Sequence[dict[str, Any]]) -> int:
    """Features that the audio tower makes of a share of the sounds."""
    return sum(audio_tokens(heard_spectra(item)) for item in share)


def feature_routes(mask: np.ndarray, made: Sequence[int]) -> np.ndarray:
    """Count the features that go from each rank to each.

    Features and placeholders are both in reading order, and both are cut into contiguous shares: what one rank sends
    another is where its share of the features overlaps the other's share of the placeholders.

    Args:
        mask: True at the placeholders `[T]`; T is a multiple of the degree.
        made: Features that each rank makes.

    Returns:
        `[degree, degree]`: features that the rank of the row computes and the rank of the column uses.
    """
    used = mask.reshape(len(made), -1).sum(axis=1)
    made_ends, used_ends = np.cumsum(made)[:, None], np.cumsum(used)[None]
    made_starts, used_starts = made_ends - np.array(made)[:, None], used_ends - used[None]
    return np.maximum(0, np.minimum(made_ends, used_ends) - np.maximum(made_starts, used_starts))


def exchange_features(
    levels: Sequence[Tensor], sends: Sequence[int], receives: Sequence[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Bring features to the ranks that hold their placeholders; called by all ranks of the group.

    Args:
        levels: Features of this rank's media, each `[N, H]`: the tower's output, then its DeepStack levels. What is
            beyond `sum(sends)` belongs to a blank image.
        sends: Features for each rank of the group.
        receives: Features from each rank.
        group: The group; `None` when this rank is alone.

    Returns:
        The features of this rank's placeholders, in the order of `levels`, each `[sum(receives), H]`.
    """
    own = [level[: sum(sends)] for level in levels]
    if group is None:
        return own
    return list(_AllToAll.apply(torch.stack(own, dim=1), list(sends), list(receives), group).unbind(1))


def gather_tokens(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Trade heads for tokens, before attention: all three in one exchange.

    Args:
        query: `[1, H, T / degree, D]`.
        key: `[1, K, T / degree, D]`. Key heads that the degree does not divide are repeated until it does, each as
            often as needed and no more.
        value: As `key`.
        group: The group.

    Returns:
        Query `[1, H / degree, T, D]`, key and value likewise.
    """
    degree = group.size()
    repeats = degree // math.gcd(degree, key.shape[1])
    if repeats > 1:
        key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    parts = [heads[0].unflatten(0, (degree, -1)) for heads in (query, key, value)]
    received = _AllToAll.apply(torch.cat(parts, dim=1), None, None, group)
    # From [rank that sent, head, token of that rank, D] to [head, token, D].
    heads = received.transpose(0, 1).flatten(1, 2)
    return tuple(part[None] for part in heads.split([part.shape[1] for part in parts]))


def trade_channels(parts: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Trade channels for tokens: what `gather_tokens` is for heads, for anything else that heads divide evenly.

    Args:
        parts: Each `[1, T / degree, C]`, of one type; the channels of a head lie together, in the order of the heads.
        group: The group.

    Returns:
        Each part as `[1, T, C / degree]`: all tokens, and the channels of this rank's heads.
    """
    degree = group.size()
    shares = [part[0].unflatten(-1, (degree, -1)) for part in parts]
    sent = torch.cat(shares, dim=-1).transpose(0, 1)
    received = _AllToAll.apply(sent, None, None, group).flatten(0, 1)
    return tuple(part[None] for part in received.split([share.shape[-1] for share in shares], dim=-1))


def gather_heads(output: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Trade tokens for heads, after attention: `[1, T, H / degree, D]` to `[1, T / degree, H, D]`."""
    parts = output[0].unflatten(0, (group.size(), -1))
    return _AllToAll.apply(parts, None, None, group).transpose(0, 1).flatten(1, 2)[None]


class _AllToAll(torch.autograd.Function):
    """`all_to_all_single` along the first dimension; its gradient goes the same ways back."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, sends: list[int] | None, receives: list[int] | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.ways = receives, sends, group
        length = tensor.shape[0] if receives is None else sum(receives)
        output = tensor.new_empty(length, *tensor.shape[1:])
        contiguous = tensor.contiguous()
        if not tensor.is_meta:  # which a preflight computes on: sizes, and nothing to exchange
            dist.all_to_all_single(output, contiguous, receives, sends, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(gradient, *ctx.ways), None, None, None
