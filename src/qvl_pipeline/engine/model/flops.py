"""FLOPs of the model that a training step needs, and what a device could do: the two sides of MFU.

Counted as in PaLM (Chowdhery et al. 2022, appendix B): matrix products of the forward and backward pass; what gradient
checkpointing, chunked losses and fused attention compute twice is not, nor is padding. Attention is counted by the
query-key pairs that see each other, so a causal sample of n tokens has n(n+1)/2; linear attention by what its state
costs a token, not by what a kernel computes to work on many tokens at once; experts by those that a token goes to.
Frozen matrices have no weight gradient, and below the lowest trained parameter there is no activation gradient either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.model.adapters.experts import FUSED, ExpertsUpdate, target_of
from qvl_pipeline.engine.model.adapters.frozen import FrozenLinear
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.families.hearing import Hearing, convolved

# Dense bfloat16 FLOPs a second by words of the device name, the more specific first; from the vendors' data sheets.
_PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 8.35e14,
    "H200": 9.89e14,
    "GH200": 9.89e14,
    "H100 NVL": 8.35e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "H800 PCIe": 7.56e14,
    "H800": 9.89e14,
    "H20": 1.48e14,
    "A100": 3.12e14,
    "A800": 3.12e14,
    "A40": 1.497e14,
    "A10": 1.25e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "L4": 1.21e14,
    "RTX 6000 Ada": 3.64e14,
    "RTX A6000": 1.548e14,
    "RTX 4090": 1.652e14,
    "RTX 3090": 7.1e13,
    "MI325X": 1.3074e15,
    "MI300X": 1.3074e15,
}
# Matrices that read the same input: none of them stands between another one and the loss.
_SIDE_BY_SIDE = (
    {"q_proj", "k_proj", "v_proj"},
    {"q", "k", "v"},
    {"gate_proj", "up_proj"},
    {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
)


def peak_flops(device: torch.device) -> float | None:
    """Look up the dense bfloat16 FLOPs a second of a device; `None` where unknown, as for a CPU."""
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """Look up a device by the name that torch reports, such as `NVIDIA H100 80GB HBM3` or `NVIDIA A100-SXM4-40GB`."""
    words = set(re.split(r"[\s-]", name))
    return next((peak for key, peak in _PEAK_FLOPS.items() if words.issuperset(key.split())), None)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward and backward pass, by what a batch has.

    Attributes:
        per_patch: FLOPs of the vision side for each patch before merging.
        per_token: FLOPs of the decoder for each token.
        per_target: FLOPs of the output embedding for each supervised token.
        per_vision_pair: FLOPs of each vision block's attention for each query-key pair.
        per_text_pair: FLOPs of the decoder's attention, all layers, for each query-key pair.
        per_vision_pass: FLOPs of the vision side once a batch, however long: the lengths of DoRA's rows.
        per_text_pass: The same of the decoder.
        vision_pairs: Query-key pairs of each vision block, from the media's grids `(t, h, w)`.
        per_spectrum: FLOPs of the audio tower for each spectrum.
        per_sound_pair: FLOPs of its attention, all layers, for each query-key pair.
        per_sound_pass: FLOPs of it once a batch.
        sound_chunk: Spectra that see each other in it.
    """

    per_patch: float
    per_token: int
    per_target: int
    per_vision_pair: tuple[int, ...]
    per_text_pair: int
    per_vision_pass: int
    per_text_pass: int
    vision_pairs: Callable[[Sequence[Sequence[int]]], list[int]]
    per_spectrum: float = 0.0
    per_sound_pair: int = 0
    per_sound_pass: int = 0
    sound_chunk: int = 1

    def count(self, batch: Batch) -> float:
        """Count this rank's FLOPs of a batch that is still in host memory.

        A blank image in place of media is no work. Ranks that share a pack share its tokens and attention evenly; media
        and targets are each rank's own.
        """
        ranks = len(batch.features_to)
        flops = self.per_token * sum(batch.lengths) / ranks + self.per_target * len(batch.targets)
        flops += self.per_text_pass
        flops += self.per_text_pair * sum(length * (length + 1) / 2 for length in batch.lengths) / ranks
        if sum(batch.features_to):
            flops += self.per_patch * len(batch.patches) + self.per_vision_pass
            pairs = self.vision_pairs(batch.grid_thw.tolist())
            flops += sum(cost * number for cost, number in zip(self.per_vision_pair, pairs, strict=True))
        if sum(batch.heard_to):
            flops += self.per_sound_pass + sum(self.of_sound(length) for length in batch.spectra)
        return flops

    def of_sound(self, spectra: int) -> float:
        """FLOPs of the audio tower for one sound of so many spectra."""
        return self.per_spectrum * spectra + self.per_sound_pair * _chunk_pairs(spectra, self.sound_chunk)


