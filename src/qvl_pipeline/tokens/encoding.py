"""Samples to token ids, trained spans and media grids, without touching a pixel.

The text is rendered by the model's own chat template, and every placeholder is expanded by the processor's own code, so
the ids are those of the processor for the same messages and media. Only the repetition of a placeholder, thousands of
times for a long clip, is done on ids instead of on text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.families.tokens import END_OF_TURN
from qvl_pipeline.media.frames.sampling import seconds_per_grid, told_seconds_per_grid
from qvl_pipeline.media.frames.store import FrameStore, clip_id
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.tokens.chat import RenderedChat, render_chats
from qvl_pipeline.tokens.control import encode_texts, without_marks
from qvl_pipeline.tokens.unusable import Unusable, UnusableSampleError

COPIED = ("sample_id", "source", "split", "kind", "task", "answer")
_OF_A_MEDIUM = ("type", "key", "grid_t", "grid_h", "grid_w", "seconds_per_grid", "spectra", "content_hash")

# Inputs of models that are told the interval between the temporal patches of a clip.
_INTERVALS = frozenset({"second_per_grid_ts", "video_second_per_grid"})

# An entry of the column `media`; a clip also has the `seconds` of its frames.
Medium = Mapping[str, Any]


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids.

    Attributes:
        input_ids: Int32 `[T]`, placeholders expanded.
        label_spans: Half-open token ranges that are trained on.
        prompt_length: Tokens before the last assistant answer; 0 of a plain text, which answers nothing.
        last_answer: Text of that answer, without its end token.
    """

    input_ids: np.ndarray
    label_spans: list[tuple[int, int]]
    prompt_length: int
    last_answer: str


class ImageFacts(NamedTuple):
    """What the media index knows of an image: size of the upright picture in pixels, and sha256 of the file."""

    height: int
    width: int
    content_hash: str | None


