"""Base models in the forms in which they are published: what transformers 5 writes, and what was written before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

OLD_FORMS = ("preprocessor_config.json", "video_preprocessor_config.json")


def in_old_form(new: Path, folder: Path, *, pixels: bool) -> Path:
    """Copy a folder that transformers 5 wrote as one of the 4.5x line.

    Args:
        new: The folder.
        folder: Where to.
        pixels: Spell limits `min_pixels` and `max_pixels`, and say nothing of clips, as Qwen2.5-VL's does; else `size`,
            in a file for images and one for clips, as Qwen3-VL's does.
    """
    shutil.copytree(new, folder)
    single = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    kept = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "size")
    for name, part in zip(OLD_FORMS, ("image_processor", "video_processor"), strict=True):
        values = {key: single[part][key] for key in (*kept, f"{part}_type")}
        if pixels:
            size = values.pop("size")
            values = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} | values
        if part == "image_processor" or not pixels:
            # Neither indented as usual nor ended by a newline: what is not changed is to keep its bytes.
            text = json.dumps(values | {"processor_class": single["processor_class"]}, indent=1)
            (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": config.pop("dtype")}, indent=1))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "LICENSE").write_text("Free.")
    return folder