def _chunk_pairs(spectra: int, chunk: int) -> int:
    """Query-key pairs of a layer of the audio tower that see each other, within chunks of one sound."""
    whole, rest = divmod(spectra, chunk)
    return whole * convolved(chunk) ** 2 + (convolved(rest) ** 2 if rest else 0)


def _of_sound(hearing: Hearing, tower: nn.Module, config: PreTrainedConfig) -> tuple[dict[str, Any], bool]:
    """FLOPs of the audio tower, and whether its features depend on a trained parameter."""
    cost = _cost(tower.conv1, False)
    per_spectrum = float(cost.per_row)
    cost = _cost(tower.conv2, cost.reaches_trained)
    per_position, per_pair, per_pass, reaches_trained = cost.per_row, 0, 0, cost.reaches_trained
    for layer in tower.layers:
        cost = _cost(layer, reaches_trained)
        per_position, per_pair = per_position + cost.per_row, per_pair + cost.per_pair
        per_pass, reaches_trained = per_pass + cost.per_pass, cost.reaches_trained
    cost = _cost(tower.proj, reaches_trained or _trains(tower.ln_post))
    return {
        # Every other spectrum becomes a position, and every other position a token.
        "per_spectrum": per_spectrum + per_position / 2 + cost.per_row / 4,
        "per_sound_pair": per_pair,
        "per_sound_pass": per_pass + cost.per_pass,
        "sound_chunk": hearing.chunk_of(config),
    }, cost.reaches_trained


def flops_of(model: PackedVLM) -> ModelFlops:
    """Walk a model from the pixels to the loss and add up what each part costs.

    Args:
        model: The model, with the parameters that are not trained already frozen.

    Returns:
        Its FLOPs by what a batch has. Batches are taken to have media: in a batch of text alone, under a frozen
        decoder below a trained tower, the first layers need no activation gradient, which is not told apart.
    """
    hf, visual, text = model.hf, model.hf.model.visual, model.hf.model.language_model
    merged = visual.config.spatial_merge_size**2
    deepstack_after = list(getattr(visual.config, "deepstack_visual_indexes", ()))
    cost = _cost(visual.patch_embed, False)
    per_patch, per_vision_pass = float(cost.per_row), 0
    # Qwen3-VL has learned positions, which are added here.
    reaches_trained = cost.reaches_trained or (hasattr(visual, "pos_embed") and _trains(visual.pos_embed))
    per_vision_pair, deepstack_trained = [], []
    for number, block in enumerate(visual.blocks):
        cost = _cost(block, reaches_trained)
        per_patch, reaches_trained = per_patch + cost.per_row, cost.reaches_trained
        per_vision_pass += cost.per_pass
        per_vision_pair.append(cost.per_pair)
        if number in deepstack_after:
            level = _cost(visual.deepstack_merger_list[deepstack_after.index(number)], reaches_trained)
            per_patch, per_vision_pass = per_patch + level.per_row / merged, per_vision_pass + level.per_pass
            deepstack_trained.append(level.reaches_trained)
    cost = _cost(visual.merger, reaches_trained)
    per_patch, per_vision_pass = per_patch + cost.per_row / merged, per_vision_pass + cost.per_pass
    hearing = model.family.hearing
    sound, hears_trained = _of_sound(hearing, hf.model.audio_tower, hf.config) if hearing else ({}, False)
    reaches_trained = cost.reaches_trained or hears_trained or _trains(text.embed_tokens)
    per_token = per_text_pair = per_text_pass = 0
    for number, layer in enumerate(text.layers):
        cost = _cost(layer, reaches_trained)
        per_token, per_text_pair = per_token + cost.per_row, per_text_pair + cost.per_pair
        per_text_pass += cost.per_pass
        # DeepStack's features are added behind the first layers.
        reaches_trained = cost.reaches_trained or any(deepstack_trained[number : number + 1])
    return ModelFlops(
        per_patch=per_patch,
        per_token=per_token,
        per_target=_cost(hf.lm_head, reaches_trained or _trains(text.norm)).per_row,
        per_vision_pair=tuple(per_vision_pair),
        per_text_pair=per_text_pair,
        per_vision_pass=per_vision_pass,
        per_text_pass=per_text_pass,
        vision_pairs=partial(model.family.vision_pairs, visual.config),
        **sound,
    )


@dataclass(frozen=True)
class _Cost:
    """FLOPs of a module; `reaches_trained`: its output depends on a trained parameter."""

    per_row: int
    per_pair: int
    per_pass: int
    reaches_trained: bool

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(
            self.per_row + other.per_row,
            self.per_pair + other.per_pair,
            self.per_pass + other.per_pass,
            self.reaches_trained or other.reaches_trained,
        )


def _cost(module: nn.Module, reaches_trained: bool) -> _Cost:
    """Add up a module; where its MLP is a mixture of experts, that is looked into by itself."""
    mixture = getattr(module, "mlp", None)
    if not hasattr(mixture, "experts"):
        return _cost_in_order(module, reaches_trained)
    attention = _cost_in_order(module, reaches_trained, without=mixture)
    return attention + _mixture_cost(mixture, attention.reaches_trained)


