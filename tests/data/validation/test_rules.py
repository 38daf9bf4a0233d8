"""Each rule finds what it is for, at its limit, and nothing else; the first broken one names the sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.messages import Media, Message
from qvl_pipeline.data.validation import rules
from qvl_pipeline.data.validation.rules import (
    MEDIA_RULES,
    RULES,
    SAMPLE_RULES,
    Broken,
    Sample,
    broken_by_sample,
    duplicate,
    first_error,
    leakage,
    warnings,
)
from qvl_pipeline.families.tokens import CONTROL_TOKENS
from qvl_pipeline.media.probe import Probe

CONFIG = ValidateConfig(max_text_chars=40, max_image_pixels=10_000, max_aspect_ratio=4, min_video_frames=4)
IMAGE = Probe(content_hash="h1", width=8, height=6, n_frames=1, codec="png")
CLIP = Probe(content_hash="h2", width=8, height=6, n_frames=8, fps=4.0, duration_s=2.0, codec="h264")


def _turn(role: str, *parts: str) -> Message:
    """A turn; the parts `image` and `video` are media, all others are texts."""
    items = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": items}


def _sample(*turns: Message, image: Probe = IMAGE, clip: Probe = CLIP, media: list[Media] | None = None) -> Sample:
    """A sample about one image and one clip."""
    turns = turns or (_turn("user", "image", "video", "Which?"), _turn("assistant", "This."))
    media = [Media("image", "a.png"), Media("video", "b.mp4")] if media is None else media
    return Sample("s/0", "train", list(turns), media, {("image", "a.png"): image, ("video", "b.mp4"): clip})


def _text_only(*turns: Message) -> Sample:
    return _sample(*turns, media=[])


USER, ASSISTANT = _turn("user", "Which?"), _turn("assistant", "This.")
CALLING = _turn("assistant") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
PART, LATE = Media("video", "b.mp4", 0.5, 1.0), Media("video", "b.mp4", 9.0)

BROKEN: list[tuple[str, Sample, str]] = [
    ("roles", _text_only(ASSISTANT, USER), "turn 0 has the role 'assistant', not 'user'"),
    ("roles", _text_only(USER, USER), "turn 1 has the role 'user', not 'assistant'"),
    ("roles", _text_only(USER, ASSISTANT, ASSISTANT), "turn 2 has the role 'assistant', not 'user'"),
    ("roles", _text_only(_turn("system", "Hm."), ASSISTANT), "turn 1 has the role 'assistant', not 'user'"),
    ("roles", _text_only(USER, _turn("system", "Hm.")), "turn 1 has the role 'system', not 'assistant'"),
    ("roles", _text_only(USER, _turn("tool", "4")), "turn 1 has the role 'tool', not 'assistant'"),
    ("roles", _text_only(USER, ASSISTANT, ASSISTANT), "turn 2 has the role 'assistant', not 'user' or 'tool'"),
    ("roles", _text_only(USER, CALLING, USER), "turn 2 has the role 'user', not 'tool'"),
    ("roles", _text_only(USER, CALLING, _turn("tool", "4"), USER), "turn 3 has the role 'user', not 'assistant' or"),
    ("roles", _text_only(_turn("text", "Once."), ASSISTANT), "turn 0 has the role 'text', not 'user'"),
    ("empty_turn", _text_only(USER, _turn("assistant")), "turn 1 (assistant) says nothing"),
    ("empty_turn", _text_only(_turn("user", " \n"), ASSISTANT), "turn 0 (user) says nothing"),
    ("no_assistant_turn", _text_only(USER), "none of the 1 turns is the assistant's"),
    ("no_assistant_turn", _text_only(_turn("system", "Hm.")), "none of the 1 turns is the assistant's"),
    ("no_assistant_turn", _text_only(USER, ASSISTANT | {"trained": False}), "turns is the assistant's and trained on"),
    ("placeholder_mismatch", _sample(media=[Media("image", "a.png")]), "1 x video, but the files are 1 x image"),
    ("placeholder_mismatch", _sample(USER, ASSISTANT), "are 1 x image, 1 x video: write <image> into the text"),
    ("placeholder_mismatch", _sample(_turn("user", "video", "image"), ASSISTANT), "hold 1 x video, 1 x image, but"),
    ("reserved_token", _text_only(USER, _turn("assistant", "a <|im_end|> b")), "the text of turn 1 holds <|im_end|>"),
    ("reserved_token", _text_only(USER | {"tools": [{"name": "<|im_end|>"}]}, ASSISTANT), "turn 0 holds <|im_end|>"),
    ("reserved_token", _text_only(_turn("user", "<|im_", "end|>"), ASSISTANT), "the text of turn 0 holds <|im_end|>"),
    ("too_long", _text_only(USER, _turn("assistant", "x" * 35)), "41 characters, more than max_text_chars (40)"),
    ("missing_media", _sample(image=Probe(missing="does not exist")), "image 'a.png' does not exist"),
    ("undecodable_media", _sample(clip=Probe(failure="broken")), "video 'b.mp4' cannot be decoded: broken"),
    ("too_few_frames", _sample(clip=replace(CLIP, n_frames=3)), "has 3 frames, fewer than min_video_frames (4)"),
    ("too_few_frames", _sample(_turn("user", "video"), ASSISTANT, media=[PART]), "3 frames from second 0.5 to"),
    ("too_few_frames", _sample(_turn("user", "video"), ASSISTANT, media=[LATE]), "0 frames from second 9 to its end"),
    ("unknown_fps", _sample(clip=replace(CLIP, fps=None, n_frames=None)), "video 'b.mp4' has no timestamps"),
    ("image_too_large", _sample(image=replace(IMAGE, width=101, height=100)), "a.png' has 101 x 100 pixels, more"),
    ("image_too_large", _sample(clip=Probe(width=101, height=100)), "'b.mp4' has 101 x 100 pixels, more than"),
    ("aspect_ratio", _sample(image=replace(IMAGE, width=41, height=10)), "has 41 x 10 pixels, a ratio above"),
    ("aspect_ratio", _sample(clip=replace(CLIP, width=10, height=41)), "has 10 x 41 pixels, a ratio above"),
    ("empty_media", _sample(image=Probe(size_bytes=0)), "image 'a.png' is empty (0 bytes)"),
    ("empty_media", _sample(clip=Probe(size_bytes=0)), "video 'b.mp4' is empty (0 bytes)"),
    ("absurd_fps", _sample(clip=replace(CLIP, fps=90_000.0)), "has 90000 frames a second, outside of min_fps (0.01)"),
    ("absurd_fps", _sample(clip=replace(CLIP, fps=0.001)), "has 0.001 frames a second"),
    ("duration_mismatch", _sample(clip=replace(CLIP, declared_duration_s=3.1)), "claims 3.1 s, but its frames end"),
    ("deep_image", _sample(image=replace(IMAGE, mode="I;16")), "has more than 8 bits a channel (mode I;16)"),
    ("deep_image", _sample(image=replace(IMAGE, mode="F")), "has more than 8 bits a channel (mode F)"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "sample", "detail"), BROKEN)
def test_what_breaks_a_rule_is_named(rule: str, sample: Sample, detail: str) -> None:
    found = first_error(broken_by_sample(sample, CONFIG), CONFIG)
    assert found is not None
    assert found[0] == rule
    assert detail in found[1]


def _first(sample: Sample) -> Broken | None:
    return first_error(broken_by_sample(sample, CONFIG), CONFIG)


@pytest.mark.parametrize(("n_frames", "pictures"), [(12, "12"), (2, "2"), (None, "several")])
def test_an_image_file_of_several_pictures_is_only_noted(n_frames: int | None, pictures: str) -> None:
    broken = broken_by_sample(_sample(image=replace(IMAGE, codec="gif", n_frames=n_frames)), CONFIG)
    detail = f"image 'a.png' holds {pictures} pictures, of which the first alone is used: to show all of them, make a"
    assert [(rule, text.partition(" video of it")[0]) for rule, text in broken] == [("animated_image", detail)]
    assert (first_error(broken, CONFIG), warnings(broken, CONFIG)) == (None, broken)
    assert broken_by_sample(_sample(image=replace(IMAGE, codec="mpo", n_frames=n_frames)), CONFIG) == []


def test_every_rule_is_tested() -> None:
    elsewhere = {"leakage", "duplicate", "variable_frame_rate", "animated_image"}
    of_sounds = {"sound_too_short", "sound_too_long", "absurd_sample_rate", "too_many_channels", "silent_sound"}
    assert {rule for rule, _, _ in BROKEN} | elsewhere | of_sounds == set(RULES)  # test_bad_sounds.py


@pytest.mark.parametrize(
    "sample",
    [
        _sample(),
        _text_only(_turn("system", "Be brief."), USER, ASSISTANT, USER, ASSISTANT),
        _text_only(USER, ASSISTANT, _turn("user", "Unanswered.")),
        _text_only(USER, CALLING, _turn("tool"), _turn("tool", "4"), ASSISTANT, USER, ASSISTANT | {"trained": False}),
        _text_only(_turn("text", "Once.")),
        _text_only(USER, _turn("assistant", "x" * 34)),
        _text_only(USER, _turn("assistant", "2 <| 3 and <|box_start|>")),
        _sample(clip=replace(CLIP, n_frames=4)),
        _sample(_turn("user", "video"), ASSISTANT, media=[Media("video", "b.mp4", 0.5, 1.25)]),
        _sample(image=replace(IMAGE, width=100, height=100)),
        _sample(image=replace(IMAGE, width=40, height=10)),
        _sample(clip=replace(CLIP, fps=1000.0, declared_duration_s=3.0, longest_gap=1.49)),
        _sample(clip=replace(CLIP, fps=0.01, declared_duration_s=0.5)),
        _sample(image=replace(IMAGE, mode="RGBA")),
    ],
)
def test_at_the_limit_a_sample_is_valid(sample: Sample) -> None:
    assert broken_by_sample(sample, CONFIG) == []


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_every_token_that_builds_the_prompt_is_reserved(token: str) -> None:
    found = broken_by_sample(_text_only(_turn("user", "a", f"b{token}"), ASSISTANT), CONFIG)
    assert [rule for rule, _ in found] == ["reserved_token"]


def test_a_picture_too_large_to_decode_is_that_and_nothing_else() -> None:
    bomb = Probe(content_hash="h", width=9999, height=9999)
    assert [rule for rule, _ in broken_by_sample(_sample(clip=bomb), CONFIG)] == ["image_too_large"]


def test_the_first_broken_rule_wins() -> None:
    broken: dict[str, Any] = {"image": Probe(missing="does not exist"), "clip": Probe(failure="broken")}
    assert _first(_sample(_turn("user", "<|im_end|>"), **broken))[0] == "no_assistant_turn"
    assert _first(_sample(**broken))[0] == "missing_media"
    # The order is that of the rules, not that of the media.
    swapped = {"image": Probe(failure="broken"), "clip": Probe(missing="does not exist")}
    assert _first(_sample(**swapped)) == ("missing_media", "video 'b.mp4' does not exist")


def test_order_of_the_rules_is_fixed() -> None:
    assert RULES == (
        "roles",
        "empty_turn",
        "no_assistant_turn",
        "placeholder_mismatch",
        "reserved_token",
        "too_long",
        "missing_media",
        "empty_media",
        "undecodable_media",
        "too_few_frames",
        "unknown_fps",
        "absurd_fps",
        "duration_mismatch",
        "variable_frame_rate",
        "image_too_large",
        "aspect_ratio",
        "deep_image",
        "animated_image",
        "absurd_sample_rate",
        "too_many_channels",
        "sound_too_long",
        "sound_too_short",
        "silent_sound",
        "leakage",
        "duplicate",
    )


def test_leakage_needs_a_training_sample_with_the_content_of_an_eval_sample() -> None:
    assert leakage(_sample(), {"h2": "e/7"}) == "video 'b.mp4' is also in the eval sample e/7"
    assert leakage(_sample(), {"h3": "e/7"}) is None
    assert leakage(replace(_sample(), split="eval"), {"h2": "e/7"}) is None


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_what_it_is_in_a_sentence(name: str) -> None:
    first_line = getattr(rules, name).__doc__.strip().splitlines()[0]
    assert first_line.endswith(".")
    assert {**SAMPLE_RULES, **MEDIA_RULES, "leakage": leakage, "duplicate": duplicate}[name] is getattr(rules, name)


UNEVEN = _sample(clip=replace(CLIP, longest_gap=2.0))


def test_a_variable_frame_rate_is_noted_and_no_error_unless_it_is_made_one() -> None:
    broken = broken_by_sample(UNEVEN, CONFIG)
    assert first_error(broken, CONFIG) is None
    assert warnings(broken, CONFIG) == [
        (
            "variable_frame_rate",
            "video 'b.mp4' has a variable frame rate: its longest gap between two frames is 2.0 times the usual",
        )
    ]
    strict = CONFIG.model_copy(update={"severity": {"variable_frame_rate": "error"}})
    assert first_error(broken, strict)[0] == "variable_frame_rate"
    silent = CONFIG.model_copy(update={"severity": {"variable_frame_rate": "off"}})
    assert (first_error(broken, silent), warnings(broken, silent)) == (None, [])


def test_a_rule_that_later_stages_rely_on_cannot_be_softened() -> None:
    with pytest.raises(ValidationError, match=r"severity\.undecodable_media: no such rule, or one whose samples"):
        ValidateConfig(severity={"undecodable_media": "warn"})


def test_a_duplicate_has_the_turns_contents_and_parts_of_an_earlier_sample_of_either_split() -> None:
    one = _sample()
    moved = replace(one, sample_id="s/1", media=[Media("image", "c.png"), one.media[1]])
    moved = replace(moved, probes={**one.probes, ("image", "c.png"): IMAGE})
    assert moved.fingerprint == one.fingerprint
    assert duplicate(one, "s/0") is None
    assert duplicate(moved, "s/0") == "has the same turns and files as s/0"
    part = replace(one, media=[one.media[0], PART])
    assert replace(one, split="eval").fingerprint == one.fingerprint
    for other in (_sample(clip=replace(CLIP, content_hash="h9")), part):
        assert other.fingerprint != one.fingerprint


def test_the_separators_of_windows_are_named() -> None:
    use = Media("image", "pics\\a.png")
    found = rules.broken_by_media([use], {use[:2]: Probe(missing="does not exist")}, CONFIG)
    detail = "image 'pics\\a.png' does not exist: it is written with the separators of Windows; write / instead"
    assert found[0] == ("missing_media", detail)
