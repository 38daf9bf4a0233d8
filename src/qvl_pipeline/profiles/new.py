"""A new profile: the values of another one, and a dataset that was tried."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from qvl_pipeline.config import DatasetSource
from qvl_pipeline.data.sources.detection import detect_type
from qvl_pipeline.data.sources.remote import is_url
from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.profiles.loader import BASE, LOCAL, profile_names
from qvl_pipeline.profiles.trial import Trial, try_source

GLOBALS, PARAMETERS = "globals.yml", "parameters.yml"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# Folders of conf/ that are no profiles; `replay` is the one that repeats a run.
_RESERVED = (BASE, LOCAL, "replay")
# Limits that fit the short questions and answers of the embedded example, and would cut or refuse others.
_OF_THE_EXAMPLE = {"validate": ("max_text_chars",), "evaluate": ("max_new_tokens",)}
_RAW = Path("data/01_raw")


def new_profile(
    project: Path, name: str, like: str, data: str, data_folder: str | None, say: Callable[[str], None]
) -> None:
    """Write `globals.yml` and `parameters.yml` of a profile; its dataset has the profile's name.

    Args:
        project: Root of the project, which becomes the current folder.
        name: Name of the profile.
        like: Profile whose values it takes, but for `ingest`.
        data: File of rows, or folder of such files.
        data_folder: Folder where media paths start; `None` is that of the data.
        say: Is called with each line that is to be shown.

    Raises:
        UserError: There is such a profile or none like that, the data cannot be used, or no row of those that were
            tried. Nothing is written then.
    """
    conf = project / "conf"
    check_name(conf, name)
    _check_like(conf, like)
    source = _source(project, data, data_folder)
    with contextlib.chdir(project):  # where paths in parameters start
        trial = try_source(source)
    _show(trial, source, say)
    with contextlib.ExitStack() as undo:
        (conf / name).mkdir()
        undo.callback(shutil.rmtree, conf / name)
        _write_globals(conf, name, like)
        _write_parameters(conf, name, like, source, trial.eval_fraction)
        undo.pop_all()
    say(
        f"conf/{name} is made, like {like}. Next:\n"
        f"  kedro run --env {name} --pipelines ingest,validate   # what is in the data, and what is wrong with it\n"
        f"  kedro run --env {name}                               # everything\n"
        "For `dvc repro`, add to params.yaml, under `datasets` and under `profiles`:\n"
        f"  {name}: {{env: {name}, raw: {_raw(source)}}}\n"
        f"  {name}: {name}"
    )


def check_name(conf: Path, name: str) -> None:
    """Refuse a name for a new profile.

    Raises:
        UserError: It is none, is taken, or is the name of another profile's dataset.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' is no name for a profile: take letters, digits, _ and -, a letter first")
    if name in _RESERVED:
        raise UserError(f"'{name}' cannot be the name of a profile, conf/{name} is something else: take another")
    if (conf / name).exists():
        raise UserError(f"there is a profile '{name}' already: take another name, or edit conf/{name}/{PARAMETERS}")
    for other in profile_names(conf):
        if _globals(conf, other).get("dataset") == name:
            raise UserError(f"'{name}' is the dataset of the profile '{other}', and its files would mix: take another")


def _check_like(conf: Path, like: str) -> None:
    known = [name for name in profile_names(conf) if (conf / name / PARAMETERS).is_file()]
    if like not in known:
        hint = did_you_mean(like, known, f"the profiles are {', '.join(known)}")
        raise UserError(f"--like: there is no profile '{like}': {hint}")


def _source(project: Path, data: str, data_folder: str | None) -> DatasetSource:
    for given in (data, data_folder or ""):
        if is_url(given):
            raise UserError(
                f"'{given}' is a URL: make the profile with a local file of some of its rows, and then write the URL "
                f"into its {PARAMETERS}"
            )
    path = Path(data).absolute()
    kind = detect_type(path)
    folder = Path(data_folder).absolute() if data_folder else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UserError(f"--data-folder: the folder '{data_folder}' does not exist")
    places = {"path": _from(project, path), "data_folder": _from(project, folder)}
    # The model takes the name from the file's.
    return DatasetSource.model_validate({**places, "data_type": kind})


def _from(project: Path, path: Path) -> str:
    """Return a path as parameters state it: from the project root on, where it is inside of it."""
    normal, root = Path(os.path.normpath(path)), project.absolute()
    return normal.relative_to(root).as_posix() if normal.is_relative_to(root) else str(normal)


def _show(trial: Trial, source: DatasetSource, say: Callable[[str], None]) -> None:
    say(f"{source.path}: {source.data_type}, about {trial.total:,} rows, of which the first are")
    for number, row in enumerate(trial.rows):
        say(f"  row {number}: {row}")
    if all(row.problem for row in trial.rows):
        what = f"none of the first {len(trial.rows)} rows" if trial.rows else "no row"
        raise UserError(
            f"{what} of '{source.path}' can be used, so nothing is written: mend the file (docs/data.md has "
            "the forms of rows), or name the folder where its media paths start with --data-folder"
        )
    if trial.eval_fraction is None:
        say("eval split: as the rows say")
    elif not trial.eval_samples:
        say("eval split: the rows cannot be told apart by their first medium; give them a column `split` (train, eval)")
    else:
        say(f"eval split: about {trial.eval_samples:,} rows (ingest.eval_fraction {trial.eval_fraction:g})")


def _globals(conf: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((conf / name / GLOBALS).read_text(encoding="utf-8")) or {}


def _write_globals(conf: Path, name: str, like: str) -> None:
    values = {**_globals(conf, like), "profile": name, "dataset": name}
    head = f"# Made by `kedro profile new {name} --like {like}`. Results are in data/*/{name}/.\n"
    (conf / name / GLOBALS).write_text(head + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _write_parameters(conf: Path, name: str, like: str, source: DatasetSource, eval_fraction: float | None) -> None:
    editor = YAML()  # keeps comments
    editor.width, editor.preserve_quotes = 120, True
    editor.indent(mapping=2, sequence=4, offset=2)
    blocks = editor.load((conf / like / PARAMETERS).read_text(encoding="utf-8"))
    if (blocks.get("ingest") or {}).get("demo"):
        for block, key in ((block, key) for block, keys in _OF_THE_EXAMPLE.items() for key in keys):
            (blocks.get(block) or {}).pop(key, None)
    entry = CommentedMap(source.model_dump(include={"name", "path", "data_folder", "data_type"}))
    entry.fa.set_flow_style()
    ingest = {"datasets": [entry]}
    if eval_fraction is not None:
        ingest["eval_fraction"] = eval_fraction
    if "ingest" in blocks:
        blocks["ingest"] = ingest
    else:
        blocks.insert(0, "ingest", ingest)
    with (conf / name / PARAMETERS).open("w", encoding="utf-8") as file:
        editor.dump(blocks, file)


def _raw(source: DatasetSource) -> str:
    """Return what DVC is to watch: the data with its media, unless other datasets are there too."""
    path, folder = Path(source.path), Path(source.data_folder)
    return str(folder if path.is_relative_to(folder) and not _RAW.is_relative_to(folder) else path)
