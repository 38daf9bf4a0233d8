"""The forward pass over packs, composed of a transformers model's own public submodules."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from qvl_pipeline.engine.model.loss import token_losses
from qvl_pipeline.engine.model.routing import Routing
from qvl_pipeline.engine.parallel.sequence_parallel import exchange_features
from qvl_pipeline.media.pixels import normalize_patches

if TYPE_CHECKING:
    from qvl_pipeline.engine.feed.batch import Batch
    from qvl_pipeline.families import ModelFamily


class PackedVLM(nn.Module):
    """Token losses of a micro-batch: embed, call each tower once, scatter, decode, cross-entropy where supervised.

    Under sequence parallelism each rank embeds, decodes and scores its share of the tokens, and its calls of the
    towers cover its share of the media.

    No forward of transformers is replaced. This module is the FSDP root, because FSDP2 cannot initialise lazily when a
    submodule is called outside of the root's forward.
    """

    def __init__(
        self,
        hf: nn.Module,
        family: ModelFamily,
        image_mean: list[float],
        image_std: list[float],
        sp_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            hf: A transformers `…ForConditionalGeneration` of the family.
            family: Its family.
            image_mean: Channel means of the image processor.
            image_std: Channel standard deviations of the image processor.
            sp_group: Ranks that share the tokens of a pack, if any.
        """
        super().__init__()
        self.hf = hf
        self.family = family
        # On the device from the start: a tensor that is made of numbers in every micro-batch is waited for.
        self.image_mean = nn.Buffer(torch.tensor(image_mean), persistent=False)
        self.image_std = nn.Buffer(torch.tensor(image_std), persistent=False)
        self.sp_group = sp_group
        self.routing = Routing(hf, family) if family.router else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of each supervised token of the batch: `[S]`, float32."""
        model = self.hf.model
        embeds = model.get_input_embeddings()(batch.input_ids)
        deepstack: list[torch.Tensor] = []
        if batch.patches is not None:
            pixels = normalize_patches(batch.patches, self.image_mean, self.image_std).to(embeds.dtype)
            features, levels = self.family.vision_forward(model, pixels, batch.grid_thw, batch.vision_inputs)
            # A rank without media ran the tower on a blank image, so that every rank takes part in its collectives:
            # nothing of it is used, and its gradient is exactly zero.
            features, *deepstack = exchange_features(
                [features, *levels], batch.features_to, batch.features_from, self.sp_group
            )
            embeds = _put(features, batch.visual_index, embeds)
            deepstack = [_put(level, batch.visual_index, torch.zeros_like(embeds)) for level in deepstack]
        if batch.sound_inputs:
            heard = self.family.hearing.forward(model, batch.sound_inputs)
            [heard] = exchange_features([heard], batch.heard_to, batch.heard_from, self.sp_group)
            embeds = _put(heard, batch.heard_index, embeds)
        with self.routing.recorded(batch.real_tokens) if self.routing else nullcontext():
            hidden = model.language_model(
                inputs_embeds=embeds,
                position_ids=batch.position_ids,
                use_cache=False,
                **batch.attention_inputs(),
                **(self.family.decoder_kwargs(deepstack) if deepstack else {}),
            ).last_hidden_state
        hidden = hidden.flatten(0, 1)
        return token_losses(hidden.index_select(0, batch.target_index), self.hf.lm_head.weight, batch.targets)


def _put(features: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Put features `[V, H]` into rows `[B, T, H]`, at positions `[V]` of the flattened rows.

    By index: with a mask, the backward pass would count its entries, and make the host wait.
    """
    return rows.flatten(0, 1).index_copy(0, index, features.to(rows.dtype)).view_as(rows)
