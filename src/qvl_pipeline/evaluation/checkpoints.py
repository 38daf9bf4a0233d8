"""Which model is evaluated: the trained one, that of a kept step, or the average of several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from qvl_pipeline.engine.model.adapters import FOLDER as ADAPTER
from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.storage.digests import damage_in, write_digests


def chosen_model(trained: Path, kept: Path, checkpoint: str | None, average: Sequence[str], scratch: Path) -> Path:
    """Return the folder of the model to evaluate.

    Args:
        trained: Folder of the trained model.
        kept: Folder of kept checkpoints.
        checkpoint: Name of one of them, instead of the trained model.
        average: Names of several, whose weights are averaged.
        scratch: Where an average is written.

    Raises:
        UserError: A checkpoint is not there or damaged, or those to average have no weights of their own.
    """
    if average:
        return averaged([_kept(kept, name, "evaluate.average") for name in average], scratch)
    return _kept(kept, checkpoint, "evaluate.checkpoint") if checkpoint else trained


def averaged(folders: Sequence[Path], target: Path) -> Path:
    """Write the mean of several models of one architecture, computed in float32, tensor by tensor.

    Args:
        folders: Folders of the models; all other files are those of the last.
        target: Folder to make; replaced when there is one.

    Returns:
        The folder.

    Raises:
        UserError: One of them is an adapter, whose factors have no mean that means something, or has other weights.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    if adapters := [folder.name for folder in folders if (folder / ADAPTER).is_dir()]:
        raise UserError(
            f"evaluate.average: {adapters[0]} is an adapter, and the mean of its factors is not that of what they do: "
            "train with adapter.export 'merged' to average"
        )
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folders[-1], target)
    for file in sorted(target.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        try:
            for folder in folders:
                with safe_open(folder / file.name, "pt") as weights:
                    for name in weights.keys():  # noqa: SIM118
                        part = weights.get_tensor(name).float() / len(folders)
                        tensors[name] = tensors[name] + part if name in tensors else part
        except (OSError, RuntimeError) as error:
            raise UserError(f"evaluate.average: {folder.name} has other weights than {folders[-1].name}") from error
        with safe_open(file, "pt") as weights:
            tensors = {name: tensor.to(weights.get_tensor(name).dtype) for name, tensor in tensors.items()}
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    write_digests(target)
    return target


def _kept(folder: Path, name: str, parameter: str) -> Path:
    names = sorted((path.name for path in folder.glob("step-*")), key=lambda name: int(name.removeprefix("step-")))
    if name not in names:
        known = f"kept are {', '.join(names)}" if names else "none is kept: set train.keep_checkpoints, and train"
        raise UserError(f"{parameter}: there is no checkpoint '{name}': {did_you_mean(name, names, known)}")
    if damage := damage_in(folder / name):
        raise UserError(f"{parameter}: {damage}: pull it again, or train again")
    return folder / name
