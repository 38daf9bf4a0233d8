"""A vLLM of our own: started for one model, awaited, and ended however the evaluation ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import urllib3
from huggingface_hub import snapshot_download

from qvl_pipeline.config import ServerConfig
from qvl_pipeline.engine.model.export.processor_files import PROCESSOR_FILES
from qvl_pipeline.errors import UserError
from qvl_pipeline.orphans import end_with_parent
from qvl_pipeline.ports import free_port

_POLL_S = 0.2
# Time that a server has to end by itself before it is killed.
_LEAVE_S = 30.0
_TOLD_LINES = 15


def find_vllm(name: str) -> str:
    """Return the program, of this environment or on the path.

    Args:
        name: Name of the model in `evaluate.servers`, for the message.

    Raises:
        UserError: It is not installed.
    """
    here = Path(sys.executable).with_name("vllm")
    program = shutil.which("vllm") or (str(here) if here.exists() else None)
    if program is None:
        raise UserError(
            f"evaluate.servers.{name}.launch is vllm, which is not installed: put its `vllm` on the PATH (an "
            "environment of its own will do), or give the url of a server that runs"
        )
    return program


@contextlib.contextmanager
def vllm(
    name: str, server: ServerConfig, model: Path, options: Sequence[tuple[str, str]], media: Path | None, log: Path
) -> Iterator[str]:
    """Run `vllm serve`.

    Args:
        name: Name of the model, which it has at the server too.
        server: Its parameters.
        model: Folder of the model.
        options: Options that say how clips are sampled.
        media: Folder that it may read files in; `None` reads none.
        log: What it says.

    Yields:
        Its address, once it answers.

    Raises:
        UserError: It is not installed, ends by itself, or does not answer in time.
    """
    port = free_port()
    command = [find_vllm(name), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    # Not what the model's own configuration says of sampling and penalties.
    command += ["--served-model-name", name, "--generation-config", "vllm"]
    command += [word for option in options for word in option]
    command += ["--allowed-local-media-path", str(media)] if media else []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *server.launch_args],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _await(name, process, f"{url}/models", server.launch_timeout_s, log)
        yield url
    finally:
        _end(process)


def with_processor(base: str, trained: Path, folder: Path) -> Path:
    """Make a folder of the untrained model that samples and resizes as the trained one: links, no copies.

    Args:
        base: Folder or hub id of the untrained model.
        trained: Folder of the trained model.
        folder: Folder to make; replaced when there is one.
    """
    source = Path(base) if Path(base).is_dir() else Path(snapshot_download(base, local_files_only=True))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = {path.name: path for path in source.iterdir() if path.is_file()}
    files |= {name: trained / name for name in PROCESSOR_FILES if (trained / name).exists()}
    for file, path in files.items():
        (folder / file).symlink_to(path.resolve())
    return folder


def _await(name: str, process: subprocess.Popen[bytes], address: str, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    pool = urllib3.PoolManager(timeout=5.0, retries=False)
    while True:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            if pool.request("GET", address).status == 200:
                return
        if process.poll() is not None:
            raise UserError(_told(name, f"ended by itself with status {process.returncode}", log))
        if time.monotonic() > deadline:
            raise UserError(_told(name, f"does not answer {seconds:g} s after its start (launch_timeout_s)", log))
        time.sleep(_POLL_S)


def _told(name: str, what: str, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TOLD_LINES:]
    return "\n".join([f"evaluate.servers.{name}: vLLM {what}; the end of its log, {log}:", *lines])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it started, which has its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LEAVE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
