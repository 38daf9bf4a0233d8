"""The process group and FSDP2."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qvl_pipeline.engine.packed_vlm import PackedVLM
from qvl_pipeline.engine.spec import ParallelSpec


def start_process_group(sp_ulysses_degree: int) -> tuple[DeviceMesh, torch.device]:
    """Join the job that torchrun started: NCCL where there are GPUs, gloo elsewhere.

    Args:
        sp_ulysses_degree: Neighbouring ranks that share the tokens of one micro-batch.

    Returns:
        The mesh by which batches are shared out, with the dimensions `dp` (each its own packs) and `sp` (each a part of
        the tokens of the same packs), and this rank's device. Over which ranks the model is sharded is another matter.

    Raises:
        ValueError: The ranks cannot be divided into groups of `sp_ulysses_degree`.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    groups, rest = divmod(dist.get_world_size(), sp_ulysses_degree)
    if rest:
        raise ValueError(
            f"sp_ulysses_degree {sp_ulysses_degree} does not divide the number of ranks, {dist.get_world_size()}: "
            "start a multiple of it, or lower it"
        )
    return init_device_mesh(device.type, (groups, sp_ulysses_degree), mesh_dim_names=("dp", "sp")), device


def shard(model: PackedVLM, device: torch.device, spec: ParallelSpec) -> list[str]:
    """Shard a model in place over all ranks with FSDP2: layer by layer, then the rest as the root.

    Vision blocks are always sharded one by one too: as a part of the root they would stay gathered from the forward to
    the end of the backward pass.

    Args:
        model: The model, complete on every rank.
        device: Where it runs.
        spec: What to wrap and in which precision to compute.

    Returns:
        The class names that were wrapped.

    Raises:
        ValueError: A name in `spec.wrap` is not the class of any module.
    """
    family = model.family
    names = list(dict.fromkeys([*(spec.wrap or (family.decoder_layer,)), family.vision_block]))
    present = {type(module).__name__ for module in model.modules()}
    for name in names:
        if name not in present:
            raise ValueError(
                f"transformer_layer_cls_to_wrap: no module of {family.name} has the class '{name}'; "
                f"its layers are {family.decoder_layer} and {family.vision_block}"
            )
    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",)),
        "reshard_after_forward": spec.reshard_after_forward,
        # Weights, optimizer state and gradient sums stay float32: at a rate of 1e-6 bfloat16 weights barely move.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if spec.bf16 else torch.float32, reduce_dtype=torch.float32
        ),
    }
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the tokens of all ranks, so gradients are summed, never averaged. Gloo
            # refuses the pre-multiplied sum that FSDP2 would otherwise use.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return names
