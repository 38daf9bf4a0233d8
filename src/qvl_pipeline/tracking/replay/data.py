"""The data of a recorded run, put into the worktree that repeats it: found by digest, never by name alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from kedro.config import OmegaConfigLoader

from qvl_pipeline.tracking.lineage.data_version import data_version
from qvl_pipeline.tracking.lineage.dvc_cache import link_by_md5, link_file
from qvl_pipeline.tracking.replay.repeatable import RecordedRun

RAW = Path("data/01_raw")
LINKED, FETCHED, MADE_AGAIN = "linked", "from DVC", "made again"


def get_data(project: Path, folder: Path, profile: str, run: RecordedRun, inputs: dict[str, str]) -> dict[str, str]:
    """Put the raw data and the inputs of a run into the worktree, without copying them.

    Args:
        project: Root of the project.
        folder: The worktree.
        profile: Profile of the worktree, with the names and parameters of the run.
        run: The run.
        inputs: Digest of every input.

    Returns:
        How each input was got: `linked` (it is in the project as the run read it), `from DVC` (its cache or remote has
        that md5), or `made again`, which is then left to the stages before, all of them, and holds for every input.
    """
    catalog = OmegaConfigLoader(str(folder / "conf"), base_env="base", env=profile, merge_strategy={"globals": "soft"})[
        "catalog"
    ]
    paths = {name: Path(catalog[name]["filepath"]) for name in sorted(inputs) if name in catalog}
    raw_is_same = _get_raw(project, folder, run, project / catalog["raw_manifest"]["filepath"])
    how = {name: _get(project, folder, path, inputs[name]) for name, path in paths.items()} if raw_is_same else {}
    if None in how.values() or not raw_is_same:
        # The stages before write into these places: not into what they are linked with.
        for path in paths.values():
            _remove(folder / path)
        return dict.fromkeys(paths, MADE_AGAIN)
    return how


def _get(project: Path, folder: Path, path: Path, digest: str) -> str | None:
    kind, _, version = digest.partition(":")
    if (project / path).exists() and data_version(project / path).digest == digest:
        _link(project / path, folder / path)
        return LINKED
    return FETCHED if kind == "md5" and link_by_md5(project, version, folder / path) else None


def _get_raw(project: Path, folder: Path, run: RecordedRun, manifest: Path) -> bool:
    """Put raw data into the worktree: as it is now, or as the run's commit has it by `dvc add`.

    Returns:
        Whether it is known to be what the run read.
    """
    same = manifest.exists() and json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"] == run.data_fingerprint
    ingest = run.parameters.get("ingest") or {}
    demo = ingest.get("demo")
    # The embedded dataset is drawn again where it may be another one.
    left_out = [manifest.name] if same or not demo else [manifest.name, Path(demo["folder"]).name]
    if (project / RAW).is_dir():
        _link(project / RAW, folder / RAW, left_out)
    if same:
        # A copy: `ingest` writes into it.
        shutil.copy(manifest, folder / manifest.relative_to(project))
        return True
    versions = [
        pointer.with_name(out["path"])
        for pointer in sorted((folder / RAW).rglob("*.dvc"))
        for out in yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"]
        if link_by_md5(project, out["md5"], pointer.with_name(out["path"]))
    ]
    sources = [folder / source["path"] for source in ingest.get("datasets", [])]
    return bool(sources) and all(any(source.is_relative_to(at) for at in versions) for source in sources)


def _link(source: Path, target: Path, left_out: list[str] | None = None) -> None:
    """Repeat a file or folder by hard links, which take no space."""
    if source.is_dir():
        ignore = shutil.ignore_patterns(*left_out or [])
        shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True, ignore=ignore)
    else:
        link_file(source, target)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
