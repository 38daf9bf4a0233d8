"""From a spec to the model and processor that will be trained."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoProcessor

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.feed.sounds import SoundReader
from qvl_pipeline.engine.model.adapters.injection import inject, quantize_base
from qvl_pipeline.engine.model.attention.linear import use_packed_linear_attention
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.compilation import compile_blocks
from qvl_pipeline.engine.model.freezing import freeze, hold_parameters
from qvl_pipeline.engine.model.kernels import fused_blocks, use_liger_kernels
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.model.routing import use_experts_kernel
from qvl_pipeline.engine.model.weights import build_skeleton
from qvl_pipeline.engine.parallel.sequence_parallel import SequenceShare, check_degree
from qvl_pipeline.engine.parallel.sharding import compute_dtype
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES, divided_heads
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.pixels import normalization
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.tokens.encoding import placeholder_ids

logger = logging.getLogger(__name__)


def load_processor(spec: TrainSpec) -> Any:
    """Load the processor with the image limits that the samples were tokenised with, which its export must have too."""
    processor = AutoProcessor.from_pretrained(spec.model.processor)
    limits = {"shortest_edge": spec.model.image_min_pixels, "longest_edge": spec.model.image_max_pixels}
    processor.image_processor.size = limits
    return processor


def build_model(
    spec: TrainSpec, processor: Any, device: torch.device, sp_group: dist.ProcessGroup | None
) -> tuple[PackedVLM, dict[str, Any]]:
    """Build the model, still without weights, and prepare it for training on packs.

    Args:
        spec: The run.
        processor: Its processor, for the normalisation of pixels.
        device: Where the model will run.
        sp_group: Ranks that share the tokens of a pack, if any.

    Returns:
        The model on the meta device, and facts about it for `result.json`: what was frozen or adapted, which kernels
        are used, how many parameters, which blocks recompute.
    """
    family = FAMILIES[spec.model.family]
    hf = build_skeleton(spec.model.path)
    if sp_group is not None:
        check_degree(sp_group.size(), dist.get_world_size(), divided_heads(hf.config.text_config))
    hf.train()
    use_linear_patch_embedding(hf)
    liger, compiled = fused_blocks(spec, device)
    facts: dict[str, Any] = {
        "attention": use_packed_attention(
            hf,
            spec.model.attn_implementation,
            spec.model.vit_attn_implementation,
            device,
            half=spec.parallel.half,
            rmpad=spec.data.use_rmpad,
            sp_group=sp_group,
        ),
        "frozen": freeze(hf, family, spec.model.freeze_modules),
        **({"adapter": inject(hf, family, spec.adapter)} if spec.adapter.used else {}),
        "parameters": sum(parameter.numel() for parameter in hf.parameters()),
        "trained_parameters": sum(p.numel() for p in hf.parameters() if p.requires_grad),
        "liger": use_liger_kernels(hf, family, device) if liger else "not asked for",
    }
    if family.experts:
        facts["experts"] = use_experts_kernel(hf, spec.model.experts_implementation, device)
    if family.linear_attention:
        chosen, half = spec.model.linear_attn_implementation, spec.parallel.half
        facts["linear_attention"] = use_packed_linear_attention(
            hf, family, chosen, device, half=half, sp_group=sp_group
        )
    if liger:
        logger.info("use_liger_kernel: %s", facts["liger"])
    trained = torch.bfloat16 if spec.optim.in_bfloat16 else torch.float32
    hold_parameters(hf, trained=trained, frozen=compute_dtype(spec.parallel))
    if spec.adapter.quantizes:
        facts["quantized"] = quantize_base(hf, family, spec.adapter)
    facts["recomputed"] = recompute_activations(hf, spec.recompute)
    if compiled:
        backend, mode = spec.model.torch_compile_backend, spec.model.torch_compile_mode
        facts["compiled"] = compile_blocks(hf, family, backend=backend, mode=mode)
    return PackedVLM(hf, family, *normalization(processor), sp_group), facts


def make_builder(spec: TrainSpec, model: PackedVLM, processor: Any, mesh: DeviceMesh) -> BatchBuilder:
    """Make what builds the batches of a model.

    Args:
        spec: The run.
        model: Its model.
        processor: Its processor, for the layout of patches.
        mesh: The mesh with the dimension `sp`, by which this rank shares packs.
    """
    config, image_processor = model.hf.config, processor.image_processor
    patch_size, temporal_patch_size = image_processor.patch_size, image_processor.temporal_patch_size
    hearing, sources = model.family.hearing, spec.stream.weights
    if not spec.stream.max_steps:
        sources = TokenizedSamples(Path(spec.data.tokenized)).columns(["source"])["source"].unique().to_pylist()
    return BatchBuilder(
        loader=PatchLoader(
            patch_size=patch_size,
            temporal_patch_size=temporal_patch_size,
            merge_size=image_processor.merge_size,
            frame_store=Path(spec.data.video_frames),
        ),
        patch_values=3 * temporal_patch_size * patch_size**2,
        placeholder_ids=placeholder_ids(config),
        tokens_per_second=model.family.tokens_per_second(config),
        vision_inputs=partial(model.family.vision_inputs, config.vision_config),
        sources=tuple(sorted(sources)),
        sounds=SoundReader(SoundStore(Path(spec.data.video_frames), hearing), hearing, config) if hearing else None,
        rmpad=spec.data.use_rmpad,
        share=SequenceShare(mesh["sp"].get_local_rank(), mesh["sp"].size()),
    )
