"""The process group and FSDP2."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from qvl_pipeline.engine.spec import ParallelSpec


def start_process_group(sp_ulysses_degree: int, timeout_s: float) -> tuple[DeviceMesh, torch.device]:
    """Join the job that torchrun started: NCCL where there are GPUs, gloo for tensors on the CPU.

    Args:
        sp_ulysses_degree: Neighbouring ranks that share the tokens of one micro-batch.
        timeout_s: Seconds after which a collective that some rank never enters fails.

    Returns:
        The mesh by which batches are shared out, with the dimensions `dp` (each its own packs) and `sp` (each a part of
        the tokens of the same packs), and this rank's device. Over which ranks the model is sharded is another matter.

    Raises:
        ValueError: The ranks cannot be divided into groups of `sp_ulysses_degree`.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timedelta(seconds=timeout_s))
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    groups, rest = divmod(dist.get_world_size(), sp_ulysses_degree)
    if rest:
        raise ValueError(
            f"sp_ulysses_degree {sp_ulysses_degree} does not divide the number of ranks, {dist.get_world_size()}: "
            "start a multiple of it, or lower it"
        )
    return init_device_mesh(device.type, (groups, sp_ulysses_degree), mesh_dim_names=("dp", "sp")), device


def sequence_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Ranks that share the tokens of a pack with this one; `None` when it has them to itself."""
    return mesh["sp"].get_group() if mesh["sp"].size() > 1 else None


def shard(
    model: nn.Module,
    towers: Mapping[nn.Module, Callable[[Any], bool]],
    layers: Sequence[str],
    replicated: Collection[nn.Parameter],
    device: torch.device,
    spec: ParallelSpec,
) -> dict[str, Any]:
    """Shard a model in place over all ranks with FSDP2: layers, then the towers, then the rest as the root.

    Args:
        model: The model; on the meta device, if it should never be complete on any rank.
        towers: The modules in it that only some micro-batches call, each with whether the forward pass of the model
            does not call it for an input.
        layers: Class names of the layers that are sharded one by one.
        replicated: Parameters that every rank holds whole; they must be frozen, and of the type of the computation.
        device: Where it runs.
        spec: Over how many ranks, and in which precision to compute.

    Returns:
        Facts for `result.json`: the classes wrapped, over how many ranks, whether the CPU's memory is used, and how
        much is replicated.

    Raises:
        ValueError: The ranks cannot be divided as asked.
    """
    mesh = _sharding_mesh(device.type, spec.hsdp_shard_size)
    options = {
        "mesh": mesh,
        "reshard_after_forward": spec.reshard_after_forward,
        # What is trained, its optimizer state and gradient sums stay float32: at a rate of 1e-6 bfloat16 barely moves.
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype(spec), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offloads(spec, device) else OffloadPolicy(),
        "ignored_params": set(replicated),
    }
    stacks = [[module for module in model.modules() if type(module).__name__ == name] for name in layers]
    # What else a tower has is no part of the root, for a group is exchanged in one piece: where only the last of
    # several micro-batches has media, its gradients are in bfloat16 when the root's were summed in float32.
    for module in reversed(list(model.modules())):  # what lies inside a wrapped layer before the layer itself
        if module in towers:
            # It is given the float32 weights by which positions are interpolated, and casts pixels and spectra itself.
            as_they_are = dataclasses.replace(options["mp_policy"], cast_forward_inputs=False)
            fully_shard(module, **options | {"mp_policy": as_they_are})
        elif type(module).__name__ in layers:
            fully_shard(module, **options)
    # Embedding and head are needed last in the forward and first in the backward pass: they stay gathered in between.
    fully_shard(model, **options | {"reshard_after_forward": False})
    for stack in stacks:
        _prefetch(stack, spec)
    if dist.get_world_size() > 1:
        _sum_gradients(model)
    for tower, skips in towers.items():
        _gather_tower_once(model, tower, skips)
    return {
        "wrapped": list(layers),
        "shard_size": mesh["shard"].size(),
        "cpu_offload": _describe_offload(spec, device),
        "replicated_bytes": sum(parameter.numel() * parameter.itemsize for parameter in replicated),
    }


def sharding_mesh_of(model: nn.Module) -> DeviceMesh:
    """The mesh over which a model is sharded: `shard`, or `replicate` and `shard`."""
    return next(model.parameters()).device_mesh


def compute_dtype(spec: ParallelSpec) -> torch.dtype:
    """Type of the computation, in which frozen weights are held too."""
    return torch.bfloat16 if spec.bf16 else torch.float16 if spec.fp16 else torch.float32


def offloads(spec: ParallelSpec, device: torch.device) -> bool:
    """Whether parameters, gradients and optimizer state live in the memory of the CPU, and the model runs elsewhere."""
    return spec.cpu_offload and device.type != "cpu"


def _describe_offload(spec: ParallelSpec, device: torch.device) -> str:
    if not spec.cpu_offload:
        return "not asked for"
    return "used" if offloads(spec, device) else "not used: the model runs on the CPU, and is in its memory already"


def check_shard_size(hsdp_shard_size: int, world_size: int) -> None:
    """Refuse a group size by which the ranks cannot be divided.

    Raises:
        ValueError: It does not divide `world_size`.
    """
    if hsdp_shard_size and world_size % hsdp_shard_size:
        raise ValueError(
            f"fsdp_config.hsdp_shard_size {hsdp_shard_size} does not divide the {world_size} ranks: "
            "choose a divisor, usually the number of GPUs of a node"
        )


def _sharding_mesh(device_type: str, hsdp_shard_size: int) -> DeviceMesh:
    """All ranks as one sharding group, or (HSDP) as replicas of groups of neighbouring ranks."""
    world_size = dist.get_world_size()
    if not hsdp_shard_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    check_shard_size(hsdp_shard_size, world_size)
    shape = (world_size // hsdp_shard_size, hsdp_shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _prefetch(stack: list[FSDPModule], spec: ParallelSpec) -> None:
    """Let each layer of a stack gather the next ones before it computes.

    Stacks are kept apart: a micro-batch without media does not call the vision tower, and what is gathered for a layer
    that is then not called would stay gathered.
    """
    for number, layer in enumerate(stack):
        if spec.forward_prefetch:
            layer.set_modules_to_forward_prefetch(stack[number + 1 : number + 1 + spec.forward_prefetch])
        if spec.backward_prefetch:
            layer.set_modules_to_backward_prefetch(stack[max(0, number - spec.backward_prefetch) : number][::-1])


def _sum_gradients(model: nn.Module) -> None:
    """Let gradients be summed over the ranks, never averaged: the loss is already divided by the tokens of all of them.

    Gloo refuses the pre-multiplied sum that FSDP2 would otherwise use. A rank of its own has nothing to sum, but FSDP2
    would divide its gradients all the same, by one and into a copy (torch 2.13, `foreach_reduce`).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _gather_tower_once(model: nn.Module, tower: nn.Module, skips_tower: Callable[[Any], bool]) -> None:
    """See to it that the tower was gathered before the first backward pass, though no rank has media in it.

    FSDP2 makes a layer's unsharded parameters when it first gathers them. Until then a backward pass that only
    accumulates, in another type than that of the computation, fails over their absence (torch 2.13,
    `FSDPParam.to_accumulated_grad_if_needed`): a run in bfloat16 whose first micro-batch of several is text.
    """

    def gather(_model: nn.Module, inputs: tuple[Any], _losses: torch.Tensor) -> None:
        first_forward.remove()
        if skips_tower(inputs[0]):
            for module in tower.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()

    first_forward = model.register_forward_hook(gather)
