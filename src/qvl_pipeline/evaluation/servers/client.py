"""One server: what it serves, and its answers, asked again where it was busy, failed or was cut off."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError

from qvl_pipeline.config import ServerConfig
from qvl_pipeline.errors import UserError

# Too many requests, too early, and all that may go by.
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
# Nothing that another sample would change.
_OF_THE_SERVER = (401, 403, 404, 405)
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
# As long as a server may ask to be left alone.
_LONGEST_WAIT_S = 300
_QUOTED = 300


class NotAnsweredError(Exception):
    """A question has no answer; the message says why."""


class ServerGoneError(UserError):
    """Nobody answers at the address, or not to this run."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        text: The answer.
        prompt_tokens: Tokens of the prompt as the server counts them; `None` where it does not say.
    """

    text: str
    prompt_tokens: int | None


class ChatClient:
    """A server with OpenAI's chat completions. May be used by several threads."""

    def __init__(self, name: str, server: ServerConfig, url: str) -> None:
        """Set up a client; nothing is sent.

        Args:
            name: Name of the model in `evaluate.servers`, for messages.
            server: Its parameters.
            url: Its address, up to the version.

        Raises:
            UserError: The environment has no key where one is named.
        """
        self.url = url.rstrip("/")
        self._name = name
        self._headers = {"Content-Type": "application/json"} | authorization(name, server)
        options = {
            "maxsize": server.concurrency,
            "block": True,
            "timeout": urllib3.Timeout(connect=min(30.0, server.timeout_s), read=server.timeout_s),
            # Of any verb: a question may be asked twice. The last response is looked at, for what it says.
            "retries": urllib3.Retry(
                total=server.retries,
                allowed_methods=None,
                status_forcelist=_AGAIN,
                backoff_factor=_FIRST_PAUSE_S,
                backoff_max=_LONGEST_PAUSE_S,
                backoff_jitter=_FIRST_PAUSE_S,  # not all that were refused at once, at once again
                retry_after_max=_LONGEST_WAIT_S,
                raise_on_status=False,
            ),
        }
        proxy = _proxy_of(self.url)
        self._direct = proxy is None
        self._pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)

    def models(self) -> list[str]:
        """Return the names of the models that it lists.

        Raises:
            ServerGoneError: Nobody answers, or not with a list of models.
        """
        try:
            response = self._request("GET", "/models", None)
            return [str(model["id"]) for model in response["data"]]
        except (NotAnsweredError, KeyError, TypeError) as error:
            raise ServerGoneError(
                f"evaluate.servers.{self._name}: {self.url} does not list its models ({error}): start the server, or "
                "correct the url, which ends like /v1; of one that has no list, name the model"
            ) from error

    def answer(self, body: bytes) -> Answer:
        """Ask one question.

        Args:
            body: Of the request.

        Raises:
            NotAnsweredError: There is no answer, however often it was asked.
            ServerGoneError: The server answers nobody, or not to this run.
        """
        said = self._request("POST", "/chat/completions", body)
        try:
            message = said["choices"][0]["message"]
            calls, text = message.get("tool_calls"), message["content"]
            prompt_tokens = (said.get("usage") or {}).get("prompt_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise NotAnsweredError(f"the response is no chat completion: {_quoted(json.dumps(said))}") from error
        if calls:
            raise NotAnsweredError(
                "it was answered by calls that the server has parsed: start it without a tool parser"
            )
        if not isinstance(text, str):
            raise NotAnsweredError(f"the response has no text: {_quoted(json.dumps(said))}")
        return Answer(text, prompt_tokens)

    def _request(self, verb: str, path: str, body: bytes | None) -> Any:
        try:
            response = self._pool.request(verb, self.url + path, body=body, headers=self._headers, redirect=False)
        except HTTPError as error:
            if self._direct and not _listens(self.url):
                raise ServerGoneError(
                    f"evaluate.servers.{self._name}: nobody answers at {self.url} ({_reason(error)}): start it, and "
                    "run again; answers that are there are kept"
                ) from error
            raise NotAnsweredError(_reason(error)) from error
        if response.status in _OF_THE_SERVER:
            raise ServerGoneError(
                f"evaluate.servers.{self._name}: {self.url} refuses every request ({_status(response)}): correct the "
                "url, the model or the key"
            )
        if response.status != 200:
            raise NotAnsweredError(_status(response))
        try:
            return json.loads(response.data)
        except ValueError as error:
            raise NotAnsweredError(f"the response is no JSON: {_quoted(response.data)}") from error

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()


def authorization(name: str, server: ServerConfig) -> Mapping[str, str]:
    """Return the header with the key of a server, if it has one.

    Raises:
        UserError: The environment does not have it.
    """
    if server.api_key_env is None:
        return {}
    if not (key := os.environ.get(server.api_key_env)):
        raise UserError(
            f"evaluate.servers.{name}.api_key_env: the environment has no {server.api_key_env}: export it, with the key"
        )
    return {"Authorization": f"Bearer {key}"}


def _proxy_of(url: str) -> str | None:
    parts = urlsplit(url)
    host = parts.hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    return None if local or proxy_bypass(host) else getproxies().get(parts.scheme)


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]), 5.0).close()
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Return what went wrong in the end, without the address and the names of classes around it."""
    inner = getattr(error, "reason", None) or error
    return f"{type(inner).__name__}: {_quoted(str(inner))}"


def _status(response: urllib3.BaseHTTPResponse) -> str:
    return f"status {response.status}: {_quoted(response.data)}"


def _quoted(text: str | bytes) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    flat = " ".join(text.split())
    return flat if len(flat) <= _QUOTED else f"{flat[:_QUOTED]}…"
