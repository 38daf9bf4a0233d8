"""The embedded dataset, built only when it is not there already."""

from __future__ import annotations

import logging
from pathlib import Path

import orjson

import qvl_pipeline.demo
from qvl_pipeline.config import DigitsDemoConfig
from qvl_pipeline.data.sources.raw import hash_code, hash_folder
from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import turn

MARKER = "built.json"

_LOGGER = logging.getLogger(__name__)


def ensure_digits(demo: DigitsDemoConfig) -> str:
    """Build the dataset of digits, unless the same builder left it there with the same settings, unharmed.

    Args:
        demo: Folder and settings.

    Returns:
        Hash of all of its files.

    Raises:
        UserError: The folder holds something else.
    """
    folder = Path(demo.folder)
    marker = folder / MARKER
    (package,) = qvl_pipeline.demo.__path__
    plan = {"settings": demo.model_dump(), "builder": hash_code(Path(package))}
    # Of two first runs, the second finds what the first has drawn.
    with turn(folder.parent, lambda: _LOGGER.info("Waiting for another run, which draws into %s", folder.parent)):
        if marker.exists():
            content = hash_folder(folder, exclude=MARKER)
            if marker.read_bytes() == orjson.dumps(plan | {"content": content}):
                return content
        _build(folder, demo)
        content = hash_folder(folder, exclude=MARKER)
        marker.write_bytes(orjson.dumps(plan | {"content": content}))
        return content


def _build(folder: Path, demo: DigitsDemoConfig) -> None:
    from qvl_pipeline.demo.digits import TRAIN_WEIGHTS, build_digits

    _LOGGER.info("Drawing %d samples of digits into %s", demo.train_samples + demo.eval_samples, folder)
    try:
        build_digits(
            folder,
            seed=demo.seed,
            train_samples=demo.train_samples,
            eval_samples=demo.eval_samples,
            kinds=demo.kinds or TRAIN_WEIGHTS,
        )
    except FileExistsError as error:
        raise UserError(f"ingest.demo.folder: {error}") from error
