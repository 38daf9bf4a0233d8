from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.families import FAMILIES

CASES = {
    "text": [],
    "image": ["image"],
    "two_images": ["image", "image"],
    "video": ["video"],
    "two_videos": ["video", "video"],
    "mixed": ["image", "video", "image"],
}


def inputs_of(folder: Path, media: list[str]) -> dict[str, Any]:
    """Processor output for one user turn of media (pictures of two sizes, clips of 8 frames at 4 per second)."""
    processor = AutoProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (64, 64 + 40 * number, 3), dtype=np.uint8))
        for number in range(media.count("image"))
    ]
    clips = [rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8) for _ in range(media.count("video"))]
    content = [*({"type": kind} for kind in media), {"type": "text", "text": "Which digit is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    metadata = [VideoMetadata(total_num_frames=8, fps=4, duration=2, frames_indices=list(range(8))) for _ in clips]
    videos = {"videos": clips, "video_metadata": metadata} if clips else {}
    return dict(processor(text=[text], images=pictures or None, return_tensors="pt", **videos))


@pytest.mark.parametrize("media", CASES.values(), ids=CASES.keys())
def test_placeholders_are_the_product_of_the_grid(model_folder: Path, media: list[str]) -> None:
    tokenizer = AutoProcessor.from_pretrained(model_folder).tokenizer
    inputs = inputs_of(model_folder, media)
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = inputs.get(f"{kind}_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        placeholders = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
        assert len(grids) == media.count(kind)
        assert placeholders.sum() == grids.prod(dim=-1).sum() // 4
        assert len(inputs.get(pixels, [])) == grids.prod(dim=-1).sum()


def test_processor_keeps_to_small_sizes(model_folder: Path, family: str) -> None:
    unit = FAMILIES[family].patch_size
    processor = AutoProcessor.from_pretrained(model_folder)
    huge, speck = (processor.image_processor(Image.new("RGB", (side, side))) for side in (2000, 10))
    assert huge["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert speck["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert huge["pixel_values"].shape == (256, 3 * 2 * unit * unit)


def test_images_and_videos_are_normalised_alike(model_folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(model_folder)
    images, videos = processor.image_processor, processor.video_processor
    assert (images.image_mean, images.image_std) == (videos.image_mean, videos.image_std)


def test_video_is_sampled_at_two_frames_per_second(model_folder: Path) -> None:
    assert inputs_of(model_folder, ["video"])["video_grid_thw"].tolist() == [[2, 4, 4]]


@pytest.mark.parametrize("media", CASES.values(), ids=CASES.keys())
def test_forward_and_backward(model_folder: Path, media: list[str]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    inputs = inputs_of(model_folder, media)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    language = {name for name, _ in model.named_parameters() if "visual" not in name}
    assert with_gradient == ({name for name, _ in model.named_parameters()} if media else language)


def test_generation_is_greedy_and_ends_with_the_turn(model_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    tokenizer = AutoProcessor.from_pretrained(model_folder).tokenizer
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    inputs = inputs_of(model_folder, ["image", "video"])
    generated = model.generate(**inputs, max_new_tokens=1)
    assert generated[0, -1] == model(**inputs).logits[0, -1].argmax()


def test_two_million_parameters(model_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    assert 1.4e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.4e6


def test_mechanisms_of_the_real_models(model_folder: Path, family: str) -> None:
    config = AutoModelForImageTextToText.from_pretrained(model_folder).config
    vision = config.vision_config
    if family != "qwen2_5_vl":
        assert len(getattr(vision, "deepstack_visual_indexes", ())) >= (2 if family == "qwen3_vl" else 0)
        assert config.text_config.rope_parameters["mrope_interleaved"] is True
        assert vision.num_position_embeddings > 0
    if family == "qwen3_5":
        assert config.text_config.layer_types == [*["linear_attention"] * 3, "full_attention"]
        assert config.text_config.linear_num_value_heads > config.text_config.linear_num_key_heads
        assert config.text_config.rope_parameters["partial_rotary_factor"] < 1
    if family == "qwen2_5_vl":
        assert 0 < len(vision.fullatt_block_indexes) < vision.depth
        assert vision.window_size < 56


def test_window_attention_hides_the_rest_of_the_image(tmp_path: Path, corpus: list[str]) -> None:
    build_tiny_model(tmp_path, family="qwen2_5_vl", seed=0, corpus=corpus)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, 1176)
    changed = torch.cat([pixels[:12], torch.randn(4, 1176)])  # only the last window of 2 x 2 patches

    def first_window_moves() -> bool:
        features = [model.model.visual(image, grid_thw=grid).pooler_output[0] for image in (pixels, changed)]
        return not torch.equal(*features)

    assert first_window_moves()
    model.model.visual.fullatt_block_indexes = []
    assert not first_window_moves()


def test_same_seed_gives_the_same_bytes(model_folder: Path, family: str, tmp_path: Path, corpus: list[str]) -> None:
    build_tiny_model(tmp_path, family=family, seed=0, corpus=list(reversed(corpus)))
    names = {path.name for path in model_folder.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "processor_config.json"} <= names
    for name in names:
        assert (tmp_path / name).read_bytes() == (model_folder / name).read_bytes(), name


def test_another_seed_gives_other_weights_and_global_state_stays(
    family: str, model_folder: Path, tmp_path: Path, corpus: list[str]
) -> None:
    before = torch.get_rng_state()
    build_tiny_model(tmp_path, family=family, seed=1, corpus=corpus)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "model.safetensors").read_bytes() != (model_folder / "model.safetensors").read_bytes()


def test_unknown_family_is_an_error(tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(ValueError, match=r"family 'llava'.*qwen2_5_vl, qwen3_5, qwen3_5_moe, qwen3_vl"):
        build_tiny_model(tmp_path, family="llava", seed=0, corpus=corpus)
