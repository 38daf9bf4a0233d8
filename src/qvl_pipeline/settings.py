"""Kedro's settings of this project: hooks, configuration loading, telemetry off."""

from __future__ import annotations

import os
import sys

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.hooks import EarlyChecks, InputsOfTraining, OneWriter, Progress
from qvl_pipeline.profiles.loader import BASE, ProfileLoader
from qvl_pipeline.profiles.resolvers import project_path, tracking_uri
from qvl_pipeline.tracking.mlflow.hook import MlflowHook
from qvl_pipeline.training.hook import PublicationHook

# Read by MLflow, Daft and huggingface_hub when they are imported. Kedro reads `.telemetry`, DVC its own config.
ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DAFT_SHOW_QUERY_ID": "false",
    # The tables that MLflow makes in a new database are nobody's news.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It prints the server's URL, with the login that may be in it.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A tracking server that is down is not waited for; by default, every call to it takes four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # Parallel downloads of base models, as in the launcher's processes.
    "HF_XET_HIGH_PERFORMANCE": "1",
}
if not sys.stderr.isatty():
    # Bars of loading and saving weights; in a log file every redraw would be kept.
    ENVIRONMENT["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

# The later ones are called first: a run has its turn to write before it takes hold of what it writes.
HOOKS = (EarlyChecks(), InputsOfTraining(), OneWriter(), Progress(), PublicationHook(), MlflowHook(BLOCKS))

# Installed beside our hook, kedro-mlflow would record every run twice. The name is the distribution's, underscore and
# all: "kedro-mlflow" disables nothing.
DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow",)

CONFIG_LOADER_CLASS = ProfileLoader
CONFIG_LOADER_ARGS = {
    "base_env": BASE,
    "default_run_env": "tiny_qwen3_vl",
    "config_patterns": {"mlflow": ["mlflow.yml"]},
    # A profile names only what it changes; Kedro's default replaces whole blocks.
    "merge_strategy": {"parameters": "soft", "globals": "soft", "mlflow": "soft"},
    "custom_resolvers": {"qvl.project_path": project_path, "qvl.tracking_uri": tracking_uri},
}
