"""The kinds of samples: what is shown, what is asked, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

ORDINALS = ("first", "second")
LARGER = "Which digit is larger?"
DIRECTIONS = ("left", "right", "up", "down")


class Part(NamedTuple):
    """One piece of a turn: a text, or the path of a picture, clip or sound relative to the dataset's folder."""

    type: Literal["text", "image", "video", "audio"]
    value: str


class Turn(NamedTuple):
    """What one role says."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One conversation, before it takes the form of a source."""

    id: str
    kind: str
    split: str
    turns: list[Turn]

    @property
    def media(self) -> list[Part]:
        """Pictures, clips and sounds in reading order."""
        return [part for turn in self.turns for part in turn.parts if part.type != "text"]


@dataclass(frozen=True)
class Studio:
    """What a question draws on: randomness, digits of one split, and a place for media.

    Attributes:
        rng: Source of every choice.
        numbers: Numbers that no other text question uses.
        picture: Draws a picture of a digit (0 to 9).
        sequence: Draws a clip of digits that follow one another.
        motion: Draws a clip of a digit that moves in a direction.
        spoken: Says a digit.
    """

    rng: np.random.Generator
    numbers: Iterator[int]
    picture: Callable[[int], Part]
    sequence: Callable[[list[int]], Part]
    motion: Callable[[int, str], Part]
    spoken: Callable[[int], Part]

    def digits(self, count: int) -> list[int]:
        """Different digits, in random order."""
        return self.rng.choice(10, size=count, replace=False).tolist()

    def one_of(self, options: tuple[str, ...]) -> str:
        """One of the options, all equally likely."""
        return options[self.rng.integers(len(options))]


def _ask(*parts: Part | str, answer: int | str) -> list[Turn]:
    shown = tuple(Part("text", part) if isinstance(part, str) else part for part in parts)
    return [Turn("user", shown), Turn("assistant", (Part("text", str(answer)),))]


def _text(studio: Studio) -> list[Turn]:
    number = str(next(studio.numbers))
    place = studio.one_of(("first", "last"))
    return _ask(f"What is the {place} digit of {number}?", answer=number[0 if place == "first" else -1])


def _single_image(studio: Studio) -> list[Turn]:
    (digit,) = studio.digits(1)
    return _ask(studio.picture(digit), "Which digit is this?", answer=digit)


def _next_digit(studio: Studio) -> list[Turn]:
    (digit,) = studio.digits(1)
    return _ask(studio.picture(digit), "Which digit comes after this one?", answer=(digit + 1) % 10)


def _two_images(studio: Studio) -> list[Turn]:
    digits = studio.digits(2)
    return _ask(*map(studio.picture, digits), LARGER, answer=max(digits))


def _video(studio: Studio) -> list[Turn]:
    if studio.one_of(("order", "order", "motion")) == "motion":
        direction = studio.one_of(DIRECTIONS)
        return _ask(studio.motion(studio.digits(1)[0], direction), "Which way does it move?", answer=direction)
    digits = studio.digits(2)
    ordinal = studio.one_of(ORDINALS)
    return _ask(studio.sequence(digits), f"Which digit came {ordinal}?", answer=digits[ORDINALS.index(ordinal)])


def _image_and_video(studio: Studio) -> list[Turn]:
    digits = studio.digits(2)
    clip = studio.motion(digits[1], studio.one_of(DIRECTIONS))
    return _ask(studio.picture(digits[0]), clip, LARGER, answer=max(digits))


def _two_videos(studio: Studio) -> list[Turn]:
    digits = studio.digits(2)
    clips = [studio.motion(digit, studio.one_of(DIRECTIONS)) for digit in digits]
    return _ask(*clips, LARGER, answer=max(digits))


def _multi_turn(studio: Studio) -> list[Turn]:
    digits = studio.digits(2)
    turns = _ask(studio.picture(digits[0]), "Which digit is this?", answer=digits[0])
    turns += _ask(studio.picture(digits[1]), "And this?", answer=digits[1])
    if studio.one_of(("two rounds", "three rounds")) == "three rounds":
        turns += _ask(LARGER, answer=max(digits))
    return turns


def _audio(studio: Studio) -> list[Turn]:
    (digit,) = studio.digits(1)
    return _ask(studio.spoken(digit), "Which digit is this?", answer=digit)


def _audio_and_image(studio: Studio) -> list[Turn]:
    digits = studio.digits(2)
    return _ask(studio.spoken(digits[0]), studio.picture(digits[1]), LARGER, answer=max(digits))


KINDS: dict[str, Callable[[Studio], list[Turn]]] = {
    "single_image": _single_image,
    "two_images": _two_images,
    "video": _video,
    "image_and_video": _image_and_video,
    "two_videos": _two_videos,
    "text": _text,
    "multi_turn": _multi_turn,
    # What no other kind teaches: for an adapter to learn.
    "next_digit": _next_digit,
    # For a model that hears.
    "audio": _audio,
    "audio_and_image": _audio_and_image,
}
