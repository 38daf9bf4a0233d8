"""The forward pass over packs, composed of a transformers model's own public submodules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qvl_pipeline.engine.loss import token_losses
from qvl_pipeline.media.pixels import normalize_patches

if TYPE_CHECKING:
    from qvl_pipeline.engine.batch import Batch
    from qvl_pipeline.engine.families import ModelFamily


class PackedVLM(nn.Module):
    """Token losses of a pack: embed, one vision call, scatter, decode, cross-entropy on the supervised positions.

    No forward of transformers is replaced. This module is the FSDP root, because FSDP2 cannot initialise lazily when a
    submodule is called outside of the root's forward.
    """

    def __init__(self, hf: nn.Module, family: ModelFamily, image_mean: list[float], image_std: list[float]) -> None:
        """Wrap a model.

        Args:
            hf: A transformers `…ForConditionalGeneration` of the family.
            family: Its family.
            image_mean: Channel means of the image processor.
            image_std: Channel standard deviations of the image processor.
        """
        super().__init__()
        self.hf = hf
        self.family = family
        self.image_mean = image_mean
        self.image_std = image_std

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of each supervised token of the batch: `[S]`, float32."""
        model = self.hf.model
        embeds = model.get_input_embeddings()(batch.input_ids)
        deepstack: list[torch.Tensor] = []
        if batch.patches is not None:
            pixels = normalize_patches(batch.patches, self.image_mean, self.image_std).to(embeds.dtype)
            features, deepstack = self.family.vision_forward(model, pixels, batch.grid_thw)
            # A batch without media ran the tower on a blank image, so that every rank takes part in its collectives:
            # nothing of it is scattered, and its gradient is exactly zero.
            embeds = embeds.masked_scatter(batch.visual_mask[..., None], features.to(embeds.dtype))
            deepstack = [level[: batch.visual_tokens] for level in deepstack]
        hidden = model.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_length,
            max_length_k=batch.max_length,
            **(self.family.decoder_kwargs(batch.visual_mask, deepstack) if deepstack else {}),
        ).last_hidden_state[0]
        return token_losses(hidden.index_select(0, batch.target_index), self.hf.lm_head.weight, batch.targets)
