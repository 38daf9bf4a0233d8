"""Answers on disk as they arrive, so that an evaluation that was cut off asks for the others only."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qvl_pipeline.evaluation.servers.client import Answer


class KeptAnswers:
    """A file of answers, one JSON object a line, by a digest of what was asked of which model."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that was cut off is none.

        Args:
            path: The file, of one model.
        """
        self._path = path
        self._answers: dict[str, Answer] = {}
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
            try:
                values = json.loads(line)
                asked = values.pop("asked")
                self._answers[asked] = Answer(**values)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def get(self, asked: str) -> Answer | None:
        """Return the answer to what was asked, if it was given."""
        return self._answers.get(asked)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the file; what `add` is given then is in it at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+", encoding="utf-8") as self._file:
            if self._path.stat().st_size:
                self._file.write("\n")  # what was cut off is a line of its own
            yield
        self._file = None

    def add(self, asked: str, answer: Answer) -> None:
        """Keep an answer. May be called by several threads."""
        line = json.dumps({"asked": asked, **dataclasses.asdict(answer)}, ensure_ascii=False)
        with self._lock:
            if self._file is None:
                raise RuntimeError("answers are added while the file is open")
            self._answers[asked] = answer
            self._file.write(f"{line}\n")
            self._file.flush()

    def remove(self) -> None:
        """Forget all, when they are of use no more: another evaluation asks anew."""
        self._path.unlink(missing_ok=True)
