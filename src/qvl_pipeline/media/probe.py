"""What a media file really is, found by opening and decoding it."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import av
import numpy as np
from PIL import ExifTags, Image

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.decoding import clock_start, decode_frames, open_container, read_frame_table
from qvl_pipeline.media.opening import NoFileError, OpenMedia, OutsideFolderError, hash_media, open_media, open_picture
from qvl_pipeline.media.sound.decoding import SoundError, probe_sound

# EXIF orientations that turn the picture by a quarter.
_LYING = (5, 6, 7, 8)


@dataclass(frozen=True)
class Probe:
    """Facts about a file; `None` is what could not be found out.

    Attributes:
        missing: Why there is no such file, or not in the folder where it must be.
        failure: Why it cannot be decoded.
        content_hash: Sha256 of its bytes.
        width: Width of the upright picture in pixels.
        height: Height of the upright picture in pixels.
        n_frames: Frames of a clip; pictures in an image file, of which the first is used (`None`: several).
        fps: Mean frame rate of a clip.
        duration_s: Seconds from the first frame of a clip to the end of its last; seconds of a sound.
        codec: Codec of a clip or sound, file format of an image.
        size_bytes: Bytes of the file.
        mode: Pixel format of an image, as Pillow names it (`RGB`, `L`, `I;16`).
        declared_duration_s: Seconds that the container claims for a clip's video, or a sound.
        longest_gap: Longest time between two frames of a clip over the usual (median) one; 1 is a constant frame rate.
        sample_rate: Samples a second of a sound, or of that of a clip; `None` where a clip has none.
        channels: Its channels.
        peak: Largest absolute value of a sound, the mean of its channels; 1 is full scale.
    """

    missing: str | None = None
    failure: str | None = None
    content_hash: str | None = None
    width: int | None = None
    height: int | None = None
    n_frames: int | None = None
    fps: float | None = None
    duration_s: float | None = None
    codec: str | None = None
    size_bytes: int | None = None
    mode: str | None = None
    declared_duration_s: float | None = None
    longest_gap: float | None = None
    sample_rate: int | None = None
    channels: int | None = None
    peak: float | None = None


def probe_media(path: str, kind: str, max_pixels: int, folders: Sequence[str] | None = None) -> Probe:
    """Open a file and decode it: an image or a sound whole, of a clip the first and the last frame.

    Args:
        path: File to probe.
        kind: `image`, `video` or `audio`.
        max_pixels: A picture with more pixels than this is not decoded; only its size is reported.
        folders: Real paths of the folders that it must be inside of; `None` where it may be anywhere.

    Returns:
        What was found. No file makes this raise.
    """
    try:
        with open_media(path, folders=folders) as file:
            if file.size == 0:
                return Probe(size_bytes=0)
            return _probe_open(file, kind, max_pixels)
    except (FileNotFoundError, NotADirectoryError):
        return Probe(missing="does not exist")
    except NoFileError:
        return Probe(missing="is not a file")
    except OutsideFolderError as error:
        return Probe(missing=str(error).removeprefix(f"'{path}' "))
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to itself
            return Probe(missing="does not exist")
        return Probe(failure=_reason(error))


def _probe_open(file: OpenMedia, kind: str, max_pixels: int) -> Probe:
    found = {"content_hash": hash_media(file), "size_bytes": file.size}
    probe = {"image": _probe_image, "video": _probe_video, "audio": _probe_sound}[kind]
    try:
        return replace(probe(file, max_pixels), **found)
    # Decoders raise whatever their parser stumbles over (SyntaxError, struct.error, IndexError, …): the file is bad.
    except Exception as error:
        return Probe(failure=_reason(error), **found)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError) and not isinstance(error, SoundError):
        # Written for the stages that read media later; what they advise is to validate.
        error = error.__cause__ or UserError(str(error).partition("; run the pipeline")[0])
    return getattr(error, "strerror", None) or f"{error}" or type(error).__name__


def _probe_sound(file: OpenMedia, max_pixels: int) -> Probe:
    facts = probe_sound(file)
    return Probe(
        codec=facts.codec,
        sample_rate=facts.sample_rate,
        channels=facts.channels,
        declared_duration_s=facts.declared_s,
        duration_s=facts.duration_s,
        peak=facts.peak,
    )


def _probe_image(file: OpenMedia, max_pixels: int) -> Probe:
    # Pillow's own limit is a warning first, an exception at twice the size; ours is a parameter.
    Image.MAX_IMAGE_PIXELS = None
    with open_picture(file) as image:
        facts = Probe(width=image.width, height=image.height, n_frames=1, codec=(image.format or "").lower())
        facts = replace(facts, mode=image.mode)
        if image.width * image.height > max_pixels:
            return facts
        image.load()
        if _fits_8_bits(image):
            facts = replace(facts, mode="L")
        if image.getexif().get(ExifTags.Base.Orientation) in _LYING:
            facts = replace(facts, width=image.height, height=image.width)
        return replace(facts, n_frames=_count_pictures(image))


def _fits_8_bits(image: Image.Image) -> bool:
    """Whether a grey picture of more bits has no value that 8 bits do not hold: converting it loses nothing then."""
    if image.mode.split(";")[0] != "I":
        return False
    least, most = image.getextrema()
    return least >= 0 and most <= 255


def _count_pictures(image: Image.Image) -> int | None:
    """Count the pictures of a file whose first is sound; `None` are several of which one cannot be read."""
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # whatever the parser stumbles over, as above
        return None


def _probe_video(file: OpenMedia, max_pixels: int) -> Probe:
    with open_container(file) as container:
        if not container.streams.video:
            return Probe(failure="holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            return Probe(failure="its video stream is of no known codec: the file is cut off or damaged")
        facts = Probe(
            width=stream.width,
            height=stream.height,
            codec=stream.codec_context.name,
            declared_duration_s=_declared_duration(container, stream),
            **_heard(container),
        )
        if stream.width * stream.height > max_pixels:
            return facts
        timed = [packet.pts is not None or packet.dts is not None for packet in container.demux(stream) if packet.size]
        if not timed:
            return replace(facts, failure="holds no frames: the file is cut off or damaged")
        if not any(timed):
            return facts
    table = read_frame_table(file)
    n_frames = len(table.seconds)
    # Both are decoded; of the two only the last is kept.
    (last,) = deque(decode_frames(file, table, [0, n_frames - 1]), maxlen=1)
    return replace(
        facts,
        height=last.shape[0],
        width=last.shape[1],
        n_frames=n_frames,
        fps=table.fps,
        duration_s=float(table.seconds[-1] - table.seconds[0] + 1 / table.fps),
        longest_gap=_longest_gap(table.seconds),
    )


def _heard(container: av.container.InputContainer) -> dict[str, int]:
    """What a clip says of its sound, which nothing is decoded of here: most models do not hear it."""
    sound = container.streams.audio[0] if container.streams.audio else None
    if sound is None or sound.codec_context is None or not sound.rate:
        return {}
    return {"sample_rate": sound.rate, "channels": sound.channels}


def _declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # The container's duration is that of its longest stream, which may be the sound.
    if not container.duration or container.streams.audio:
        return None
    return container.duration / av.time_base - float(clock_start(container))  # a Matroska file says when it ends


def _longest_gap(seconds: np.ndarray) -> float | None:
    gaps = np.diff(seconds)
    usual = float(np.median(gaps)) if len(gaps) else 0.0
    return float(gaps.max()) / usual if usual > 0 else None
