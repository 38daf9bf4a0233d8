"""`torch.compile`, block by block."""

from __future__ import annotations

from torch import nn

from qvl_pipeline.families import ModelFamily


def compile_blocks(model: nn.Module, family: ModelFamily, *, backend: str, mode: str) -> dict[str, int]:
    """Compile each decoder layer and block of a tower in place; call before FSDP2 shards them.

    Blocks are where the time goes, and all of a kind share one compilation. Between them lie FSDP2's gathers and the
    recomputation of gradient checkpointing, which stay outside of the graphs. Packs differ in length, so the graphs are
    made for any length from the start instead of being made anew for each.

    Args:
        model: The transformers model; names of its modules and parameters stay as they are.
        family: Its family.
        backend: As in `torch.compile`.
        mode: As in `torch.compile`.

    Returns:
        Number of compiled blocks by class.
    """
    blocks = {family.decoder_layer, family.vision_block, *([family.hearing.encoder_layer] if family.hearing else [])}
    compiled: dict[str, int] = {}
    for module in model.modules():
        name = type(module).__name__
        if name in blocks:
            module.compile(dynamic=True, backend=backend, mode=mode)
            compiled[name] = compiled.get(name, 0) + 1
    return compiled