class MediaGrids:
    """Sizes of images and clips in patches, and of sounds in spectra, from the media index and the stores."""

    def __init__(
        self,
        processor: ProcessorMixin,
        images: Mapping[str, ImageFacts],
        store: FrameStore,
        sounds: SoundStore | None = None,
    ) -> None:
        """Set up the look-up.

        Args:
            processor: The model's processor, which says the pixel limits and the patch sizes.
            images: What is known of each image, by its path.
            store: Sampled clips.
            sounds: Sounds, of a model that hears.
        """
        self._image_processor = processor.image_processor
        self._videos = processor.video_processor
        # Qwen2.5-VL's model is given an interval, Qwen3-VL's reads the seconds in the text.
        self._tells_interval = not _INTERVALS.isdisjoint(processor.model_input_names)
        self.images = images
        self.store = store
        self.sounds = sounds

    def medium(self, item: Mapping[str, Any]) -> Medium:
        """Describe one medium of a sample.

        Args:
            item: Entry of the column `media` of `valid_samples`.

        Returns:
            Entry of the column `media` of `tokenized_samples`; a clip also has the `seconds` of its frames.

        Raises:
            UserError: The image is not in the media index, or the clip or sound not in its store.
        """
        if item["type"] == "audio":
            return self._sound(clip_id(item["path"], item["start"], item["end"]))
        return self._clip(item) if item["type"] == "video" else self._image(item["path"])

    def _sound(self, key: str) -> Medium:
        if self.sounds is None:
            raise UserError(f"'{key}' is a sound, and the model does not hear: run the pipeline 'sample'")
        sound = self.sounds.info("audio", key)
        grid = {"grid_t": 0, "grid_h": 0, "grid_w": 0, "seconds_per_grid": 0.0}
        return {"type": "audio", "key": key, **grid, **{name: sound[name] for name in ("spectra", "content_hash")}}

    def _clip(self, item: Mapping[str, Any]) -> Medium:
        key = clip_id(item["path"], item["start"], item["end"])
        clip = self.store.info(key)
        heard = self.sounds.find("video", key) if self.sounds else None
        temporal_patch, seconds = self._videos.temporal_patch_size, clip["seconds"]
        interval = seconds_per_grid(seconds, temporal_patch)
        if self._tells_interval:
            interval = told_seconds_per_grid(clip["frame_indices"], seconds, clip["source_fps"], temporal_patch)
        return {
            "type": "video",
            "key": key,
            "grid_t": -(-clip["n_frames"] // temporal_patch),
            "grid_h": clip["height"] // self._videos.patch_size,
            "grid_w": clip["width"] // self._videos.patch_size,
            "seconds_per_grid": interval,
            "spectra": heard["spectra"] if heard else 0,
            "content_hash": clip["content_hash"],
            "seconds": seconds,
        }

    def _image(self, path: str) -> Medium:
        if path not in self.images:
            raise UserError(f"image '{path}' has no size in media_index: run the pipeline 'validate' again")
        image = self.images[path]
        height, width = smart_resize(
            image.height,
            image.width,
            factor=self._image_processor.patch_size * self._image_processor.merge_size,
            min_pixels=self._image_processor.size["shortest_edge"],
            max_pixels=self._image_processor.size["longest_edge"],
        )
        grid_h, grid_w = height // self._image_processor.patch_size, width // self._image_processor.patch_size
        grid = {"grid_t": 1, "grid_h": grid_h, "grid_w": grid_w, "seconds_per_grid": 0.0, "spectra": 0}
        return {"type": "image", "key": path, **grid, "content_hash": image.content_hash}


def encode_samples(
    samples: Sequence[Mapping[str, Any]],
    grids: MediaGrids,
    processor: ProcessorMixin,
    *,
    ignore_empty_think: bool = True,
) -> list[dict[str, Any] | Unusable]:
    """Tokenise samples.

    Args:
        samples: Rows of `valid_samples`.
        grids: Sizes of all media.
        processor: The model's processor.
        ignore_empty_think: Empty thoughts before answers are not trained on.

    Returns:
        Rows of `tokenized_samples`, in which `input_ids` is an array and a span a pair; in the place of a sample that
        cannot be tokenised, because of what is in it, the reason.

    Raises:
        UserError: A medium is not in the media index or the frame store.
    """
    media = [[grids.medium(item) for item in row["media"]] for row in samples]
    return _encode(samples, media, processor, ignore_empty_think)


def _encode(
    samples: Sequence[Mapping[str, Any]],
    media: Sequence[Sequence[Medium]],
    processor: ProcessorMixin,
    ignore_empty_think: bool,
) -> list[dict[str, Any] | Unusable]:
    conversations = [json.loads(row["messages"]) for row in samples]
    try:
        names = [row["sample_id"] for row in samples]
        chats = render_chats(processor, conversations, names, ignore_empty_think=ignore_empty_think)
        encoded = encode_chats(processor, chats, media)
    except UnusableSampleError as error:
        if len(samples) == 1:
            return [Unusable(samples[0]["sample_id"], error.rule, error.detail)]
        half = len(samples) // 2  # halved again, until it stands alone: few are bad
        return [
            *_encode(samples[:half], media[:half], processor, ignore_empty_think),
            *_encode(samples[half:], media[half:], processor, ignore_empty_think),
        ]
    rows = [_table_row(*parts) for parts in zip(samples, encoded, media, strict=True)]
    for row, messages, found in zip(rows, conversations, encoded, strict=True):
        # A call as the template writes it, which is what a model is to write: `ingest` cannot know it.
        if not row["answer"] and any(turn.get("tool_calls") for turn in messages[-1:]):
            row["answer"] = found.last_answer
    return rows


def encode_chats(
    processor: ProcessorMixin, chats: Sequence[RenderedChat], media: Sequence[Sequence[Medium]]
) -> list[EncodedChat]:
    """Tokenise rendered conversations.

    Args:
        processor: The model's processor.
        chats: Rendered conversations.
        media: The media of each, in reading order.

    Returns:
        The encoded conversations.

    Raises:
        UnusableSampleError: The placeholders of a conversation do not match its media.
    """
    compact = [_compact(processor, chat, items) for chat, items in zip(chats, media, strict=True)]
    tokens = encode_texts(processor.tokenizer, [chat.text for chat, _ in compact])
    placeholders = placeholder_ids(processor)
    return [
        _repeat_placeholders(*found, chat, repeats, placeholders)
        for found, (chat, repeats) in zip(tokens, compact, strict=True)
    ]


def placeholder_ids(names: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for images and clips and, where the model hears, for sounds.

    Args:
        names: Processor or configuration of the model.
    """
    hears = getattr(names, "audio_token_id", None) is not None
    return (names.image_token_id, names.video_token_id, *([names.audio_token_id] if hears else []))


def video_metadata(seconds: Sequence[float]) -> VideoMetadata:
    """What Qwen3-VL's processor needs to write the true time of each frame: "frame numbers" at one frame per second."""
    return VideoMetadata(total_num_frames=len(seconds), fps=1.0, frames_indices=list(seconds))


def _compact(processor: ProcessorMixin, chat: RenderedChat, media: Sequence[Medium]) -> tuple[RenderedChat, list[int]]:
    """Expand placeholders as if every temporal patch were one token, and say how many each of them stands for."""
    kinds = [kind for kind in ("image", "video", "audio") if hasattr(processor, f"{kind}_token")]
    tokens = {kind: getattr(processor, f"{kind}_token") for kind in kinds}
    pattern = re.compile("|".join(map(re.escape, tokens.values())))
    remaining = iter(media)
    repeats: list[int] = []

    def expand(match: re.Match[str]) -> str:
        medium = next(remaining, None)
        if medium is None or match[0] != tokens.get(medium["type"]):
            other = f"the chat template places {match[0]} where the sample has no such medium"
            raise UnusableSampleError(chat.name, "media_not_placed", other)
        if medium["type"] == "audio":
            repeats.append(audio_tokens(medium["spectra"]))
            return match[0]
        merge = getattr(processor, f"{medium['type']}_processor").merge_size
        of_patch = medium["grid_h"] * medium["grid_w"] // merge**2
        grid = np.array([[medium["grid_t"], merge, merge]])
        if medium["type"] == "image":
            repeats.append(of_patch)
            return processor.replace_image_token({"image_grid_thw": grid}, 0)
        inputs = {"video_grid_thw": grid, "video_metadata": [video_metadata(medium["seconds"])]}
        if "audio" not in tokens:
            repeats.extend([of_patch] * medium["grid_t"])
            return processor.replace_video_token(inputs, 0)
        placed = _seen_and_heard(processor, inputs, medium)
        # Each token of the sound is there by itself: which of them come between two pictures depends on their number.
        repeats.extend(of_patch if found[0] == tokens["video"] else 1 for found in pattern.finditer(placed))
        return placed

    cuts = sorted({0, len(chat.text)}.union(*chat.answers))
    pieces = [pattern.sub(expand, chat.text[start:end]) for start, end in pairwise(cuts)]
    moved = dict(zip(cuts, accumulate(map(len, pieces), initial=0), strict=True))
    if next(remaining, None) is not None:
        fewer = f"it has {len(media)} media, but the chat template places fewer: it may know none in such a turn"
        raise UnusableSampleError(chat.name, "media_not_placed", fewer)
    answers = [(moved[start], moved[end]) for start, end in chat.answers]
    return RenderedChat(chat.name, "".join(pieces), answers, chat.trained), repeats


def _seen_and_heard(processor: ProcessorMixin, inputs: dict[str, Any], medium: Medium) -> str:
    """The placeholders of a clip by a processor that hears; sound is placed among pictures by the time of each."""
    heard = {"num_audio_tokens": [audio_tokens(medium["spectra"])]} if medium["spectra"] else None
    told = {name: getattr(processor, name) for name in ("seconds_per_chunk", "position_id_per_seconds")}
    return processor.replace_video_token(
        inputs | {"video_second_per_grid": [medium["seconds_per_grid"]]},
        0,
        heard,
        [0] if heard else [None],
        load_audio_from_video=heard is not None,
        **told,
    )


def _repeat_placeholders(
    ids: np.ndarray, offsets: np.ndarray, chat: RenderedChat, repeats: list[int], placeholders: tuple[int, ...]
) -> EncodedChat:
    """Finish a tokenised compact text: ids `[T]`, and where each token begins and ends in it, `[T, 2]`."""
    is_placeholder = np.isin(ids, placeholders)
    counts = np.ones(len(ids), dtype=np.int64)
    counts[is_placeholder] = repeats
    position = np.concatenate([[0], np.cumsum(counts)])
    answers = [_token_range(offsets, *answer) for answer in chat.answers]
    trained = np.zeros(len(ids), dtype=np.int8)
    for (start, end), is_trained in zip(answers, chat.trained, strict=True):
        trained[start:end] = is_trained
    trained[is_placeholder] = 0  # a model does not write images: within an answer they are context
    trained[0] = 0  # nothing of the sample is before it that could predict it
    edges = np.flatnonzero(np.diff(trained, prepend=0, append=0))
    spans = [(int(start), int(end)) for start, end in position[edges].reshape(-1, 2)]
    start, end = chat.answers[-1]
    last_answer = without_marks(chat.text[start:end].removesuffix(END_OF_TURN))
    return EncodedChat(np.repeat(ids, counts), spans, int(position[answers[-1][0]]), last_answer)


def _token_range(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """Tokens that lie within a range of characters.

    A token that begins before it, such as a blank line that joins the newline before the answer, belongs to the prompt.
    """
    first = int(np.argmax(offsets[:, 1] > start))
    if offsets[first, 0] < start:
        first += 1
    return first, int(np.argmax(offsets[:, 1] >= end)) + 1


def _table_row(row: Mapping[str, Any], encoded: EncodedChat, media: Sequence[Medium]) -> dict[str, Any]:
    return {name: row[name] for name in COPIED} | {
        "input_ids": encoded.input_ids,
        "label_spans": encoded.label_spans,
        "length": len(encoded.input_ids),
        "supervised_tokens": sum(end - start for start, end in encoded.label_spans),
        "vit_patches": sum(medium["grid_t"] * medium["grid_h"] * medium["grid_w"] for medium in media),
        "spectra": sum(medium["spectra"] for medium in media),
        "prompt_length": encoded.prompt_length,
        "media": [{name: medium[name] for name in _OF_A_MEDIUM} for medium in media],
    }
