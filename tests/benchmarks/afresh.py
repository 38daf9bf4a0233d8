"""Benchmarks fork their ranks: from a process that has used autograd, whose threads these would miss, they cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_PROGRAM = """
import importlib, json, sys
module, function, arguments = sys.argv[1:]
result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
print("", json.dumps(result), sep="\\n")
"""


def call(module: str, function: str, **arguments: Any) -> Any:
    """Call a function of a benchmark in a new process; arguments and result are what JSON makes of them."""
    command = [sys.executable, "-c", _PROGRAM, module, function, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
