"""The configuration of a run, in layers: `conf/base`, the profile, `conf/local`, and `--params` over all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader
from omegaconf import OmegaConf
from yaml import MarkedYAMLError

from qvl_pipeline.errors import UserError
from qvl_pipeline.profiles.origins import Origins

BASE, LOCAL = "base", "local"


def profile_names(conf: Path) -> list[str]:
    """Return the names of the profiles of a configuration folder, sorted."""
    return sorted(path.parent.name for path in conf.glob("*/globals.yml") if path.parent.name not in (BASE, LOCAL))


class ProfileLoader(OmegaConfigLoader):
    """Kedro's loader, which knows two layers, with the person's own over them.

    Kedro itself takes `conf/local` for a profile like any other: with `--env`, it is left out without a word.
    """

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return the merged configuration of a kind: `parameters`, `catalog`, `credentials`, `globals`, `mlflow`.

        Raises:
            MissingConfigException: No layer has a file of this kind.
            UserError: A file is not YAML or JSON; it names file, line, column and what is wrong there.
        """
        if key in self:  # set by hand, in a notebook
            return super().__getitem__(key)
        try:
            return self._merged(key)
        except MarkedYAMLError as error:
            raise _located(error, self._folders, self.config_patterns[key]) from error

    def _merged(self, key: str) -> dict[str, Any]:
        missing = None
        try:
            merged = super().__getitem__(key)
        except MissingConfigException as error:
            merged, missing = {}, error
        folder = str(self.local)
        if key in self.config_patterns and self.local.is_dir():
            # With the parameters of the command line in it, as in the layers below: they win.
            own = self.load_and_merge_dir_config(folder, self.config_patterns[key], key, set(), key == "credentials")
            if own:
                return self._merge_configs(merged, own, key, folder)
        if missing is not None:
            raise missing
        return merged

    @property
    def profile(self) -> Path:
        """Folder of the profile, whether there is one or not."""
        return Path(self.conf_source) / (self.env or self.default_run_env)

    @property
    def local(self) -> Path:
        """Folder of the person's own values."""
        return Path(self.conf_source) / LOCAL

    @property
    def origins(self) -> Origins:
        """Where parameters come from."""
        return Origins(self.runtime_params or {}, self._folders)

    @property
    def _folders(self) -> list[Path]:
        """The layers of files, the one that takes precedence first."""
        return [self.local, self.profile, Path(self.conf_source) / self.base_env]


def _located(error: MarkedYAMLError, folders: Iterable[Path], patterns: Iterable[str]) -> UserError:
    """Return the error for people. Kedro's own counts lines from 0, and keeps to itself what is wrong there."""
    cause = error.__cause__ if isinstance(error.__cause__, MarkedYAMLError) else error
    named = re.search(r"file (.+?), unable to read line", str(error))
    file = Path(named[1]) if named else _first_unreadable(folders, patterns)
    begun = cause.context_mark and cause.context_mark.line != cause.problem_mark.line
    context = f"{cause.context} from line {cause.context_mark.line + 1} on" if begun else cause.context
    what = ", ".join(filter(None, (context, cause.problem)))
    if "\\t" in what:
        what = "a tab, where YAML allows only spaces: indent with spaces"
    mark = cause.problem_mark
    return UserError(f"{file}, line {mark.line + 1}, column {mark.column + 1} cannot be read: {what}")


def _first_unreadable(folders: Iterable[Path], patterns: Iterable[str]) -> Path | None:
    """Find the file of an error that Kedro passes on without saying which it is about."""
    for path in (path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))):
        try:
            OmegaConf.load(path)
        except MarkedYAMLError:
            return path
        except OSError:  # a folder, to which a pattern may come
            continue
    return None
