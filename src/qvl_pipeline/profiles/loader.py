"""The configuration of a run, in layers: `conf/base`, the profile, `conf/local`, and `--params` over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader

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
        """
        if key in self:  # set by hand, in a notebook
            return super().__getitem__(key)
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
        return Origins(self.runtime_params or {}, [self.local, self.profile, Path(self.conf_source) / self.base_env])
