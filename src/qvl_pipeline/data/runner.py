"""Where Daft works on rows: in this process, or on a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path

import daft
from daft.exceptions import DaftCoreException
from daft.runners import get_or_infer_runner_type

from qvl_pipeline.config import DataEngineConfig
from qvl_pipeline.errors import UserError


def use_runner(engine: DataEngineConfig) -> None:
    """Set Daft's runner for the rest of this process.

    Args:
        engine: Which runner, and where its cluster is.

    Raises:
        UserError: Ray is not installed, no cluster answers at `ray_address`, or Daft runs elsewhere already.
    """
    if engine.runner == "ray":
        _join_ray(engine.ray_address)
    try:
        daft.set_runner_ray() if engine.runner == "ray" else daft.set_runner_native()
    except DaftCoreException as error:  # it can be set once only
        if get_or_infer_runner_type() != engine.runner:
            raise UserError(
                f"data_engine.runner is {engine.runner}, but this process has used another already: start a new one"
            ) from error


def _join_ray(address: str | None) -> None:
    try:
        import ray
    except ImportError as error:
        raise UserError("data_engine.runner is ray, which is not installed: pip install 'qvl-pipeline[ray]'") from error
    if ray.is_initialized():
        return
    project = Path.cwd()

    def enter_project() -> None:
        """Make paths in tables mean the same as here, whatever folder the cluster was started in."""
        os.chdir(project)

    try:
        ray.init(address, log_to_driver=False, runtime_env={"worker_process_setup_hook": enter_project})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"data_engine.ray_address: no cluster at '{address}' ({error})") from error
