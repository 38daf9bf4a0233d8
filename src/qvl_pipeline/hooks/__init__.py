"""What happens around every run: checks before it, turns with other runs, a line for every node."""

from __future__ import annotations

from qvl_pipeline.hooks.early_checks import EarlyChecks
from qvl_pipeline.hooks.inputs_of_training import InputsOfTraining
from qvl_pipeline.hooks.one_writer import OneWriter
from qvl_pipeline.hooks.progress import Progress

__all__ = ["EarlyChecks", "InputsOfTraining", "OneWriter", "Progress"]
