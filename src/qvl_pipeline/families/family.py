"""What a model family has to say for itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qvl_pipeline.families.hearing import Hearing

if TYPE_CHECKING:  # what only declares its parameters need not wait for torch
    import torch
    from torch import nn

    VisionPairs = Callable[[Any, Sequence[Sequence[int]]], list[int]]
    VisionInputs = Callable[[Any, torch.Tensor], dict[str, Any]]
    VisionForward = Callable[
        [nn.Module, torch.Tensor, torch.Tensor, dict[str, Any]], tuple[torch.Tensor, list[torch.Tensor]]
    ]


# Why a family of dense models has no use for a capability.
NO_EXPERTS = {"ep": "it has no experts"}
# Side of the square of patches that becomes one token, in all families so far.
MERGE_SIZE = 2
# Parts of a model with one merger behind its tower.
GROUPS = (
    ("merger", "model.visual.merger."),
    ("vit", "model.visual."),
    ("embed", "model.language_model.embed_tokens."),
    ("llm", "model.language_model."),
    ("head", "lm_head."),
)


@dataclass(frozen=True)
class ModelFamily:
    """Everything about a family that differs from the others.

    Attributes:
        name: Name in `model.processor_type`.
        title: Name for people.
        patch_size: Side of a vision patch in pixels. Published processors say it too, and are held to it.
        limits_are_per_clip: Whether the `size` of the video processor limits a whole clip, or each frame.
        decoder_layer: Class name of a decoder layer; FSDP2 shards each.
        vision_block: Class name of a vision block; FSDP2 shards each.
        groups: `(group, name prefix)` in order; each parameter belongs to the first prefix it starts with.
        vision_inputs: `(vision config, grid_thw [M, 3])` to the arguments of the tower that it would otherwise compute
            from the grid, for which it waits for the device.
        vision_forward: `(model, pixels [N, C*T*P*P], grid_thw [M, 3], vision inputs)` to `(features [N/4, H], DeepStack
            features)`. The grid stays in host memory.
        decoder_kwargs: Extra arguments of the language model, from DeepStack features `[B, T, H]`, zero where there is
            no medium.
        tokens_per_second: Temporal M-RoPE positions per second, read from the config; `None` when time is in the text.
        vision_pairs: Query-key pairs that see each other in each vision block, from `(vision config, grids (t, h, w))`:
            the part of the FLOPs that a family's attention pattern decides.
        fastest_blocks: What makes blocks fastest on a GPU where nothing is recomputed, `liger` or `compiled`
            (docs/training.md, from `benchmarks.gpu`).
        liger_kernels: Kernel (`rms_norm`, `rms_norm_zero_centred` or `swiglu`) of liger-kernel for each module class
            that it fits.
        hub_prefixes: `(prefix in published checkpoints, prefix in the module)`, where the two differ.
        linear_attention: Class name of a layer whose state runs on from token to token, which packs must cut; `None`
            where all attention is softmax attention.
        unsupported: Why a capability (`families.capabilities`) does not work with the family, by its name. Those that
            are not named do.
        notes: What to know of one that does.
        experts: Class name of a layer's experts, whose weights are fused tensors `[experts, out, in]`; FSDP2 shards
            each by itself. `None` where there are none.
        router: Class name of what chooses experts for a token; its output begins with logits `[tokens, experts]`.
        transposed_in_hub: Endings of the names of weights that published checkpoints hold as `[experts, in, out]`.
        kept_prefixes: Prefixes of weights in published checkpoints that are no part of the module: not trained, and
            exported as they were.
        model_types: What `model_type` of a `config.json` may be, that of the module last; empty is the family's name.
        model_class: Class of transformers that loads what is exported.
        hearing: What it does with sound; `None` does not hear.
    """

    name: str
    title: str
    patch_size: int
    limits_are_per_clip: bool
    decoder_layer: str
    vision_block: str
    groups: tuple[tuple[str, str], ...]
    vision_inputs: VisionInputs
    vision_forward: VisionForward
    decoder_kwargs: Callable[[list[torch.Tensor]], dict[str, Any]]
    tokens_per_second: Callable[[Any], float | None]
    vision_pairs: VisionPairs
    liger_kernels: Mapping[str, str]
    hub_prefixes: tuple[tuple[str, str], ...] = ()
    linear_attention: str | None = None
    fastest_blocks: Literal["liger", "compiled"] = "liger"
    unsupported: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    experts: str | None = None
    router: str | None = None
    transposed_in_hub: tuple[str, ...] = ()
    kept_prefixes: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    model_class: str = "AutoModelForImageTextToText"
    hearing: Hearing | None = None

    @property
    def module_type(self) -> str:
        """`model_type` in the configuration of the module that is trained."""
        return self.model_types[-1] if self.model_types else self.name

    @property
    def token_pixels(self) -> int:
        """Pixels of a picture that one token stands for."""
        return (self.patch_size * MERGE_SIZE) ** 2

    def group_of(self, parameter_name: str) -> str:
        """Name the group a parameter belongs to.

        Raises:
            ValueError: The parameter has no group: the family does not describe this model.
        """
        for group, prefix in self.groups:
            if parameter_name.startswith(prefix):
                return group
        raise ValueError(f"parameter '{parameter_name}' belongs to no group of the family '{self.name}'")

    def keeps(self, stored: str) -> bool:
        """Whether a tensor of a checkpoint is no part of the module, and goes into an export as it was."""
        return stored.startswith(self.kept_prefixes)

    def module_name(self, stored: str, known: Collection[str]) -> str:
        """Name in the module of a tensor in a checkpoint, which may be stored under either name."""
        if stored not in known:
            for published, prefix in self.hub_prefixes:
                if stored.startswith(published):
                    return prefix + stored.removeprefix(published)
        return stored

    def is_transposed(self, name: str, stored: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether a checkpoint holds a tensor of the module with its last two dimensions exchanged.

        Published ones do so with some; what transformers has written since may or may not, which its shape tells.

        Args:
            name: Name in the module.
            stored: Shape in the checkpoint.
            shape: Shape in the module.
        """
        turned = [*shape[:-2], *shape[:-3:-1]]
        return name.endswith(self.transposed_in_hub) and list(stored) == turned

    def hub_name(self, name: str) -> str:
        """Name in published checkpoints of a tensor of the module."""
        for published, prefix in self.hub_prefixes:
            if name.startswith(prefix):
                return published + name.removeprefix(prefix)
        return name


def divided_heads(text: Any) -> dict[str, int]:
    """Numbers of the heads that ranks of sequence parallelism divide among them, by what they are called.

    Key and value heads of softmax attention may be fewer than the degree: they are repeated. A key head of linear
    attention has a state of its own for each of its value heads, which would be computed and trained twice.

    Args:
        text: `text_config` of a model, or what is known of its language model.
    """
    linear = getattr(text, "linear_num_key_heads", None)
    heads = {"attention heads": text.num_attention_heads}
    return heads | ({"key heads of linear attention": linear} if linear else {})
