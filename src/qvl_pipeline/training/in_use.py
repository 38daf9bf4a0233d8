"""What trainings and evaluations of a profile read while they run, kept from runs that would write it anew.

A rank, or one of its loaders, opens a shard of frames when it first needs one, minutes or hours after it has read the
index; a restarted rank opens everything again. A table that was replaced in the meantime is another one: without an
error, they would train on other data than were planned.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import relock

# The catalog entries. The plan is not among them: a training copies it.
READ_WHILE_TRAINING = frozenset({"base_model", "tokenized_samples", "stream_samples", "video_frames"})
LOCK = ".in_use"


class InUse:
    """A run's hold of those entries of its profile: of many runs that read them, or of one that writes them.

    The lock is the operating system's, and ends with the process however that ends; without locks (on some file systems
    of clusters) it holds nothing. Runs that write wait for each other elsewhere, stage by stage.
    """

    def __init__(self, folder: Path, profile: str) -> None:
        """Hold nothing yet.

        Args:
            folder: A folder that only this profile writes to; made when missing.
            profile: Name of the profile, for messages.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._profile = profile
        self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)

    def read(self) -> None:
        """Hold the entries as one of those that read them.

        Raises:
            UserError: Another run writes them.
        """
        try:
            relock(self._handle, shared=True)
        except BlockingIOError as error:
            raise UserError(_refusal(self._profile, writes=False)) from error

    def write(self) -> None:
        """Hold the entries as the only one.

        Raises:
            UserError: Another run reads them.
        """
        try:
            relock(self._handle, shared=False)
        except BlockingIOError as error:
            raise UserError(_refusal(self._profile, writes=True)) from error

    def check_that_nobody_reads(self) -> None:
        """Refuse to begin what could not write in the end. Another run that writes is no hindrance: it will be done.

        Raises:
            UserError: Another run reads them.
        """
        try:
            relock(self._handle, shared=True)
        except BlockingIOError:
            return
        self.write()
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def end(self) -> None:
        """Let go."""
        os.close(self._handle)


def _refusal(profile: str, *, writes: bool) -> str:
    if writes:
        return (
            f"another run of the profile '{profile}', a training or an evaluation maybe, is using the tables and "
            "frames that this one would write anew: wait until it has ended, or give this run a profile of its own"
        )
    return (
        f"another run of the profile '{profile}' is just writing the tables and frames that this one reads: wait until "
        "it has ended"
    )
