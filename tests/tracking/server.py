"""A real MLflow server in a process of its own, and a proxy before it that fails in every way a network can."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qvl_pipeline.ports import free_port

# What happens to a request that writes: whether the server gets it, and what the client hears.
FAULTS = ("dropped", "refused", "carried_out_and_dropped", "carried_out_and_refused", "delayed")
# Longer than a client waits.
LATE_S = 3.0

# The first request that needs the database makes its tables.
FIRST = "/api/2.0/mlflow/experiments/get?experiment_id=0"
SERVER = """
import os, sys
os.environ["_MLFLOW_SERVER_FILE_STORE"], os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = sys.argv[2:]
from mlflow.server import app
from werkzeug.serving import make_server
make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()
"""


@contextlib.contextmanager
def mlflow_server(database: str, folder: Path) -> Iterator[int]:
    """Serve a database, with artifacts and log in `folder`; yields the port."""
    port = free_port()
    arguments = [str(port), database, str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVER, *arguments], stderr=log, env=_no_proxy())
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{FIRST}", timeout=60)
                break
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def _no_proxy() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on; while `failing`, the next of the faults happens to each."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_port_behind = port
        self.failing = False
        self.set_faults(*FAULTS)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def set_faults(self, *faults: str) -> None:
        """Choose what happens to requests that write; to those that only ask, it is less."""
        self._faults = {"POST": itertools.cycle(faults), "GET": itertools.cycle(("none", "refused", "delayed"))}
        self.happened: list[str] = []

    def fault(self, method: str) -> str:
        if not self.failing:
            return "none"
        fault = next(self._faults[method])
        if method == "POST":
            self.happened.append(fault)
        return fault

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy

    def do_GET(self) -> None:
        fault = self.server.fault(self.command)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "delayed":
            time.sleep(0.4)
        if fault == "late":  # the client has given up, and sent it again, when the server gets it
            time.sleep(LATE_S)
        if fault in ("dropped", "refused"):
            status, answer = 500, b"{}"
        else:
            status, answer = self._pass_on(body)
        if fault.endswith("dropped") or fault == "late":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(500 if fault.endswith("refused") else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PATCH = do_GET

    def _pass_on(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port_behind, timeout=30)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""
