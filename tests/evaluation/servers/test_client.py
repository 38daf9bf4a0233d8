"""What is asked again, what is not, and what is said of it in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qvl_pipeline.config import ServerConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.servers import client as module
from qvl_pipeline.evaluation.servers.client import Answer, ChatClient, NotAnsweredError, ServerGoneError
from tests.evaluation.servers.http_server import Fault, chat_server, completion

BODY = b'{"model":"tiny","messages":[{"role":"user","content":"7?"}]}'


@contextlib.contextmanager
def asking(*says: Any, **parameters: Any) -> Iterator[tuple[ChatClient, list[bytes]]]:
    """A client of a server that says one thing after the other, the last of them for good."""
    left = list(says)
    with chat_server(lambda _: left.pop(0) if len(left) > 1 else left[0]) as server:
        config = ServerConfig(url=server.url, **{"retries": 3, "timeout_s": 5.0} | parameters)
        with contextlib.closing(ChatClient("trained", config, server.url)) as client:
            yield client, server.bodies


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(status) for status in (408, 429, 500, 502, 503, 504)),
        Fault(429, headers={"Retry-After": "0"}),
        Fault(hang_up="at once"),
        Fault(hang_up="halfway"),
    ],
    ids=lambda fault: f"{fault.status} {fault.hang_up or ''}",
)
def test_what_may_go_by_is_asked_again_with_the_same_bytes(fault: Fault) -> None:
    with asking(fault, fault, completion("7", prompt_tokens=12)) as (client, bodies):
        assert client.answer(BODY) == Answer("7", 12)
        assert bodies == [BODY] * 3


def test_an_answer_that_is_late_is_asked_for_again() -> None:
    with asking(Fault(late_s=1.5), "7", timeout_s=0.3) as (client, bodies):
        assert client.answer(BODY).text == "7"
        assert bodies == [BODY] * 2


def test_a_server_that_says_when_is_left_alone_until_then() -> None:
    with asking(Fault(429, headers={"Retry-After": "1"}), "7") as (client, _):
        begun = time.monotonic()
        assert client.answer(BODY).text == "7"
        assert time.monotonic() - begun > 0.9


def test_it_gives_up_after_so_many_retries_and_says_what_the_server_said() -> None:
    with asking(Fault(500, text='{"error": "CUDA out\n of memory"}'), retries=2) as (client, bodies):
        with pytest.raises(NotAnsweredError, match=r'^status 500: \{"error": "CUDA out of memory"\}$'):
            client.answer(BODY)
        assert bodies == [BODY] * 3


def test_a_question_that_the_server_refuses_is_asked_once() -> None:
    with asking(Fault(400, text="This model's maximum context length is 256 tokens.")) as (client, bodies):
        with pytest.raises(
            NotAnsweredError, match=r"^status 400: This model's maximum context length is 256 tokens\.$"
        ):
            client.answer(BODY)
        assert bodies == [BODY]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_would_refuse_every_question_ends_all(status: int) -> None:
    with (
        asking(Fault(status)) as (client, bodies),
        pytest.raises(
            ServerGoneError, match=rf"^evaluate.servers.trained: http://127.*every request \(status {status}"
        ),
    ):
        client.answer(BODY)
    assert len(bodies) == 1


def test_nobody_at_the_address_ends_all() -> None:
    with asking("7", retries=1) as (client, _):
        client.answer(BODY)
    with pytest.raises(ServerGoneError, match=r"nobody answers at http://127.0.0.1:\d+/v1 \(NewConnectionError"):
        client.answer(BODY)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"choices": []}, "no chat completion"),
        ({"choices": [{"message": {"content": None}}]}, "has no text"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{}]}}]}, "without a tool parser"),
        (Fault(text="<html>"), "no JSON: <html>"),
    ],
)
def test_what_is_no_answer_is_no_empty_answer(said: Any, reason: str) -> None:
    with asking(said) as (client, _), pytest.raises(NotAnsweredError, match=reason):
        client.answer(BODY)


def test_a_key_is_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    with chat_server(lambda _: "7") as server:
        config = ServerConfig(url=server.url, api_key_env="MY_KEY")
        client = ChatClient("gpt", config, server.url)
        client.answer(BODY)
        assert client.models() == ["tiny"]
        client.close()
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="the environment has no MY_KEY"):
        ChatClient("gpt", config, server.url)


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with asking("7") as (client, _):
        assert client.answer(BODY).text == "7"
    assert module._proxy_of("http://models.example.org/v1") == "http://127.0.0.1:9"
    monkeypatch.setenv("no_proxy", "example.org")
    assert module._proxy_of("http://models.example.org/v1") is None
