"""A real HTTP server with OpenAI's chat completions, that answers, fails, hangs up or is late as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny"


@dataclass(frozen=True)
class Fault:
    """Anything but an answer in time.

    Attributes:
        status: HTTP status.
        text: Body of it.
        headers: Headers of it.
        hang_up: `at once`, or `halfway` through the body.
        late_s: Seconds before there is an answer.
    """

    status: int = 200
    text: str = '{"error": {"message": "made to fail"}}'
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: str | None = None
    late_s: float = 0.0


@dataclass
class ChatServer:
    """What was asked of a server that runs."""

    url: str
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]


Says = Callable[[dict[str, Any]], str | dict[str, Any] | Fault]


@contextmanager
def chat_server(says: Says, models: tuple[str, ...] = (MODEL,)) -> Iterator[ChatServer]:
    """Run a server until it is left.

    Args:
        says: From a request to the answer, all of the response, or a fault.
        models: What it lists.
    """
    lock, running = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            known = {"data": [{"id": name} for name in models]}
            self._send(*((200, known) if self.path == "/v1/models" else (404, {})))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                running[0] += 1
                server.most_at_once = max(server.most_at_once, running[0])
            try:
                said = says(json.loads(body)) if self.path == "/v1/chat/completions" else Fault(404)
                self._say(said)
            except BrokenPipeError:  # the client did not wait
                self.close_connection = True
            finally:
                with lock:
                    running[0] -= 1

        def _say(self, said: str | dict[str, Any] | Fault) -> None:
            if isinstance(said, Fault) and not said.late_s:
                self._fail(said)
                return
            if isinstance(said, Fault):
                time.sleep(said.late_s)
                said = "late"
            self._send(200, completion(said) if isinstance(said, str) else said)

        def _fail(self, fault: Fault) -> None:
            self.close_connection = True
            if fault.hang_up == "at once":
                return
            if fault.hang_up == "halfway":
                content = json.dumps(completion("half")).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:20])
                return
            self.send_response(fault.status)
            self.send_header("Connection", "close")  # or the next request may be sent into a connection that is gone
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(fault.text.encode())))
            self.end_headers()
            self.wfile.write(fault.text.encode())

        def _send(self, status: int, values: dict[str, Any]) -> None:
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = ChatServer(f"http://127.0.0.1:{http.server_port}/v1")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def completion(text: str, prompt_tokens: int | None = None) -> dict[str, Any]:
    usage = {} if prompt_tokens is None else {"usage": {"prompt_tokens": prompt_tokens}}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], **usage}
