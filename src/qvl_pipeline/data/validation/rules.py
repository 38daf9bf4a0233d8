"""What a valid sample is: one small function for each rule, which returns what is wrong, or `None`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import orjson

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.messages import Media, Message
from qvl_pipeline.data.rejection import quote
from qvl_pipeline.families.tokens import CONTROL_TOKENS
from qvl_pipeline.media.probe import Probe

# Which turns may follow those of a role; a turn with tool calls is followed by their results. A call may also be
# written in a text.
_FOLLOWED_BY = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}

# Two of a billion different samples have the same with a probability of 1e-21.
FINGERPRINT_BYTES = 16

Broken = tuple[str, str]  # rule, detail
Probes = Mapping[tuple[str, str], Probe]  # by (type, path)


@dataclass(frozen=True)
class Sample:
    """What rules look at.

    Attributes:
        sample_id: Its id.
        split: `train`, `eval` or `benchmark`.
        messages: Turns in canonical form.
        media: Uses of media files, in reading order.
        probes: What was found in the files, by (type, path).
    """

    sample_id: str
    split: str
    messages: list[Message]
    media: list[Media]
    probes: Probes

    @property
    def fingerprint(self) -> bytes:
        """Digest of turns, content of the files, and the parts of clips that are used."""
        uses = [[content_hash, *use[2:]] for content_hash, use in zip(self.content_hashes, self.media, strict=True)]
        return hashlib.sha256(orjson.dumps([self.messages, uses])).digest()[:FINGERPRINT_BYTES]

    @property
    def content_hashes(self) -> list[str | None]:
        """Content hash of each medium; `None` of a file that cannot be read."""
        return [self.probes[use[:2]].content_hash for use in self.media]


def roles(sample: Sample, config: ValidateConfig) -> str | None:
    """Turns of user and assistant alternate, after at most one system turn; results of tools follow calls."""
    given = [message["role"] for message in sample.messages]
    if given == ["text"]:
        return None
    first = 1 if given[:1] == ["system"] else 0
    expected = ("user",)
    for number, message in enumerate(sample.messages[first:], start=first):
        role = message["role"]
        if role not in expected:
            return f"turn {number} has the role {quote(role)}, not {' or '.join(map(repr, expected))}"
        expected = ("tool",) if message.get("tool_calls") else _FOLLOWED_BY[role]
    return None


def empty_turn(sample: Sample, config: ValidateConfig) -> str | None:
    """Every turn holds a medium, a tool call, or a text that is not blank; only a tool may return nothing."""
    for number, message in enumerate(sample.messages):
        if message["role"] == "tool" or message.get("tool_calls"):
            continue
        if not any(item["type"] != "text" or item["text"].strip() for item in message["content"]):
            return f"turn {number} ({message['role']}) says nothing"
    return None


def no_assistant_turn(sample: Sample, config: ValidateConfig) -> str | None:
    """There is an assistant turn that is trained on, or nothing could be learnt from the sample."""
    said = [message for message in sample.messages if message["role"] in ("assistant", "text")]
    if any(message.get("trained", True) for message in said):
        return None
    return f"none of the {len(sample.messages)} turns is the assistant's" + (" and trained on" if said else "")


def placeholder_mismatch(sample: Sample, config: ValidateConfig) -> str | None:
    """Images, videos and sounds in the messages are as many, and in the same order, as the files."""
    asked = [item["type"] for message in sample.messages for item in message["content"] if item["type"] != "text"]
    given = [use.type for use in sample.media]
    if asked == given:
        return None
    hint = "" if asked or not given else f": write <{given[0]}> into the text, where the file is to be seen"
    return f"the messages hold {_count(asked)}, but the files are {_count(given)}{hint}"


def reserved_token(sample: Sample, config: ValidateConfig) -> str | None:
    """No text holds a token that builds the prompt, nor do the texts of a turn when they are joined."""
    for number, message in enumerate(sample.messages):
        text = "".join(item["text"] for item in message["content"] if item["type"] == "text")
        if others := {key: value for key, value in message.items() if key not in ("role", "content", "trained")}:
            text += orjson.dumps(others).decode()
        if "<|" in text and (found := [token for token in CONTROL_TOKENS if token in text]):
            return f"the text of turn {number} holds {found[0]}"
    return None


def too_long(sample: Sample, config: ValidateConfig) -> str | None:
    """Texts are no longer than `max_text_chars`, all turns together."""
    length = sum(len(text) for _, text in _texts(sample))
    if length <= config.max_text_chars:
        return None
    return f"its texts have {length} characters, more than max_text_chars ({config.max_text_chars})"


def missing_media(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """The file exists."""
    if probe.missing and "\\" in use.path:
        return f"{probe.missing}: it is written with the separators of Windows; write / instead"
    return probe.missing


def empty_media(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """The file holds something."""
    return "is empty (0 bytes)" if probe.size_bytes == 0 else None


def undecodable_media(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """The file can be decoded within `probe_timeout_s`: an image or sound whole, of a clip the first and last frame."""
    return probe.failure and f"cannot be decoded: {probe.failure}"


def too_few_frames(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A clip, or the part of it that is used, has at least `min_video_frames` frames."""
    if use.type != "video" or probe.n_frames is None:
        return None
    frames, part = probe.n_frames, ""
    if probe.fps and (use.start is not None or use.end is not None):
        first = math.ceil((use.start or 0.0) * probe.fps)
        last = probe.n_frames - 1 if use.end is None else min(math.floor(use.end * probe.fps), probe.n_frames - 1)
        frames = max(last - first + 1, 0)
        part = _part(use)
    if frames >= config.min_video_frames:
        return None
    return f"has {frames} frames{part}, fewer than min_video_frames ({config.min_video_frames})"


