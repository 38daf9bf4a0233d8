"""Parameters of different blocks that do not fit together, told by the parameters and what is known of models alone.

What a block says by itself is checked in its own file, what the machine and the base model's files decide before a
launch (`training/checks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from qvl_pipeline.config.base import Block
from qvl_pipeline.families import FAMILIES, divided_heads
from qvl_pipeline.families.capabilities import CAPABILITIES
from qvl_pipeline.families.facts import MODELS, ModelFacts
from qvl_pipeline.families.family import MERGE_SIZE

# A parameter, and what is wrong with it.
Problem = tuple[tuple[str, ...], str]

# Memory of the largest GPU there is (B300, MI355X), GB.
_LARGEST_GPU = 288
# Fewest bytes a trained parameter takes: its weight and gradient, and the optimizer's state.
_STATE_BYTES = {"adamw_torch_fused": 16, "adamw_torch": 16, "adamw_8bit": 10, "adamw_bf16": 8, "muon": 12}
# Kernels that compute in bfloat16 or float16 only.
_HALF_ONLY = ("flash_attention_2", "flash_attention_3", "torch_varlen")


def find_conflicts(blocks: Mapping[str, Block]) -> Iterator[Problem]:
    """Yield what does not fit together.

    Args:
        blocks: All blocks, each of them valid.

    Yields:
        `((block, key), sentence)`.
    """
    facts = MODELS.get(blocks["model"].load_from_pretrained_path or "")
    of_any_model = (_names, _hearing, _kernels, _compiled, _capabilities, _experts, _sizes, _ranks, _parts, _sources)
    for check in (*of_any_model, _leakage, _harness):
        yield from check(blocks)
    if facts is not None:
        for check_facts in (_context, _heads, _memory, _rank_of_update):
            yield from check_facts(facts, blocks)


def _names(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """A published model, and a published processor, are of the family that is declared."""
    model = blocks["model"]
    for key in ("load_from_pretrained_path", "processor_name"):
        facts = MODELS.get(getattr(model, key) or "")
        if facts is not None and facts.family != model.processor_type:
            yield ("model", key), f"'{facts.name}' is of the family {facts.family}, not of {model.processor_type}"


def _hearing(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """Who is to hear, can."""
    if blocks["model"].family.hearing:
        return
    able = " or ".join(name for name, family in FAMILIES.items() if family.hearing)
    remedy = f"model.processor_type {blocks['model'].processor_type} does not hear: use {able}"
    if blocks["batching"].dataset_type == "vision_audio":
        yield ("batching", "dataset_type"), f"vision_audio is for models that hear, and {remedy}, or vision"
    if blocks["sample"].use_audio_in_video:
        yield ("sample", "use_audio_in_video"), f"it is for models that hear, and {remedy}, or drop it"


def _kernels(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    model, train = blocks["model"], blocks["train"]
    for key in ("attn_implementation", "vit_attn_implementation"):
        kernel = getattr(model, key)
        if kernel in _HALF_ONLY and not (train.bf16 or train.fp16):
            yield (
                ("model", key),
                f"'{kernel}' computes in bfloat16 or float16 only, and train.bf16 and train.fp16 are both false: set "
                "one of them, or choose sdpa",
            )


def _capabilities(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """What is asked for works with the family."""
    family = blocks["model"].family
    for name, reason in family.unsupported.items():
        (block, key), asked = CAPABILITIES[name].key, CAPABILITIES[name].asked
        if key and asked(getattr(blocks[block], key)):
            yield (block, key), f"{CAPABILITIES[name].title} does not work with {family.title}: {reason}"


def _experts(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """What is said of experts, or of linear attention, is said of a family that has them."""
    model, train = blocks["model"], blocks["train"]
    said = {
        ("train", "router_aux_loss_coef"): (train.router_aux_loss_coef, model.family.experts, "experts"),
        ("model", "experts_implementation"): (model.experts_implementation != "auto", model.family.experts, "experts"),
        ("model", "linear_attn_implementation"): (
            model.linear_attn_implementation != "auto",
            model.family.linear_attention,
            "linear attention",
        ),
    }
    for key, (value, there, what) in said.items():
        if value and not there:
            yield key, f"{model.family.title} has no {what}: leave it out"


def _compiled(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """What has not been seen to work compiled is not compiled."""
    if blocks["train"].torch_compile is True and blocks["adapter"].quantizes:
        yield (
            ("train", "torch_compile"),
            "torch_compile over a quantised base has not been seen to end: set torch_compile or adapter.quantize_base "
            "to what it is without",
        )


def _sizes(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """Pictures and clips are at least a token, and the smallest of them fit into a pack."""
    sample, model, batching = blocks["sample"], blocks["model"], blocks["batching"]
    token = model.family.token_pixels
    if sample.video_max_pixels < token:
        yield (
            ("sample", "video_max_pixels"),
            f"{sample.video_max_pixels} is less than the {token} pixels that one token of {model.family.title} stands "
            "for: raise it",
        )
    frames = sample.frame_num if sample.video_sampling_strategy == "frame_num" else sample.video_min_frames
    clip = -(-frames // MERGE_SIZE) * (sample.video_min_pixels // token)
    image = model.image_min_pixels // token
    for key, what, tokens in (
        (("model", "image_min_pixels"), "picture", image),
        (("sample", "video_min_pixels"), "clip", clip),
    ):
        if tokens > batching.packing_length:
            yield (
                key,
                f"the smallest {what} has {tokens} tokens, more than batching.packing_length "
                f"({batching.packing_length}): lower it, or raise packing_length",
            )


def _ranks(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """Where the number of processes is stated, degrees divide it."""
    train = blocks["train"]
    processes, nodes, shard = train.nproc_per_node, train.launch.nnodes, train.fsdp_config.hsdp_shard_size
    if "auto" in (processes, nodes):
        return
    ranks = processes * nodes
    if ranks % train.sp_ulysses_degree:
        yield (
            ("train", "sp_ulysses_degree"),
            f"{train.sp_ulysses_degree} does not divide the number of processes, {ranks} (nproc_per_node * nnodes): "
            "start a multiple of it, or lower it",
        )
    if not shard:
        return
    if ranks % shard:
        yield (
            ("train", "fsdp_config"),
            f"hsdp_shard_size {shard} does not divide the number of processes, {ranks} (nproc_per_node * nnodes): "
            "choose a divisor, or 0",
        )
    elif nodes > 1 and processes % shard and shard % processes:
        yield (
            ("train", "fsdp_config"),
            f"hsdp_shard_size {shard} lays copies of the model across the borders of nodes of {processes} processes: "
            f"choose a divisor or a multiple of {processes}",
        )


def _parts(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """A part that is named is one that the family has."""
    family = blocks["model"].family
    have = {group for group, _ in family.groups}
    named = {
        ("train", "freeze_modules"): blocks["train"].freeze_modules,
        ("train", "learning_rates"): blocks["train"].learning_rates,
        ("adapter", "targets"): blocks["adapter"].targets,
    }
    every = {group for other in FAMILIES.values() for group, _ in other.groups}
    for key, names in named.items():
        for name in names:
            if name in every - have:
                yield key, f"{family.title} has no part '{name}', but {', '.join(sorted(have))}"


def _sources(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """A source that is named is declared."""
    ingest, evaluate = blocks["ingest"], blocks["evaluate"]
    names = [source.name for source in ingest.datasets]
    for name in evaluate.task_by_source:
        if name not in names:
            yield ("evaluate", "task_by_source"), f"'{name}' is no source: they are {', '.join(names)}"
    for source in ingest.datasets:
        if source.benchmark and source.name in evaluate.task_by_source:
            yield (
                ("evaluate", "task_by_source"),
                f"'{source.name}' is the benchmark {source.benchmark}, which has its own score: leave it out",
            )


def _leakage(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """What a benchmark shares with the training data is said."""
    names = [source.name for source in blocks["ingest"].datasets if source.benchmark]
    if names and blocks["validate"].severity_of("leakage") == "off":
        yield (
            ("validate", "severity"),
            f"leakage is off, and {', '.join(names)} is measured as a benchmark, which training samples may be from: "
            "set it to error or warn",
        )


def _harness(blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """lmms-eval loads whole models."""
    adapter = blocks["adapter"]
    if blocks["evaluate"].lmms_eval and adapter.type != "none" and adapter.export == "adapter":
        yield (
            ("evaluate", "lmms_eval"),
            "lmms-eval loads whole models, and adapter.export 'adapter' writes none: set it to merged or both",
        )


def _context(facts: ModelFacts, blocks: Mapping[str, Any]) -> Iterator[Problem]:
    length, answer = blocks["batching"].packing_length, blocks["evaluate"].max_new_tokens
    if length > facts.context:
        yield (
            ("batching", "packing_length"),
            f"a sample may be {length} tokens long, and {facts.name} was made for {facts.context}: choose at most that",
        )
    if answer >= facts.context:
        yield (
            ("evaluate", "max_new_tokens"),
            f"{answer} leaves no room for a question: {facts.name} has {facts.context}",
        )


def _heads(facts: ModelFacts, blocks: Mapping[str, Any]) -> Iterator[Problem]:
    degree, heads = blocks["train"].sp_ulysses_degree, divided_heads(facts.text)
    fitting = [str(number) for number in (2, 4, 8) if math.gcd(*heads.values()) % number == 0]
    for kind, number in heads.items():
        if number % degree:
            yield (
                ("train", "sp_ulysses_degree"),
                f"{degree} does not divide the {number} {kind} of {facts.name}, which so many processes would share: "
                f"choose {' or '.join(fitting)}",
            )
            return


def _memory(facts: ModelFacts, blocks: Mapping[str, Any]) -> Iterator[Problem]:
    """What is trained in full has to be somewhere, and there are no larger GPUs."""
    train, adapter = blocks["train"], blocks["adapter"]
    processes, nodes, shard = train.nproc_per_node, train.launch.nnodes, train.fsdp_config.hsdp_shard_size
    whole = adapter.type == "none" and not train.freeze_modules and not train.fsdp_config.cpu_offload
    if not whole or "auto" in (processes, nodes):
        return
    share = shard or processes * nodes
    each = (facts.parameters - facts.kept_parameters) * _STATE_BYTES[train.optim] / share / 1e9
    if each > _LARGEST_GPU:
        yield (
            ("train", "nproc_per_node"),
            f"to train {facts.name} in full takes {each:.0f} GB of each process (weights, gradients, optimizer over "
            f"{share} of them), and the largest GPU has {_LARGEST_GPU}: take more, an adapter, or cpu_offload",
        )


def _rank_of_update(facts: ModelFacts, blocks: Mapping[str, Any]) -> Iterator[Problem]:
    adapter = blocks["adapter"]
    if adapter.type != "none" and adapter.r >= facts.text.hidden_size:
        yield (
            ("adapter", "r"),
            f"a rank of {adapter.r} is no low rank in {facts.name}, which is {facts.text.hidden_size} wide: choose one "
            "such as 16",
        )
