"""What the preflight says of every profile on the hardware that it names, and how long it takes to say it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvl_pipeline.preflight.asking import ask
from qvl_pipeline.preflight.hardware import GIB
from qvl_pipeline.preflight.verdict import Plan
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.loader import ProfileLoader
from qvl_pipeline.settings import CONFIG_LOADER_ARGS

CONF = Path(__file__).parents[2] / "conf"
_HARDWARE = re.compile(r"^# Hardware: (\S+?),? ", re.M)


def named_hardware() -> dict[str, str]:
    """Return the hardware that each profile names in a comment."""
    found = {path.parent.name: _HARDWARE.search(path.read_text()) for path in sorted(CONF.glob("*/parameters.yml"))}
    return {profile: match[1] for profile, match in found.items() if match}


def answer(profile: str, hardware: str) -> dict[str, Any]:
    """Ask for a profile on some hardware, without a plan."""
    loader = ProfileLoader(str(CONF), env=profile, **CONFIG_LOADER_ARGS)
    blocks = check_parameters(loader["parameters"], loader.origins)
    preflight = blocks["preflight"].model_copy(update={"hardware": hardware})
    nowhere = Path("nowhere")
    names = ("sample", "model", "batching", "train", "adapter")
    return ask(Plan(None, None, nowhere), *(blocks[name] for name in names), preflight, nowhere / "base", [])


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row for each profile that names its hardware."""
    for profile, hardware in named_hardware().items():
        started = time.process_time()
        report = answer(profile, hardware)
        memory = report.get("memory", {})  # nothing is foretold of some families
        yield {
            "profile": profile,
            "hardware": hardware,
            "verdict": report["verdict"],
            "needed_gib": memory["needed_bytes"] / GIB if memory else None,
            "spare_gib": memory["spare_bytes"] / GIB if memory else None,
            "changes": " + ".join(change["parameters"] for change in report.get("changes", [])),
            "cpu_seconds": time.process_time() - started,
        }
