"""The environment of processes that start a Ray cluster, or work on one."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cluster_environment() -> dict[str, str]:
    """Have them import what this process does, and wait longer: on a machine that does other things, all is slower."""
    places = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
    return os.environ | {"PYTHONPATH": places, "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "200"}
