"""What `mlflow.pyfunc.load_model("models:/name@champion")` loads: a model found by its pointer, and which answers.

Called in a project, it finds the model where the pointer says, or in DVC's cache or remote.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage.data_version import data_version
from qvl_pipeline.tracking.lineage.dvc_cache import link_by_md5

# Models that came by DVC, by their md5.
FETCHED = Path("data/served")


class AnsweringModel:
    """A model with its processor, in plain transformers, as it is served."""

    def __init__(self, folder: Path) -> None:
        """Load a model, on the GPU when there is one.

        Args:
            folder: What a training exported: a whole model, or an adapter, whose base is loaded too.
        """
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from qvl_pipeline.engine.model.adapters import FOLDER as ADAPTER
        from qvl_pipeline.engine.model.adapters.attach import AttachedAdapter
        from qvl_pipeline.engine.model.weights import read_config

        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        adapter, weights = folder / ADAPTER, str(folder)
        if adapter.is_dir():
            config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            weights = config["base_model_name_or_path"]
        model = AutoModelForImageTextToText.from_pretrained(weights, config=read_config(weights), dtype=dtype)
        self._model = model.to(device).eval()
        if adapter.is_dir():
            AttachedAdapter(self._model, adapter)
        self._processor = AutoProcessor.from_pretrained(folder)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Answer questions.

        Args:
            model_input: A table, or a list of rows: `question`, and `image` where there is one: a path, or the file in
                base64.
            params: `max_new_tokens` (128), and other arguments of `generate`; greedy without any.

        Returns:
            One answer a row.
        """
        rows = model_input.to_dict("records") if isinstance(model_input, pd.DataFrame) else list(model_input)
        options = {"max_new_tokens": 128, "do_sample": False} | dict(params or {})
        return [self._answer(row, options) for row in rows]

    def _answer(self, row: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        import torch

        image = _opened(row["image"]) if isinstance(row.get("image"), str) and row["image"] else None
        media = [] if image is None else [{"type": "image"}]
        messages = [{"role": "user", "content": [*media, {"type": "text", "text": str(row["question"])}]}]
        prompt = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        images = {} if image is None else {"images": [image]}
        inputs = self._processor(text=[prompt], return_tensors="pt", **images).to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(**inputs, **options)
        return self._processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def find_model(pointer: Mapping[str, str], project: Path) -> Path:
    """Return the folder of a model.

    Args:
        pointer: Its `path`, and `digest` by which DVC knows it.
        project: Root of the project.

    Raises:
        UserError: It is neither where it was, nor in DVC's cache or remote.
    """
    place = project / pointer["path"]
    if place.is_dir() and data_version(place, read_all=True).digest == pointer["digest"]:
        return place
    md5 = pointer["digest"].partition(":")[2]
    fetched = project / FETCHED / md5
    if fetched.is_dir() or link_by_md5(project, md5, fetched):
        return fetched
    raise UserError(
        f"the model {pointer['path']} ({pointer['digest']}) is not in {project}, and DVC does not have it: run this in "
        "the project, and `dvc push` where it was trained"
    )


def _load_pyfunc(path: str) -> AnsweringModel:
    pointer = json.loads(Path(path).read_text(encoding="utf-8"))
    return AnsweringModel(find_model(pointer, Path.cwd()))


def _opened(image: str) -> Any:
    from PIL import Image

    with contextlib.suppress(OSError):  # too long for a name
        if Path(image).is_file():
            return Image.open(image).convert("RGB")
    try:
        return Image.open(BytesIO(base64.b64decode(image, validate=True))).convert("RGB")
    except (binascii.Error, OSError) as error:
        raise UserError(f"image: '{image[:80]}' is neither a file nor a picture in base64") from error
