"""The trained model as a plain transformers folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import ProcessorMixin

from qvl_pipeline.engine.packed_vlm import PackedVLM
from qvl_pipeline.engine.spec import TrainSpec


def export(model: PackedVLM, processor: ProcessorMixin, spec: TrainSpec) -> None:
    """Write the float32 weights, the processor and the generation config; called by all ranks."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return
    folder = Path(spec.export.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    config = copy.deepcopy(model.hf.config)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation_internal = None
    # FSDP2 has changed the classes of the sharded modules; a blank twin knows how to save itself under hub names.
    with torch.device("meta"):
        twin = type(model.hf)(config)
    weights = {name.removeprefix("hf."): tensor for name, tensor in state.items()}
    for tied in twin.all_tied_weights_keys:
        # Gathering made two tensors of the one; a file with both would be larger, and could come apart when edited.
        weights.pop(tied)
    twin.save_pretrained(folder, state_dict=weights)
    model.hf.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
