"""M-RoPE positions against the installed transformers, where its answer is the authors' too.

Values worked out by hand are in `tests/media/test_mrope.py`; they hold whatever is installed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.mrope import mrope_positions

# Releases that misplace media in time (huggingface/transformers#45381, #45325).
KNOWN_BAD = [(Version("5.3.0"), Version("5.3.0")), (Version("5.4.0"), Version("5.5.3"))]
TEXT = 40


def installed_is_known_bad() -> bool:
    installed = Version(transformers.__version__)
    return any(first <= installed <= last for first, last in KNOWN_BAD)


def random_sample(rng: np.random.Generator, family: str, image: int, video: int) -> tuple[list[int], list[dict]]:
    """Text and media in turn. Clips are shorter in time than they are high or wide.

    After longer clips of Qwen2.5-VL, transformers 5.23 lets the text start inside the clip, which the authors do not.
    """
    ids, media = [TEXT] * int(rng.integers(1, 4)), []
    for _ in range(rng.integers(1, 5)):
        kind = str(rng.choice(["image", "video"]))
        frames = 1 if kind == "image" else int(rng.integers(1, 4))
        height, width = (int(side) for side in rng.integers(3, 6, size=2))
        seconds = float(rng.choice([0.5, 0.25])) if kind == "video" else 0.0
        media.append(
            {"type": kind, "grid_t": frames, "grid_h": 2 * height, "grid_w": 2 * width, "seconds_per_grid": seconds}
        )
        block = [image if kind == "image" else video] * (height * width)
        blocks = [[*block, TEXT]] * frames if family != "qwen2_5_vl" else [[*block * frames, TEXT]]
        ids += [token for part in blocks for token in part] + [TEXT] * int(rng.integers(0, 3))
    return ids, media


@pytest.mark.xfail(installed_is_known_bad(), reason="this transformers misplaces media in time", strict=True)
def test_installed_transformers_agrees(hf_model: PreTrainedModel, family: str) -> None:
    config, rng = hf_model.config, np.random.default_rng(0)
    placeholders = (config.image_token_id, config.video_token_id)
    for _ in range(30):
        ids, media = random_sample(rng, family, *placeholders)
        ours = mrope_positions(
            np.array(ids),
            media,
            placeholder_ids=placeholders,
            tokens_per_second=FAMILIES[family].tokens_per_second(config),
        )
        tokens = torch.tensor(ids)[None]
        grids = {
            f"{kind}_grid_thw": torch.tensor(
                [[m["grid_t"], m["grid_h"], m["grid_w"]] for m in media if m["type"] == kind]
            )
            for kind in {m["type"] for m in media}
        }
        if family == "qwen2_5_vl":
            grids["second_per_grid_ts"] = torch.tensor([m["seconds_per_grid"] for m in media if m["type"] == "video"])
        kinds = (tokens == placeholders[0]).int() + 2 * (tokens == placeholders[1]).int()
        theirs, _ = hf_model.model.get_rope_index(tokens, kinds, **grids)
        assert ours[0].tolist() == list(range(len(ids)))
        assert ours[1:].tolist() == theirs[:, 0].tolist(), media


def test_known_bad_releases_are_told_from_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {}
    for version in ("5.2.0", "5.3.0", "5.3.1", "5.4.0", "5.5.0", "5.5.3", "5.5.4", "5.17.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        verdicts[version] = installed_is_known_bad()
    assert [version for version, bad in verdicts.items() if bad] == ["5.3.0", "5.4.0", "5.5.0", "5.5.3"]
