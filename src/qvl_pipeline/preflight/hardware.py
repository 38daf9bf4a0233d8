"""Hardware: how much memory its devices have, what they compute, and with which kernels."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec

from qvl_pipeline.config.preflight import HARDWARE
from qvl_pipeline.engine.model.attention.kernels import choose_kernels, installed
from qvl_pipeline.engine.model.flops import peak_flops_by_name
from qvl_pipeline.engine.model.kernels import fused_blocks
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.preflight.memory.model import Kernels

GIB = 1 << 30
# Gigabytes that a GPU is sold with, where its name alone tells them.
_GIGABYTES = {"GB200": 192, "B200": 192, "H200": 141, "GH200": 96, "H100": 80, "H800": 80, "H20": 96, "A100": 80}
_GIGABYTES |= {"A800": 80, "A40": 48, "A10": 24, "L40S": 48, "L40": 48, "L4": 24, "RTX 4090": 24, "RTX 3090": 24}
_GIGABYTES |= {"MI300X": 192, "MI325X": 256}
# Of the gigabytes in its name, what a driver hands out in GiB: 79.2 of 80 (H100), 139.8 of 141 (H200), 39.4 of 40.
_USABLE = 0.985
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@dataclass(frozen=True)
class Hardware:
    """Machines that are all alike.

    Attributes:
        name: Name of a device, `cpu` where there is no GPU.
        nodes: Machines.
        per_node: Ranks of each.
        memory: Bytes of a device; without GPUs, of the host's memory that a rank may have.
        peak_flops: Dense bfloat16 FLOPs a second; `None` where unknown.
    """

    name: str
    nodes: int
    per_node: int
    memory: int
    peak_flops: float | None

    @property
    def ranks(self) -> int:
        """Ranks of all machines."""
        return self.nodes * self.per_node

    @property
    def device(self) -> str:
        """Type of a device, `cuda` or `cpu`."""
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def title(self) -> str:
        """Name for people."""
        if self.device == "cpu":
            return f"{self.ranks} processes on CPUs"
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.per_node} x {self.name}"


def named_hardware(text: str) -> Hardware:
    """Return the hardware of a name such as `8xH100-80GB` or `2x8xH100-80GB`.

    Raises:
        UserError: How much memory it has is not known.
    """
    match = HARDWARE.fullmatch(text)
    assert match is not None, text  # the parameter was checked
    name = re.sub(r"^RTX(?=\w)", "RTX ", match["name"].strip())
    gigabytes = int(match["gb"] or _GIGABYTES.get(name, 0))
    if not gigabytes:
        raise UserError(
            f"preflight.hardware '{text}': how much memory a {name} has is not known here; say it, as in "
            f"{match['gpus']}x{name}-80GB"
        )
    nodes, per_node = int(match["nodes"] or 1), int(match["gpus"])
    return Hardware(name, nodes, per_node, int(gigabytes * _USABLE * GIB), peak_flops_by_name(name))


def this_hardware(per_node: int, nodes: int) -> Hardware:
    """Return this machine and others like it.

    Args:
        per_node: Processes of each.
        nodes: Machines.
    """
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Hardware(properties.name, nodes, per_node, properties.total_memory, peak_flops_by_name(properties.name))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", nodes, per_node, memory // per_node, None)


def kernels_on(hardware: Hardware, spec: TrainSpec) -> tuple[Kernels, list[str]]:
    """Say what a run computes with on some hardware, as far as this machine's packages tell.

    Returns:
        The kernels, and what is to be known of them.
    """
    import torch

    names = [spec.model.attn_implementation, spec.model.vit_attn_implementation]
    if hardware.device == "cpu":
        half, rmpad = spec.parallel.half, spec.data.use_rmpad
        text, vision = choose_kernels(*names, torch.device("cpu"), half=half, rmpad=rmpad)
        return Kernels("cpu", text, vision, fused=False), []
    notes = []
    best = [name for name in ("flash_attention_3", "flash_attention_2") if installed(name)]
    if not any(word in hardware.name.replace("-", " ").split() for word in _HOPPER):
        best = [name for name in best if name != "flash_attention_3"]
    automatic = next(iter([*best, "torch_varlen"])) if spec.parallel.half else "sdpa"
    for place, name in enumerate(names):
        names[place] = automatic if name == "auto" else name
        if not installed(names[place]):
            notes.append(f"{names[place]} is not installed on this machine: it must be where the training runs")
    if not spec.data.use_rmpad and spec.model.attn_implementation == "auto":
        names[0] = "sdpa"
    liger, compiled = fused_blocks(spec, torch.device("cuda"), liger_is_there=True)
    if liger and find_spec("liger_kernel") is None:
        notes.append("liger-kernel is not installed on this machine: it must be where the training runs")
    return Kernels("cuda", *names, fused=liger or compiled), list(dict.fromkeys(notes))
