"""Settings to compare in: what memory depends on, each changed alone and some together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5OmniThinkerConfig, Qwen3VLConfig

from benchmarks.gpu import NO_ADAPTER, OPTIM, PARALLEL
from benchmarks.gpu_models import HEARD_IDS, IDS, ROPE3, ROPE25, sizes
from qvl_pipeline.engine.spec import RecomputeSpec

_TEXT = sizes(128, 384, 6, 4, 2) | {"vocab_size": 4096, "max_position_embeddings": 8192}
_TEXT |= {"bos_token_id": None, "eos_token_id": None}
_VISION = {"depth": 6, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128}
CONFIGS: dict[str, Any] = {
    "qwen3_vl": Qwen3VLConfig(
        text_config=_TEXT | {"head_dim": 32, "rope_parameters": ROPE3 | {"mrope_section": [6, 5, 5]}},
        vision_config=_VISION | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 3]},
        tie_word_embeddings=True,
        **IDS,
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": ROPE25 | {"mrope_section": [4, 6, 6]}},
        vision_config=_VISION
        | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [2, 5], "tokens_per_second": 2},
        tie_word_embeddings=False,
        **IDS,
    ),
    "qwen2_5_omni": Qwen2_5OmniThinkerConfig(
        text_config=_TEXT | {"rope_parameters": ROPE25 | {"mrope_section": [4, 6, 6]}},
        vision_config=_VISION | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [2, 5]},
        audio_config=dict(encoder_layers=6, d_model=96, encoder_ffn_dim=384, encoder_attention_heads=4, output_dim=128),
        tie_word_embeddings=False,
        **HEARD_IDS,
    ),
}


@dataclass(frozen=True)
class Setting:
    """One row of the grid; what is not said is as in `BASE`."""

    name: str
    family: str = "qwen3_vl"
    tokens: int = 1024
    ranks: int = 1
    degree: int = 1
    micro_batches: int = 1
    llm: str = "none"
    vit: str = "none"
    freeze: tuple[str, ...] = ()
    adapter: str = "none"
    reshard: bool = True
    accumulate_sharded: bool = False
    bf16: bool = False
    optim: str = "adamw_torch_fused"

    def spec(self) -> Any:
        """Return the parts of a `TrainSpec` on which memory depends."""
        return SimpleNamespace(
            model=SimpleNamespace(
                family=self.family,
                freeze_modules=self.freeze,
                attn_implementation="sdpa",
                vit_attn_implementation="sdpa",
                use_liger_kernel=False,
                torch_compile=False,
            ),
            recompute=RecomputeSpec(self.llm, self.vit, every=1, offload=False),
            parallel=replace(
                PARALLEL,
                reshard_after_forward=self.reshard,
                accumulate_sharded=self.accumulate_sharded,
                bf16=self.bf16,
                sp_ulysses_degree=self.degree,
            ),
            optim=replace(OPTIM, optim=self.optim),
            adapter=replace(NO_ADAPTER, type=self.adapter),
            data=SimpleNamespace(use_rmpad=True, per_device_train_batch_size=1),
        )


GRID = (
    *(Setting(f"{tokens} tokens", tokens=tokens) for tokens in (256, 1024, 3072)),
    Setting("1024 tokens, Qwen2.5-VL", family="qwen2_5_vl"),
    Setting("3072 tokens, Qwen2.5-VL", family="qwen2_5_vl", tokens=3072),
    Setting("1024 tokens, Qwen2.5-Omni", family="qwen2_5_omni"),
    Setting("selective, Qwen2.5-Omni", family="qwen2_5_omni", llm="selective", vit="selective"),
    Setting("vision frozen, Qwen2.5-Omni", family="qwen2_5_omni", freeze=("visual",)),
    Setting("bfloat16", bf16=True),
    Setting("language model recomputed", llm="full"),
    Setting("all recomputed", llm="full", vit="full"),
    Setting("all recomputed, 3072 tokens", llm="full", vit="full", tokens=3072),
    Setting("all recomputed, Qwen2.5-VL", family="qwen2_5_vl", llm="full", vit="full"),
    Setting("selective", llm="selective", vit="selective"),
    Setting("selective, Qwen2.5-VL", family="qwen2_5_vl", llm="selective", vit="selective"),
    Setting("vision frozen", freeze=("visual",)),
    Setting("language model frozen", freeze=("llm", "embed")),
    Setting("vision frozen, all recomputed", freeze=("visual",), llm="full", vit="full"),
    Setting("LoRA", adapter="lora"),
    Setting("DoRA", adapter="dora"),
    Setting("LoRA, all recomputed", adapter="lora", llm="full", vit="full"),
    Setting("optimizer not fused", optim="adamw_torch"),
    Setting("two micro-batches", micro_batches=2),
    Setting("2 ranks", ranks=2),
    Setting("2 ranks, Qwen2.5-VL", ranks=2, family="qwen2_5_vl"),
    Setting("2 ranks, Qwen2.5-Omni", ranks=2, family="qwen2_5_omni"),
    Setting("2 ranks, weights kept", ranks=2, reshard=False),
    Setting("2 ranks, two micro-batches", ranks=2, micro_batches=2),
    Setting("2 ranks, two micro-batches, sharded", ranks=2, micro_batches=2, accumulate_sharded=True),
    Setting("2 ranks, all recomputed", ranks=2, llm="full", vit="full"),
    Setting("2 ranks, LoRA", ranks=2, adapter="lora"),
    Setting("2 ranks share packs", ranks=2, degree=2, tokens=2048),
    Setting("2 ranks share packs, Qwen2.5-VL", ranks=2, degree=2, tokens=2048, family="qwen2_5_vl"),
    Setting("2 ranks share packs, recomputed", ranks=2, degree=2, tokens=2048, llm="full", vit="full"),
    Setting("4 ranks", ranks=4),
    Setting("4 ranks, 2 share packs", ranks=4, degree=2, tokens=2048),
)