def _cost_in_order(module: nn.Module, reaches_trained: bool, without: nn.Module | None = None) -> _Cost:
    """Add up the matrices of a module in the order of the forward pass, and its attention behind the first of them."""
    left_out = set(without.modules()) if without else set()
    modules = [(name.split(".")[-1], part) for name, part in module.named_modules() if part not in left_out]
    parts = [(name, part) for name, part in modules if _is_matrix(part) or not list(part.children())]
    # transformers declares the inputs of linear attention after what comes behind them.
    parts.sort(key=lambda named: not named[0].startswith("in_proj_"))
    # Norms are taken to lie at the entrance.
    reaches_trained |= any(_trains(part) for _, part in parts if not _is_matrix(part))
    matrices = [(name, part) for name, part in parts if _is_matrix(part)]
    per_row = per_pair = per_pass = 0
    while matrices:
        side_by_side = next((names for names in _SIDE_BY_SIDE if matrices[0][0] in names), {matrices[0][0]})
        step = [(name, part) for name, part in matrices[: len(side_by_side)] if name in side_by_side]
        matrices = matrices[len(step) :]
        for _, part in step:
            per_row += 2 * _shape(part).numel() * (1 + reaches_trained + _trains_matrix(part))
            if isinstance(part, AdaptedLinear):
                per_row += _update_cost(part, reaches_trained)
                per_pass += _lengths_cost(part)
        reaches_trained |= any(_trains(part) for _, part in step)
        name, names = step[0][0], dict(step)
        if query := next((query for query in ("q_proj", "q", "qkv") if query in names), None):
            outer = next(dict(parts)[output] for output in ("o_proj", "out_proj", "proj") if output in dict(parts))
            width = _shape(names[query])[0] // 3 if query == "qkv" else _shape(outer)[1]
            # Queries x keys and weights x values; backward, two products for each of them.
            per_pair = 4 * width * (3 if reaches_trained else 1)
        if name == "conv1d":
            per_row += _state_cost(module.linear_attn) * (3 if reaches_trained else 1)
    return _Cost(per_row, per_pair, per_pass, reaches_trained)


def _mixture_cost(mixture: nn.Module, reaches_trained: bool) -> _Cost:
    """FLOPs of what a router, the experts that it chooses and the one that all tokens go to make of the same rows."""
    experts, active = mixture.experts, mixture.gate.top_k
    updates = {target_of(name): part for name, part in experts.named_children() if isinstance(part, ExpertsUpdate)}
    per_row, reaches = 0, reaches_trained
    for name in FUSED:
        weight, update = getattr(experts, name), updates.get(name)
        work = 2 * weight.numel() * (1 + reaches + weight.requires_grad)
        per_row += (work + (_update_cost(update, reaches) if update else 0)) * active // experts.num_experts
        reaches |= weight.requires_grad or update is not None
    beside = [part for name, part in mixture.named_children() if name != "experts"]
    return sum((_cost_in_order(part, reaches_trained) for part in beside), start=_Cost(per_row, 0, 0, reaches))


def _state_cost(layer: nn.Module) -> int:
    """FLOPs a token of a gated delta rule: a head's state is read by the key, written to, and read by the query."""
    return 3 * 2 * layer.num_v_heads * layer.head_k_dim * layer.head_v_dim


def _update_cost(layer: AdaptedLinear | ExpertsUpdate, reaches_trained: bool) -> int:
    """FLOPs a row of an adapter; of one of experts, of a row that would go through all of them."""
    first, second = layer.lora_A.numel(), layer.lora_B.numel()
    cost = 2 * first * (2 + reaches_trained) + 2 * second * 3
    if layer.form.pissa:
        cost += 2 * (first + second) * (1 + reaches_trained)
    if layer.form.dora and layer.form.dropout:  # what is stretched is then another product than what is added to
        cost += 2 * _shape(layer).numel() * (1 + reaches_trained)
    return cost


def _lengths_cost(layer: AdaptedLinear) -> int:
    """FLOPs of the lengths of DoRA's rows, which are computed once a forward pass, and have no backward pass."""
    if not layer.form.dora:
        return 0
    r, (rows, columns) = layer.form.r, _shape(layer)
    return 2 * r * (rows * columns + r * columns + rows * r)


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return _is_quantized(module) or (isinstance(weight, nn.Parameter) and weight.ndim >= 2)


def _is_quantized(module: nn.Module) -> bool:
    """Tell a quantised matrix, which counts as any other: that it is made anew is no work of the model."""
    return isinstance(module, FrozenLinear) and module.quantized is not None


def _shape(matrix: nn.Module) -> torch.Size:
    return matrix.quantized.shape if _is_quantized(matrix) else matrix.weight.shape


def _trains_matrix(matrix: nn.Module) -> bool:
    return not _is_quantized(matrix) and matrix.weight.requires_grad


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
