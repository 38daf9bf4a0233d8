"""Secrets are masked in whatever is recorded: by their place in URLs, headers and arguments, and by their names."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
# The last word of a name, however its words are joined: `HF_TOKEN`, `AccountKey`, `X-Amz-Signature`.
_LAST_WORDS = {
    *("token", "secret", "password", "passwd", "passphrase", "pwd", "key", "credential", "credentials"),
    *("authorization", "auth", "signature", "sig", "sas", "pat"),
}
_ENDINGS = ("apikey", "accesskey", "token", "secret", "password", "passwd", "connectionstring")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Folders, not passwords.
_NO_SECRETS = {"PWD", "OLDPWD"}
# Shorter values of secret variables are settings, and would be found in everything.
_SHORTEST_SECRET = 8

_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_URL_PASSWORD = re.compile(r"^[a-z0-9+.-]+://[^/@]*:[^/@]*@", re.IGNORECASE)
# Signatures have many names, so all of a query goes.
_URL_QUERY = re.compile(r"(://[^\s\"'<>?]+\?)(?:(?!&quot;|&#3[49];)[^\s\"'<>])+")
# In a page, quotes are escaped.
_QUOTE = r"(?:\\?[\"']|&quot;|&#3[49];)"
_HEADER = re.compile(rf"(?i)(authorization{_QUOTE}?\s*[:=]\s*{_QUOTE}?)(?:(?:bearer|basic|token)\s+)?[^\s\"'<>&]+")
_STRICT = r"(?:token|secret|password|passwd|passphrase|pwd|credentials?|signature|(?:api|access|account)[_-]?key)"
# `"password": "…"` and `api_key="…"`: a name and a literal, in whatever language.
_LITERAL = re.compile(rf"(?i)({_STRICT}{_QUOTE}?\s*[:=]\s*({_QUOTE}))(?:(?!\2).){{3,2000}}?(\2)")
# As in `--params` and connection strings; a name may be quoted, and so may its value.
_ARGUMENT = re.compile(
    rf"(?i)((?:{_STRICT}|(?<![a-z])(?:key|auth|sig|sas))[\"']?\s*=(?!=)\s*)(?:\"[^\"]*\"|'[^']*'|[^&\s,;'\"<>]+)"
)
_SETTING = re.compile(r"(?i)((?:secret|password|passwd|pwd|(?:api|access|account)[_-]?key)[\"']?:\s*)[^\s,;'\"<>]+")


def names_secret(name: str) -> bool:
    """Return whether a key, an argument or an environment variable is called like what holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or name in _NO_SECRETS:
        return False
    return words[-1] in _LAST_WORDS or words[-1].endswith(_ENDINGS) or words[-2:] == ["connection", "string"]


def url_holds_secret(url: str) -> str | None:
    """Return what makes a URL a secret, `a password` or `a signature`; `None` where nothing does."""
    if _URL_PASSWORD.match(url):
        return "a password"
    address, _, query = url.partition("?")
    names = (unquote(part.partition("=")[0]) for part in query.split("&"))
    return "a signature" if "://" in address and any(map(names_secret, names)) else None


def without_url_secrets(text: str) -> str:
    """Return a text whose URLs have neither login nor query: whatever the environment, the same text gives the same."""
    return _URL_QUERY.sub(rf"\1{MASK}", _URL_LOGIN.sub(f"{MASK}@", text)) if "://" in text else text


def without_secrets(values: Any) -> Any:
    """Return `values` with secrets replaced by `***`.

    Secrets are logins and queries of URLs, headers of authorization, the values of keys and arguments that name one,
    and the values of environment variables that do (`HF_TOKEN`, `AZURE_STORAGE_CONNECTION_STRING`), wherever they
    occur. For parameters, commands and messages; of code and pages, see `file_without_secrets`.
    """
    if isinstance(values, dict):
        return {key: MASK if names_secret(str(key)) else without_secrets(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_secrets(value) for value in values]
    if not isinstance(values, str):
        return values
    return _SETTING.sub(rf"\1{MASK}", _ARGUMENT.sub(rf"\1{MASK}", file_without_secrets(values)))


def file_without_secrets(text: str) -> str:
    """Return a text of whatever kind without secrets: as `without_secrets`, but for what code and pages have, too.

    `sorted(rows, key=len)` stays as it is; of arguments, only literals that are called a secret are masked.
    """
    text = _HEADER.sub(rf"\1{MASK}", without_url_secrets(text))
    text = _LITERAL.sub(rf"\1{MASK}\3", text)
    for value in _environment():
        text = text.replace(value, MASK)
    return text


def _environment() -> Iterator[str]:
    """Yield the values of secret variables, as they are and as they are written in URLs, pages and JSON."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and names_secret(name):
            yield from {value, quote(value, safe=""), html.escape(value), json.dumps(value)[1:-1]}
