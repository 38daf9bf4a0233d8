"""Secrets are masked in whatever is recorded."""

from __future__ import annotations

import os
import re
from typing import Any

_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|key|credentials?)$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
# As in presigned URLs, and in `--params`.
_SECRET_ARGUMENT = re.compile(r"(?i)((?:token|secret|password|credential|signature|api_?key|access_?key)=)[^&\s,;'\"]+")
# Shorter values of secret variables are settings, and would be found in everything.
_SHORTEST_SECRET = 8


def without_secrets(values: Any) -> Any:
    """Return `values` with secrets replaced by `***`.

    Secrets are logins in URLs, the values of keys and arguments that name one, and the values of environment variables
    that do (`HF_TOKEN`, `WANDB_API_KEY`), wherever they occur.
    """
    if isinstance(values, dict):
        return {key: "***" if _SECRET_KEY.search(str(key)) else without_secrets(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_secrets(value) for value in values]
    return _masked(values) if isinstance(values, str) else values


def _masked(text: str) -> str:
    text = _SECRET_ARGUMENT.sub(r"\1***", _URL_LOGIN.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_KEY.search(name):
            text = text.replace(value, "***")
    return text
