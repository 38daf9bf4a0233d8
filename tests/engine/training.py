"""A small training on disk: model, images, clips, tokenized samples, plan and spec."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from benchmarks.gpu import NO_ADAPTER
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qvl_pipeline.engine import spec
from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.media.pixels import open_image
from qvl_pipeline.media.sound.store import SoundStoreWriter, StoredSound
from tests.engine.ranks import run_ranks

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("sample_id", "source", "split", "kind", "task", "answer")),
        ("input_ids", pa.list_(pa.int32())),
        ("label_spans", pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))),
        *((name, pa.int32()) for name in ("length", "supervised_tokens", "vit_patches", "spectra", "prompt_length")),
        (
            "media",
            pa.list_(
                pa.struct(
                    [("type", pa.string()), ("key", pa.string())]
                    + [(name, pa.int32()) for name in ("grid_t", "grid_h", "grid_w")]
                    + [("seconds_per_grid", pa.float64()), ("spectra", pa.int32())]
                )
            ),
        ),
    ]
)


def make_training(
    folder: Path,
    model: Path,
    family: str,
    kinds: Sequence[str] = ("text", "image", "video") * 4,
    packs_per_step: int = 4,
) -> spec.TrainSpec:
    """Write a training of one pack a sample, `packs_per_step` packs a step, in the order of `kinds`."""
    config = AutoConfig.from_pretrained(model)
    folder.mkdir(parents=True, exist_ok=True)
    with FrameStoreWriter(folder / "video_frames") as frames, SoundStoreWriter(folder / "video_frames", 128) as sounds:
        samples = [_sample(folder, frames, sounds, config, family, kind, number) for number, kind in enumerate(kinds)]
    table = pa.Table.from_pylist(samples, schema=SCHEMA)
    with pa.ipc.new_file(str(folder / "tokenized.arrow"), SCHEMA) as writer:
        writer.write_table(table)
    plan = [
        {
            "step": number // packs_per_step,
            "pack": number % packs_per_step,
            "sample_rows": [number],
            "tokens": sample["length"],
            "vit_patches": sample["vit_patches"],
            "spectra": sample["spectra"],
            "supervised_tokens": sample["supervised_tokens"],
        }
        for number, sample in enumerate(samples)
    ]
    pd.DataFrame(plan).to_parquet(folder / "pack_plan.parquet", index=False)
    output_dir = folder / "run"
    return spec.TrainSpec(
        run=spec.RunSpec(
            output_dir=str(output_dir),
            logging_steps=1,
            save_steps=0,
            save_total_limit=2,
            save_async=True,
            resume_from="",
            identity={},
            ddp_timeout=120,
            step_timeout_s=0,
            seed=0,
            profile_steps=(),
            memory_snapshot_on_oom=False,
            worst_case_first=False,
            expected_peak_bytes=0,
        ),
        model=spec.ModelSpec(
            path=str(model),
            processor=str(model),
            family=family,
            attn_implementation="auto",
            vit_attn_implementation="auto",
            linear_attn_implementation="auto",
            experts_implementation="auto",
            ignore_empty_think=True,
            freeze_modules=(),
            use_liger_kernel=False,
            image_min_pixels=3136,
            image_max_pixels=50176,
            torch_compile=False,
            torch_compile_backend="eager",
            torch_compile_mode="default",
        ),
        recompute=spec.RecomputeSpec(llm="none", vit="none", every=1, offload=False),
        data=spec.DataSpec(
            tokenized=str(folder / "tokenized.arrow"),
            pack_plan=str(folder / "pack_plan.parquet"),
            video_frames=str(folder / "video_frames"),
            packing_length=64,
            per_device_train_batch_size=1,
            use_rmpad=True,
            epochs=1.0,
            dataloader_num_workers=0,
            dataloader_prefetch_factor=2,
            dataloader_pin_memory=True,
            on_bad_sample="raise",
        ),
        stream=spec.StreamSpec(
            samples="",
            max_steps=0,
            packs_per_step=packs_per_step,
            packing=True,
            packing_strategy="best_fit",
            packing_length=64,
            packing_vit_patches=None,
            shuffle_buffer_size=8,
            weights={"a": 1.0, "b": 1.0},
            samples_per_epoch=float(len(samples)),
            filter_overlong=True,
            seed=0,
        ),
        optim=spec.OptimSpec(
            optim="adamw_torch_fused",
            learning_rate=1e-2,
            learning_rates={},
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.99,
            # Adam divides by the root of the second moment: without a floor, rounding of near-zero gradients of
            # different rank counts would be blown up to full steps.
            adam_epsilon=1e-4,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            lr_scheduler_kwargs={},
            warmup_steps=1,
            ema_decay=0.0,
            router_aux_loss_coef=None,
        ),
        parallel=spec.ParallelSpec(
            transformer_layer_cls_to_wrap=(),
            reshard_after_forward=True,
            hsdp_shard_size=0,
            forward_prefetch=0,
            backward_prefetch=0,
            accumulate_sharded=False,
            cpu_offload=False,
            frozen_sharding="sharded",
            bf16=False,
            fp16=False,
            sp_ulysses_degree=1,
        ),
        validation=spec.ValidationSpec(eval_strategy="no", eval_steps=0, plan="", load_best_model_at_end=False),
        sampling=spec.SamplingSpec(
            video_sampling_strategy="fps",
            fps=1.0,
            frame_num=32,
            video_min_frames=3,
            video_max_frames=9,
            video_min_pixels=3136,
            video_max_pixels=4096,
            video_total_pixels=1_000_000,
        ),
        export=spec.ExportSpec(
            output_dir=str(output_dir / "export"), export_ema=False, dtype="float32", max_shard_bytes=5 * 10**9
        ),
        adapter=dataclasses.replace(NO_ADAPTER, r=4, alpha=8.0),
    )


def _sample(
    folder: Path,
    frames: FrameStoreWriter,
    sounds: SoundStoreWriter,
    config: Any,
    family: str,
    kind: str,
    number: int,
) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    side = config.vision_config.patch_size * 4
    start, end = config.vision_start_token_id, config.vision_end_token_id
    media, prompt = [], [40 + number % 200]
    if kind == "image":
        key = str(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(key)
        media, prompt = [_medium("image", key, 1, 0.0)], [start, *[config.image_token_id] * 4, end, *prompt]
    if kind == "video":
        clip = rng.integers(0, 256, (4, 3, side, side), dtype=np.uint8)
        key = f"{number}.mp4"
        encoded = [encode_frame(frame, "png", 95) for frame in clip]
        seconds = [0.0, 0.5, 1.0, 1.5]
        frames.add(StoredClip(key, None, None, side, side, 2.0, "png", [0, 1, 2, 3], seconds, encoded))
        blocks = [[start, *[config.video_token_id] * 4, end]] * 2
        if family in ("qwen2_5_vl", "qwen2_5_omni"):
            blocks = [[start, *[config.video_token_id] * 8, end]]
        media, prompt = [_medium("video", key, 2, 1.0)], [*(token for block in blocks for token in block), *prompt]
    if kind == "audio":
        key, spectra = f"{number}.wav", 30 + 11 * number
        log_mel = rng.normal(size=(spectra, 128)).astype(np.float32)
        sounds.add(StoredSound("audio", key, None, None, "", spectra, log_mel))
        media = [_medium("audio", key, 0, 0.0) | {"grid_h": 0, "grid_w": 0, "spectra": spectra}]
        placeholders = [config.audio_token_id] * audio_tokens(spectra)
        prompt = [config.audio_start_token_id, *placeholders, config.audio_end_token_id, *prompt]
    # No special token: those that stand for media would have to have some.
    answer = rng.integers(50, 280, size=2 + number % 5).tolist()
    ids = [*prompt, *answer, 60]
    return {
        "sample_id": f"{'ab'[number % 2]}/{number}",
        "source": "ab"[number % 2],
        "split": "train",
        "kind": kind,
        "task": "exact_match",
        "answer": "",
        "input_ids": ids,
        "label_spans": [{"start": len(prompt), "end": len(prompt) + len(answer)}],
        "length": len(ids),
        "supervised_tokens": len(answer),
        "vit_patches": sum(m["grid_t"] * m["grid_h"] * m["grid_w"] for m in media),
        "spectra": sum(m["spectra"] for m in media),
        "prompt_length": len(prompt),
        "media": media,
    }


def _medium(kind: str, key: str, frames: int, seconds: float) -> dict[str, Any]:
    grid = {"grid_t": frames, "grid_h": 4, "grid_w": 4}
    return {"type": kind, "key": key, **grid, "seconds_per_grid": seconds, "spectra": 0}


def published(folder: Path, thinker: Path) -> Path:
    """A folder as the model is published: the thinker as a part of the whole, with what speaks beside it."""
    shutil.copytree(thinker, folder)
    kept = FAMILIES["qwen2_5_omni"].kept_prefixes  # weights of which the fixture `tiny_folders` adds
    weights = {
        name if name.startswith(kept) else f"thinker.{name}": tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen2_5_omni", "enable_talker": True}
    config["thinker_config"] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"Chelsie": torch.ones(2)}, folder / "spk_dict.pt")
    return folder


def changed(base: spec.TrainSpec, output_dir: Path, **groups: dict[str, Any]) -> spec.TrainSpec:
    """Return a spec with values replaced, and its own output folder."""
    groups.setdefault("run", {})["output_dir"] = str(output_dir)
    groups.setdefault("export", {})["output_dir"] = str(output_dir / "export")
    return dataclasses.replace(
        base, **{name: dataclasses.replace(getattr(base, name), **values) for name, values in groups.items()}
    )


def main_that_hangs(image: str, spec_path: Path) -> int:
    """Run the engine on one rank, where an image of this name is never read."""

    def read(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(image):
            threading.Event().wait()
        return open_image(path, *args, **options)

    with mock.patch("qvl_pipeline.media.loading.open_image", read):
        return main(spec_path)


def trained(
    training: spec.TrainSpec, nproc: int, timeout_s: float = 120, main: Callable[[Path], int] = main
) -> list[dict[str, Any]]:
    """Run the engine, which must succeed, and return its rows of metrics."""
    folder = Path(training.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    training.save(folder / "train_spec.json")
    run_ranks(main, nproc, folder / "train_spec.json", log_dir=folder / "logs", timeout_s=timeout_s)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_error(output_dir: Path) -> dict[str, Any]:
    """Return the report of the rank that failed first: others may have been ended before they wrote theirs."""
    reports = [json.loads(path.read_text()) for path in (output_dir / "errors").glob("rank*.json")]
    return min(reports, key=lambda report: report["time"])
