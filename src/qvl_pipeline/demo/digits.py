"""The embedded dataset: real handwritten digits in pictures and clips, in three sources of three formats."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import count, cycle
from pathlib import Path

import numpy as np
import orjson
from sklearn.datasets import load_digits

from qvl_pipeline.demo.drawing import draw_motion, draw_picture, draw_sequence, write_clip, write_picture
from qvl_pipeline.demo.planted import PLANTED, plant
from qvl_pipeline.demo.questions import KINDS, Part, Sample, Studio
from qvl_pipeline.demo.sources import SOURCES, write_sources
from qvl_pipeline.demo.speech import speak, write_speech

# Of every 20 samples, 14 go to Parquet, 3 to JSONL and 3 to ShareGPT.
SOURCE_CYCLE = ("digits_parquet",) * 14 + ("digits_jsonl",) * 3 + ("digits_sharegpt",) * 3
# What is asked, where nothing else is asked for: kinds of questions and their weights.
TRAIN_WEIGHTS = {
    "single_image": 4,
    "two_images": 3,
    "video": 4,
    "image_and_video": 3,
    "two_videos": 2,
    "text": 2,
    "multi_turn": 2,
}
# Kinds with spoken digits.
SPOKEN = {"audio", "audio_and_image"}
EVAL_SHARE = 0.2  # of scikit-learn's 1797 digit images, and of the numbers asked about in texts
PLANTED_FILE = "planted.json"


def build_digits(
    folder: Path, *, seed: int, train_samples: int, eval_samples: int, kinds: Mapping[str, int] = TRAIN_WEIGHTS
) -> None:
    """Draw the dataset and write it: three sources, their media, and the list of planted bad rows.

    `folder` receives `messages.parquet` and `messages.jsonl` (OpenAI messages), `sharegpt.json`, `images/`, `videos/`,
    `sounds/` where a kind has any, and `planted.json` (`source`, `row`, `stage`, `rule` of each bad row). Media paths
    in rows are relative to `folder`. The same arguments give the same bytes. The folder appears complete or not at all;
    an earlier build is replaced.

    Args:
        folder: Folder to write.
        seed: Seed of every choice.
        train_samples: Good training samples, all kinds together.
        eval_samples: Good evaluation samples; no digit image of theirs occurs in a training sample.
        kinds: Kinds of samples, and their weights in the training split; in the eval split all weigh the same.

    Raises:
        FileExistsError: `folder` holds something other than an earlier build.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / PLANTED_FILE).exists():
        raise FileExistsError(f"'{folder}' holds files that are not the digits dataset: name a new or empty folder")
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    for media in ("images", "videos", *(["sounds"] if SPOKEN & kinds.keys() else [])):
        (building / media).mkdir(parents=True)

    train = _draw(building, "train", "train", seed, _kinds(seed, train_samples, kinds))
    evaluation = _draw(building, "eval", "eval", seed, _kinds(seed, eval_samples, dict.fromkeys(kinds, 1)))
    spoilt = _draw(building, "planted", "train", seed, [bad.kind for bad in PLANTED])
    rows = {source: [] for source in SOURCES}
    for sample, source in zip(train + evaluation, cycle(SOURCE_CYCLE), strict=False):
        rows[source].append(SOURCES[source](sample))
    planted = plant(building, rows, spoilt)
    write_sources(building, rows)
    (building / PLANTED_FILE).write_bytes(orjson.dumps(planted, option=orjson.OPT_INDENT_2))
    shutil.rmtree(folder, ignore_errors=True)
    building.replace(folder)


def _kinds(seed: int, samples: int, weights: Mapping[str, int]) -> list[str]:
    """One kind per sample in random order, in the proportions of `weights` to within one sample each."""
    bounds = [round(samples * total / sum(weights.values())) for total in np.cumsum([0, *weights.values()])]
    kinds = np.repeat(list(weights), np.diff(bounds))
    return np.random.default_rng(seed).permutation(kinds).tolist()


def _draw(folder: Path, name: str, split: str, seed: int, kinds: list[str]) -> list[Sample]:
    studio = _studio(folder, name, split, seed)
    return [Sample(f"{name}-{number:05d}", kind, split, KINDS[kind](studio)) for number, kind in enumerate(kinds)]


def _studio(folder: Path, name: str, split: str, seed: int) -> Studio:
    """A studio that draws with the digits and numbers of one split only, and names its media after `name`."""
    rng = np.random.default_rng([seed, *name.encode()])
    digits = load_digits()
    chosen = _of_split(np.arange(len(digits.images)), split, seed)
    pool = {label: digits.images[[index for index in chosen if digits.target[index] == label]] for label in range(10)}
    numbering = count()

    def ink(digit: int) -> np.ndarray:
        return rng.choice(pool[digit])

    def picture(digit: int) -> Part:
        path = f"images/{name}-{next(numbering):05d}.png"
        write_picture(folder / path, draw_picture(rng, ink(digit)))
        return Part("image", path)

    def clip(frames: np.ndarray) -> Part:
        path = f"videos/{name}-{next(numbering):05d}.mp4"
        write_clip(folder / path, frames)
        return Part("video", path)

    def spoken(digit: int) -> Part:
        path = f"sounds/{name}-{next(numbering):05d}.wav"
        write_speech(folder / path, speak(rng, digit))
        return Part("audio", path)

    return Studio(
        rng=rng,
        numbers=cycle(_of_split(np.arange(1000, 10_000), split, seed).tolist()),
        picture=picture,
        sequence=lambda shown: clip(draw_sequence(rng, [ink(digit) for digit in shown])),
        motion=lambda digit, direction: clip(draw_motion(rng, ink(digit), direction)),
        spoken=spoken,
    )


def _of_split(items: np.ndarray, split: str, seed: int) -> np.ndarray:
    """The items that belong to one split, in random order: the two splits share none."""
    shuffled = np.random.default_rng(seed).permutation(items)
    border = round(EVAL_SHARE * len(items))
    return shuffled[:border] if split == "eval" else shuffled[border:]