def unknown_fps(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A clip has timestamps, and from them a frame rate. Of a picture too large to decode nothing is known."""
    if use.type != "video" or probe.fps or probe.width is None or _pixels(probe) > config.max_image_pixels:
        return None
    return "has no timestamps: remux it, e.g. with ffmpeg -fflags +genpts"


def image_too_large(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """An image or frame has at most `max_image_pixels` pixels."""
    if _pixels(probe) <= config.max_image_pixels:
        return None
    return f"has {probe.width} x {probe.height} pixels, more than max_image_pixels ({config.max_image_pixels})"


def aspect_ratio(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """The longest side is at most `max_aspect_ratio` times the shortest."""
    sides = sorted((probe.width or 1, probe.height or 1))
    if sides[1] <= config.max_aspect_ratio * sides[0]:
        return None
    return f"has {probe.width} x {probe.height} pixels, a ratio above max_aspect_ratio ({config.max_aspect_ratio:g})"


def absurd_fps(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """The mean frame rate of a clip is between `min_fps` and `max_fps`: else its timestamps are wrong."""
    if use.type != "video" or not probe.fps or config.min_fps <= probe.fps <= config.max_fps:
        return None
    return f"has {probe.fps:g} frames a second, outside of min_fps ({config.min_fps:g}) to max_fps ({config.max_fps:g})"


def duration_mismatch(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """What is in a clip or sound reaches to the end that its file claims, within `max_duration_mismatch`."""
    claimed, found = probe.declared_duration_s, probe.duration_s
    if claimed is None or found is None:
        return None
    if claimed - found <= max(1.0, config.max_duration_mismatch * claimed):
        return None
    what = "frames end" if use.type == "video" else "samples end"
    return f"claims {claimed:.1f} s, but its {what} after {found:.1f} s: the file is cut off or damaged"


def variable_frame_rate(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """Frames follow each other at a steady pace; where they do not, it is noted. Each keeps its own timestamp."""
    if use.type != "video" or probe.longest_gap is None or probe.longest_gap < 1.5:
        return None
    return f"has a variable frame rate: its longest gap between two frames is {probe.longest_gap:.1f} times the usual"


def deep_image(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """An image has 8 bits a channel: Pillow, and so every Qwen-VL processor, turns larger values white."""
    if use.type != "image" or probe.mode is None or probe.mode.split(";")[0] not in ("I", "F"):
        return None
    return f"has more than 8 bits a channel (mode {probe.mode}) and would turn nearly white: convert it to 8 bits"


def animated_image(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """An image file holds one picture. Of an animation, or of pages, the first is used: what it moves is not seen."""
    # The further ones of a JPEG (`mpo`) are what cameras add: a preview, a depth or gain map.
    if use.type != "image" or probe.n_frames == 1 or probe.codec in (None, "mpo"):
        return None
    pictures = probe.n_frames or "several"
    return f"holds {pictures} pictures, of which the first alone is used: to show all of them, make a video of it"


def absurd_sample_rate(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A sound has between `min_sample_rate` and `max_sample_rate` samples a second: else its header is wrong."""
    if use.type != "audio" or probe.sample_rate is None:
        return None
    if config.min_sample_rate <= probe.sample_rate <= config.max_sample_rate:
        return None
    return (
        f"has {probe.sample_rate} samples a second, outside of min_sample_rate ({config.min_sample_rate}) to "
        f"max_sample_rate ({config.max_sample_rate})"
    )


def too_many_channels(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A sound has at most `max_channels` channels."""
    if use.type != "audio" or (probe.channels or 0) <= config.max_channels:
        return None
    return f"has {probe.channels} channels, more than max_channels ({config.max_channels})"


def sound_too_long(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A sound, or the part of it that is used, lasts at most `audio_max_seconds`."""
    seconds = _heard_seconds(use, probe)
    if seconds is None or seconds <= config.audio_max_seconds:
        return None
    return (
        f"lasts {seconds:.1f} s{_part(use)}, longer than audio_max_seconds ({config.audio_max_seconds:g}): use a part "
        "of it, by audio_start and audio_end"
    )


def sound_too_short(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A sound, or the part of it that is used, lasts at least `audio_min_seconds`."""
    seconds = _heard_seconds(use, probe)
    if seconds is None or seconds >= config.audio_min_seconds:
        return None
    return f"lasts {seconds:.3f} s{_part(use)}, shorter than audio_min_seconds ({config.audio_min_seconds:g})"


def silent_sound(use: Media, probe: Probe, config: ValidateConfig) -> str | None:
    """A sound is louder somewhere than `audio_min_peak`."""
    if use.type != "audio" or probe.peak is None or probe.peak >= config.audio_min_peak:
        return None
    return f"is silent: its peak is {probe.peak:.1e} of full scale, below audio_min_peak ({config.audio_min_peak:g})"


def duplicate(sample: Sample, first: str) -> str | None:
    """No other sample has the same turns and the same content of its files: of either split, for texts leak too.

    Args:
        sample: Sample of any split.
        first: Id of the first sample that has its fingerprint.
    """
    return None if first == sample.sample_id else f"has the same turns and files as {first}"


def leakage(sample: Sample, held_out: Mapping[str | None, str]) -> str | None:
    """No training sample uses a file whose content is in a valid sample of the eval split, or of a benchmark.

    Args:
        sample: Sample of any split.
        held_out: By content hash of a file, a valid sample that is evaluated and uses it.
    """
    for use, content_hash in zip(sample.media, sample.content_hashes, strict=True):
        if sample.split == "train" and (other := held_out.get(content_hash)):
            return f"{use.type} '{use.path}' is also in the eval sample {other}"
    return None


# In the order in which they are applied; the first that a sample breaks names it.
SAMPLE_RULES: dict[str, Callable[[Sample, ValidateConfig], str | None]] = {
    rule.__name__: rule
    for rule in (roles, empty_turn, no_assistant_turn, placeholder_mismatch, reserved_token, too_long)
}
MEDIA_RULES: dict[str, Callable[[Media, Probe, ValidateConfig], str | None]] = {
    rule.__name__: rule
    for rule in (
        missing_media,
        empty_media,
        undecodable_media,
        too_few_frames,
        unknown_fps,
        absurd_fps,
        duration_mismatch,
        variable_frame_rate,
        image_too_large,
        aspect_ratio,
        deep_image,
        animated_image,
        absurd_sample_rate,
        too_many_channels,
        sound_too_long,
        sound_too_short,
        silent_sound,
    )
}
RULES = (*SAMPLE_RULES, *MEDIA_RULES, leakage.__name__, duplicate.__name__)


def broken_by_media(media: list[Media], probes: Probes, config: ValidateConfig) -> list[Broken]:
    """Return the rules that any of the media breaks, each with the detail of the first that does."""
    found = []
    for name, rule in MEDIA_RULES.items():
        details = ((use, rule(use, probes[use[:2]], config)) for use in media)
        if broken := next(((use, detail) for use, detail in details if detail), None):
            found.append((name, f"{broken[0].type} '{broken[0].path}' {broken[1]}"))
    return found


def broken_by_sample(sample: Sample, config: ValidateConfig) -> list[Broken]:
    """Return the rules that a sample breaks, leakage and duplicate apart, each with the detail."""
    found = [(name, detail) for name, rule in SAMPLE_RULES.items() if (detail := rule(sample, config))]
    return found + broken_by_media(sample.media, sample.probes, config)


def first_error(broken: Iterable[Broken], config: ValidateConfig) -> Broken | None:
    """Return the first of the broken rules that is an error; it names the sample in the quarantine."""
    return next((found for found in broken if config.severity_of(found[0]) == "error"), None)


def warnings(broken: Iterable[Broken], config: ValidateConfig) -> list[Broken]:
    """Return those of the broken rules that only warn."""
    return [found for found in broken if config.severity_of(found[0]) == "warn"]


def _heard_seconds(use: Media, probe: Probe) -> float | None:
    if use.type != "audio" or probe.duration_s is None:
        return None
    end = probe.duration_s if use.end is None else min(use.end, probe.duration_s)
    return max(0.0, end - (use.start or 0.0))


def _part(use: Media) -> str:
    if use.start is None and use.end is None:
        return ""
    return f" from second {use.start or 0.0:g} to {'its end' if use.end is None else f'second {use.end:g}'}"


def _texts(sample: Sample) -> Iterator[tuple[int, str]]:
    for number, message in enumerate(sample.messages):
        yield from ((number, item["text"]) for item in message["content"] if item["type"] == "text")


def _count(types: list[str]) -> str:
    return ", ".join(f"{len(list(run))} x {kind}" for kind, run in groupby(types)) or "none"


def _pixels(probe: Probe) -> int:
    return (probe.width or 0) * (probe.height or 0)
