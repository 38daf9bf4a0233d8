"""What trainings and evaluations of a profile read while they run, kept from runs that would write it anew.

A rank, or one of its loaders, opens a shard of frames when it first needs one, minutes or hours after it has read the
index; a restarted rank opens everything again. A table that was replaced in the meantime is another one: without an
error, they would train on other data than were planned.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from qvl_pipeline.errors import UserError

logger = logging.getLogger(__name__)

# The catalog entries. The plan is not among them: a training copies it.
READ_WHILE_TRAINING = frozenset({"base_model", "tokenized_samples", "stream_samples", "video_frames"})
LOCK = ".in_use"


class InUse:
    """A run's hold of those entries of its profile: of many runs that read them, or of one that writes them.

    The lock is the operating system's, and ends with the process however that ends. On a file system without locks
    (some of clusters) it is done without.
    """

    def __init__(self, folder: Path, *, writes: Iterable[str], profile: str) -> None:
        """Take hold, if nobody is in the way.

        Args:
            folder: A folder that only this profile writes to.
            writes: Those of the entries that this run writes; the others it reads.
            profile: Name of the profile, for messages.

        Raises:
            UserError: Another run writes what this one reads, or reads or writes what this one writes.
        """
        self._writing = set(writes)
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_EX if self._writing else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.end()
            raise UserError(_refusal(profile, writes=bool(self._writing))) from error
        except OSError as error:
            logger.info("%s cannot be locked (%s): do not run 'sample' or 'tokenize' under a training", folder, error)

    def written(self, name: str) -> None:
        """Let other runs read, once the last of the entries is written."""
        if name in self._writing:
            self._writing.discard(name)
            if not self._writing:
                try:
                    fcntl.flock(self._handle, fcntl.LOCK_SH)
                except OSError as error:
                    logger.debug("no lock to share: %s", error)

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
