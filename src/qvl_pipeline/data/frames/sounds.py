"""Sounds that samples refer to, and reading them: what the frame store is for clips."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from qvl_pipeline.config import SampleConfig
from qvl_pipeline.families.hearing import FEWEST_SPECTRA, Hearing
from qvl_pipeline.media.frames.decode_worker import ClipError
from qvl_pipeline.media.frames.store import clip_id
from qvl_pipeline.media.opening import ChangedMediaError, open_media
from qvl_pipeline.media.sound.decoding import SoundError, read_sound
from qvl_pipeline.media.sound.log_mel import log_mel
from qvl_pipeline.media.sound.store import StoredSound


@dataclass(frozen=True)
class Sound:
    """A sound that samples refer to.

    Attributes:
        type: `audio`, or `video` for what is heard with a clip.
        path: Its file.
        start: First second, or `None`.
        end: Last second, or `None`.
        content_hash: Sha256 of the file.
    """

    type: str
    path: str
    start: float | None
    end: float | None
    content_hash: str

    @property
    def name(self) -> str:
        """Its id in the store."""
        return clip_id(self.path, self.start, self.end)


def list_sounds(valid_samples: pd.DataFrame, media_index: pd.DataFrame, sample: SampleConfig) -> list[Sound]:
    """The different sounds of all samples, in the order of their first appearance.

    Args:
        valid_samples: Samples whose media are valid.
        media_index: Every media file as probed.
        sample: Whether clips are heard too; those without a sound are not.
    """
    heard = media_index[media_index["sample_rate"].notna()]
    facts = {(row.type, row.path): row.content_hash for row in heard.itertuples()}
    kinds = ("audio", "video") if sample.use_audio_in_video else ("audio",)
    media = (item for items in valid_samples["media"] for item in items if item["type"] in kinds)
    uses = dict.fromkeys((item["type"], item["path"], item["start"], item["end"]) for item in media)
    return [Sound(*use, facts[use[:2]]) for use in uses if use[:2] in facts]


def read_stored(sound: Sound, *, hearing: Hearing, materialize: bool) -> StoredSound:
    """Decode a sound, and make its spectrogram.

    Args:
        sound: The sound.
        hearing: How the model hears.
        materialize: Return the spectrogram too, and not its length alone.

    Raises:
        ClipError: The file is another one than was validated, or the sound cannot be decoded, or is too long or short.
    """
    limits = {"rate": hearing.sampling_rate, "longest_s": hearing.longest_s}
    try:
        with open_media(sound.path, content_hash=sound.content_hash) as file:
            samples = read_sound(file, sound.start, sound.end, **limits)
    except ChangedMediaError as error:
        raise ClipError("clip_changed", str(error)) from error
    except SoundError as error:
        raise ClipError("sound_unfit", f"its sound cannot be used: {error}") from error
    spectra = hearing.spectra(len(samples))
    if spectra < FEWEST_SPECTRA:
        least = FEWEST_SPECTRA * hearing.hop_length / hearing.sampling_rate
        raise ClipError(
            "sound_unfit", f"its sound lasts {len(samples) / hearing.sampling_rate:g} s, and {least:g} s make a token"
        )
    return StoredSound(**vars(sound), spectra=spectra, log_mel=log_mel(samples, hearing) if materialize else None)
