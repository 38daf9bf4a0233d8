"""Where the data stages work: on this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from qvl_pipeline.config import DataEngineConfig
from qvl_pipeline.errors import UserError


def use_runner(engine: DataEngineConfig) -> None:
    """Set Daft's runner for the rest of this process.

    Args:
        engine: Which runner, and where its cluster is.

    Raises:
        UserError: Ray is not installed, no cluster answers at `ray_address`, or Daft runs elsewhere already.
    """
    import daft
    from daft.exceptions import DaftCoreException
    from daft.runners import get_or_infer_runner_type

    join_cluster(engine)
    try:
        daft.set_runner_ray() if engine.runner == "ray" else daft.set_runner_native()
    except DaftCoreException as error:  # it can be set once only
        if get_or_infer_runner_type() != engine.runner:
            raise UserError(
                f"data_engine.runner is {engine.runner}, but this process has used another already: start a new one"
            ) from error


def join_cluster(engine: DataEngineConfig) -> None:
    """Join the Ray cluster, for as long as this process lives; nothing happens where the runner is another.

    Args:
        engine: Which runner, and where its cluster is.

    Raises:
        UserError: Ray is not installed, or no cluster answers at `ray_address`.
    """
    if engine.runner != "ray":
        return
    try:
        import ray
    except ImportError as error:
        raise UserError("data_engine.runner is ray, which is not installed: uv pip install 'ray[default]'") from error
    if ray.is_initialized():
        return
    project, address = Path.cwd(), engine.ray_address

    def enter_project() -> None:
        """Make paths in tables mean the same as here, whatever folder the cluster was started in."""
        os.chdir(project)

    ended = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address, log_to_driver=False, runtime_env={"worker_process_setup_hook": enter_project})
        finally:
            with contextlib.suppress(ValueError):  # not in the main thread, where Ray leaves it as it is
                signal.signal(signal.SIGTERM, ended)  # Ray ends this process with status 15 at it
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"data_engine.ray_address: no cluster at '{address}' ({error})") from error
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # it came while Ray joined: it is for the handler that was set before
            signal.raise_signal(signal.SIGTERM)
        raise  # where that one goes on, there is no cluster
