"""Facts of the published models, one file a family: sizes, context, licence; known without a network or torch.

`MODELS` has them by hub id. A model that is not among them is trained just the same: what is known of it is then what
its own `config.json` says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvl_pipeline.families import FAMILIES

_OF_ROPE = ("rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor")


@dataclass(frozen=True)
class TextFacts:
    """The language model; names are those of its part of `config.json`.

    Attributes:
        hidden_size: Width.
        intermediate_size: Width inside of an MLP; `None` where there are experts only.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding.
        max_position_embeddings: Context in tokens.
        rope_theta: Base of the rotary frequencies.
        mrope_section: Rotary frequencies of time, height and width.
        mrope_interleaved: Whether the three take turns along a head, or lie one after the other.
        rms_norm_eps: Added in norms.
        tie_word_embeddings: Whether embedding and head are one parameter.
        partial_rotary_factor: Share of a head's dimensions that are rotated; `None` is all of them.
        linear_num_key_heads: Key heads of linear attention, which all layers but each fourth have; `None` is none.
        linear_num_value_heads: Value heads of linear attention.
        linear_key_head_dim: Width of its key heads.
        linear_value_head_dim: Width of its value heads.
        num_experts: Experts of each layer; `None` is an MLP instead.
        num_experts_per_tok: Experts that a token goes to.
        moe_intermediate_size: Width inside of an expert.
        shared_expert_intermediate_size: Width inside of the expert that every token goes to; `None` is none.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    intermediate_size: int | None = None
    partial_rotary_factor: float | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None


@dataclass(frozen=True)
class VisionFacts:
    """The vision tower; names are those of its part of `config.json`. What a family does not have is `None`.

    Attributes:
        depth: Blocks.
        hidden_size: Width.
        intermediate_size: Width inside of an MLP.
        num_heads: Heads.
        patch_size: Side of a patch in pixels.
        spatial_merge_size: Side of the square of patches that becomes one token.
        temporal_patch_size: Frames of a patch.
        window_size: Side of an attention window in pixels.
        fullatt_block_indexes: Blocks that attend to the whole picture, where the others keep to windows.
        tokens_per_second: Temporal positions of a second.
        deepstack_visual_indexes: Blocks whose features are added to the first decoder layers.
        num_position_embeddings: Rows of the learned table of positions.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int | None = None
    fullatt_block_indexes: tuple[int, ...] | None = None
    tokens_per_second: int | None = None
    deepstack_visual_indexes: tuple[int, ...] | None = None
    num_position_embeddings: int | None = None


@dataclass(frozen=True)
class AudioFacts:
    """The audio tower; names are those of its part of `config.json`.

    Attributes:
        encoder_layers: Layers.
        d_model: Width.
        encoder_ffn_dim: Width inside of an MLP.
        encoder_attention_heads: Heads.
        num_mel_bins: Frequencies of a spectrum.
        n_window: Half of the spectra that see each other.
        max_source_positions: Rows of the table of positions.
    """

    encoder_layers: int
    d_model: int
    encoder_ffn_dim: int
    encoder_attention_heads: int
    num_mel_bins: int
    n_window: int
    max_source_positions: int


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a published model.

    Attributes:
        name: Id on the hub.
        family: Name of its family.
        size: Its size, as its name has it: `7B`.
        parameters: Published number of parameters.
        kept_parameters: Those of them that are no part of the model in transformers: exported as they were.
        license: Licence of the weights.
        use: What it is recommended for.
        text: The language model.
        vision: The vision tower.
        audio: The audio tower; `None` where there is none.
    """

    name: str
    family: str
    size: str
    parameters: int
    license: str
    use: str
    text: TextFacts
    vision: VisionFacts
    kept_parameters: int = 0
    audio: AudioFacts | None = None

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        return self.text.max_position_embeddings

    def config(self) -> dict[str, Any]:
        """Return what `config.json` says of the architecture, for `AutoConfig.for_model(**facts.config())`.

        Token ids are those of the family's class in transformers.
        """
        text, vision = (
            {name: value for name, value in asdict(part).items() if value is not None}
            for part in (self.text, self.vision)
        )
        rope = {name: text.pop(name) for name in _OF_ROPE if name in text}
        rope["mrope_section"] = list(rope["mrope_section"])
        if not rope["mrope_interleaved"]:  # a family that does not know the word
            del rope["mrope_interleaved"]
        width = self.text.hidden_size
        return {
            "model_type": FAMILIES[self.family].module_type,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": text | {"rope_parameters": {"rope_type": "default", **rope}},
            "vision_config": vision | {"out_hidden_size": width},
            **({"audio_config": asdict(self.audio) | {"output_dim": width}} if self.audio else {}),
        }


def _read(path: Path) -> dict[str, ModelFacts]:
    """Read the file of a family, whose name is the file's."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    shared = content["shared"]
    return {name: _model(name, path.stem, shared, said) for name, said in content["models"].items()}


def _model(name: str, family: str, shared: Mapping[str, Any], said: Mapping[str, Any]) -> ModelFacts:
    kinds = {"text": TextFacts, "vision": VisionFacts, "audio": AudioFacts}
    parts = {part: kind(**_tuples(shared[part] | said[part])) for part, kind in kinds.items() if part in said}
    return ModelFacts(name=name, family=family, **{**said, **parts})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


MODELS: Mapping[str, ModelFacts] = {
    name: model for path in sorted(Path(__file__).parent.glob("*.toml")) for name, model in _read(path).items()
}
