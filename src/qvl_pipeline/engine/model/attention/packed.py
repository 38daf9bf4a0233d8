"""Attention over packs, registered with transformers' attention interface.

A pack is several sequences laid end to end in one row; `cu_seq_lens_q` says where each begins, and no query sees a key
of another sequence. The language model (causal) and the vision tower (per frame or window) each have their own kernel;
around the former's, ranks of one sequence-parallel group trade tokens for heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from qvl_pipeline.engine.model.attention.kernels import KERNELS, Kernel, Segments, choose_kernels
from qvl_pipeline.engine.parallel.sequence_parallel import gather_heads, gather_tokens

# transformers hands the vision tower's segment bounds to an attention function only if "flash" is in its name.
TEXT_ATTENTION = "qvl_flash_varlen_text"
VISION_ATTENTION = "qvl_flash_varlen_vision"


def use_packed_attention(
    model: nn.Module,
    attn_implementation: str,
    vit_attn_implementation: str,
    device: torch.device,
    *,
    half: bool = False,
    rmpad: bool = True,
    sp_group: dist.ProcessGroup | None = None,
) -> dict[str, str]:
    """Switch a model to attention over packs.

    Args:
        model: A transformers model.
        attn_implementation: Kernel of the language model: `auto`, `flash_attention_2`, `flash_attention_3`,
            `torch_varlen`, `sdpa` or `eager`.
        vit_attn_implementation: Kernel of the vision tower, from the same list.
        device: Where the model will run.
        half: It will compute in bfloat16 or float16.
        rmpad: Batches are packs. Otherwise they are padded rows with a mask, and the language model keeps to
            transformers' own attention of the name chosen.
        sp_group: Ranks that share the tokens of a pack, if any.

    Returns:
        The kernel chosen for each tower, for the log.

    Raises:
        ValueError: A kernel is not installed or does not run here.
    """
    text, vision = choose_kernels(attn_implementation, vit_attn_implementation, device, half=half, rmpad=rmpad)
    use_kernels(model, text, vision, KERNELS, rmpad=rmpad, sp_group=sp_group)
    return {"text": text, "vision": vision}


def use_kernels(
    model: nn.Module,
    text: str,
    vision: str,
    kernels: Mapping[str, Kernel],
    *,
    rmpad: bool,
    sp_group: dist.ProcessGroup | None,
    called: str = "",
) -> None:
    """Switch a model to kernels that are chosen already.

    Args:
        model: A transformers model.
        text: Kernel of the language model.
        vision: Kernel of the vision tower.
        kernels: What they are, by name.
        rmpad: Batches are packs.
        sp_group: Ranks that share the tokens of a pack, if any.
        called: What to register them as, beside the kernels of other models: all models of a process share the names.
    """
    text_attention, vision_attention = TEXT_ATTENTION + called, VISION_ATTENTION + called
    _register(vision_attention, kernels[vision], None)
    if rmpad:
        _register(text_attention, kernels[text], sp_group)
    # The setter that checks for an installed flash-attn is passed by: the kernels are ours.
    model.config._attn_implementation_internal = model.config.text_config._attn_implementation_internal = (
        text_attention if rmpad else text
    )
    model.config.vision_config._attn_implementation_internal = vision_attention
    if hasattr(model.config, "audio_config"):  # chunks of sound see each other as frames do
        model.config.audio_config._attn_implementation_internal = vision_attention


def _register(name: str, kernel: Kernel, sp_group: dist.ProcessGroup | None) -> None:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        cu_seq_lens_q: Tensor,
        max_length_q: int | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend within each sequence of a pack: query `[1, H, T, D]` to output `[1, T, H, D]`."""
        causal = module.is_causal if is_causal is None else is_causal
        if sp_group is not None:
            query, key, value = gather_tokens(query, key, value, sp_group)
        output = kernel(query, key, value, Segments(cu_seq_lens_q, max_length_q), scaling, causal)
        return output if sp_group is None else gather_heads(output, sp_group), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
