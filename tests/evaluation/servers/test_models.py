"""All questions to servers: side by side, kept, resumed, failures named, and vLLM started and ended."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.servers import client
from qvl_pipeline.evaluation.servers.client import Answer
from qvl_pipeline.evaluation.servers.kept import KeptAnswers
from qvl_pipeline.evaluation.servers.models import Asked, ask_servers, forget_answers
from tests.evaluation.servers.http_server import Fault, Says, chat_server, completion
from tests.evaluation.world import ANSWERS, KINDS, World, build_world

ROWS = tuple(range(len(KINDS)))
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), "qwen3_vl", list(KINDS))


@pytest.fixture
def asked(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.001)

    def make(**evaluate: Any) -> Asked:
        return Asked(
            evaluate=EvaluateConfig(**evaluate),
            family="qwen3_vl",
            processor=world.processor,
            trained=world.model_folder,
            base=str(world.model_folder),
            tokenized=world.tokenized,
            sampled=world.sampled,
            video_frames=world.video_frames,
            rows=ROWS,
            scratch=tmp_path / "served",
        )

    return make


def one_server(url: str, **parameters: Any) -> dict[str, Any]:
    """Parameters by which a server answers as the trained model."""
    server = {"url": url, "clips": "frames", "retries": 0} | parameters
    return {"backend": "openai", "compare_base": False, "servers": {"trained": server}}


def knowing(world: World, **faults: Fault) -> Says:
    """Answers each question rightly, told apart by its text, but those of some kinds."""
    texts = {KINDS[kind][-1][1][-1]: row for row, kind in enumerate(KINDS)}
    kinds = list(KINDS)

    def says(request: dict[str, Any]) -> str | dict[str, Any] | Fault:
        content = request["messages"][-1]["content"]
        row = texts[content if isinstance(content, str) else content[-1]["text"]]
        planned = len(world.references[row]["input_ids"][0])
        return faults.get(kinds[row]) or completion(ANSWERS[row], planned)

    return says


def texts_of(asked: Asked, name: str = "trained") -> list[str | None]:
    found = ask_servers(asked, lambda n: None)[name]
    return [found.text(row) for row in ROWS]


def test_all_are_asked_side_by_side(world: World, asked: Ask) -> None:
    together = threading.Barrier(3, timeout=30)
    knows, done = knowing(world), []

    def says(request: dict[str, Any]) -> Any:
        if len(server.bodies) <= 3:
            together.wait()  # each of the first three waits for the others
        return knows(request)

    with chat_server(says) as server:
        what = asked(**one_server(server.url, concurrency=3))
        found = ask_servers(what, done.append)["trained"]
    assert [found.text(row) for row in ROWS] == list(ANSWERS)
    assert server.most_at_once == 3
    assert sum(done) == len(server.bodies) == len(ROWS)
    assert {request["model"] for request in server.requests} == {"tiny"}


def test_an_evaluation_that_was_cut_off_asks_for_the_others_only(world: World, asked: Ask) -> None:
    knows = knowing(world)
    with chat_server(lambda request: Fault(401) if len(server.bodies) > 4 else knows(request)) as server:
        what = asked(**one_server(server.url, concurrency=1))
        with pytest.raises(UserError, match="refuses every request"):
            ask_servers(what, lambda n: None)
    kept = what.scratch / "trained.jsonl"
    # As if the machine had gone down amid the fourth line.
    kept.write_text(kept.read_text()[:-9])
    answered = set(server.bodies[:3])
    with chat_server(knows) as server:
        assert texts_of(asked(**one_server(server.url))) == list(ANSWERS)
    assert len(server.bodies) == len(ROWS) - 3
    assert answered.isdisjoint(server.bodies)
    with chat_server(knows) as server:  # all are there, that of the cut line too
        what = asked(**one_server(server.url))
        assert texts_of(what) == list(ANSWERS)
    assert server.bodies == []
    forget_answers(what)
    with chat_server(knows) as server:
        texts_of(asked(**one_server(server.url)))
    assert len(server.bodies) == len(ROWS)


def test_an_answer_is_kept_whatever_is_in_it(tmp_path: Path) -> None:
    answers = {str(n): Answer(text, n) for n, text in enumerate(("two\nlines", "a\u2028b\x85c", '"7"', "七", ""))}
    kept = KeptAnswers(tmp_path / "kept.jsonl")
    with kept.writing():
        for asked, answer in answers.items():
            kept.add(asked, answer)
    again = KeptAnswers(tmp_path / "kept.jsonl")
    assert {asked: again.get(asked) for asked in answers} == answers


def test_answers_of_other_weights_are_not_taken_over(world: World, asked: Ask, tmp_path: Path) -> None:
    with chat_server(knowing(world)) as server:
        what = asked(**one_server(server.url))
        texts_of(what)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "model.safetensors").write_bytes(b"other weights")
        texts_of(Asked(**vars(what) | {"trained": tmp_path / "other"}))
    assert len(server.bodies) == 2 * len(ROWS)


def test_failures_are_named_and_end_the_evaluation(world: World, asked: Ask, caplog: pytest.LogCaptureFixture) -> None:
    says = knowing(world, video=Fault(500, text="out of memory"), text=Fault(hang_up="at once"))
    with chat_server(says) as server:
        with pytest.raises(UserError) as error, caplog.at_level(logging.WARNING):
            texts_of(asked(**one_server(server.url)))
        assert "2 of 7 samples have no answer, the first is 'made/0'" in str(error.value)
        assert "status 500: out of memory" in str(error.value)
        assert "'made/3' has no answer: status 500: out of memory" in caplog.text
        # As many as that may be: they are no answers, neither wrong nor empty ones.
        found = ask_servers(asked(**one_server(server.url, max_failures=0.3)), lambda n: None)["trained"]
    assert [found.text(row) for row in ROWS] == [None, *ANSWERS[1:3], None, *ANSWERS[4:]]
    assert found.failures.keys() == {0, 3}


def test_other_tokens_than_those_of_training_are_noticed(
    world: World, asked: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    counted = len(world.references[1]["input_ids"][0]) + 4
    says = knowing(world)

    def samples_otherwise(request: dict[str, Any]) -> Any:
        said = says(request)
        said["usage"]["prompt_tokens"] += 4 if said["choices"][0]["message"]["content"] == ANSWERS[1] else 0
        return said

    with chat_server(samples_otherwise) as server:
        with caplog.at_level(logging.WARNING):
            assert texts_of(asked(**one_server(server.url))) == list(ANSWERS)
        assert f"in 1 of 7 prompts ({counted} instead of {counted - 4} in 'made/1')" in caplog.text
        with pytest.raises(
            UserError, match=f"the server counts {counted} tokens in its prompt, training {counted - 4}"
        ):
            texts_of(asked(**one_server(server.url, prompt_tokens="error")))
        # It had been kept, and was asked again: the server might have been told of other sampling since.
        assert len(server.bodies) == len(ROWS) + 1
        caplog.clear()
        assert texts_of(asked(**one_server(server.url, prompt_tokens="off"))) == list(ANSWERS)
        others = {"servers": {"gpt": {"url": server.url, "clips": "frames"}}}
        assert texts_of(asked(**others), "gpt") == list(ANSWERS)
    assert "counts other tokens" not in caplog.text


def test_a_model_is_named_where_there_are_several(world: World, asked: Ask) -> None:
    with chat_server(knowing(world), models=("a", "b")) as server:
        with pytest.raises(UserError, match=r"evaluate.servers.trained.model: http.* lists a, b: name the one to ask"):
            texts_of(asked(**one_server(server.url)))
        texts_of(asked(**one_server(server.url, model="b")))
        assert {request["model"] for request in server.requests} == {"b"}
        with pytest.raises(UserError, match=r"/x/v1 refuses every request \(status 404"):
            texts_of(asked(**one_server(f"{server.url}/x/v1")))


# A stand-in for `vllm`: it says what it was called with, starts a process of its own, and serves one answer.
VLLM = """#!{python}
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = dict(zip(sys.argv[3::2], sys.argv[4::2]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({log!r}, "a") as log:
    log.write(json.dumps([os.getpid(), child.pid, *sys.argv[1:]]) + "\\n")
if "--fail" in sys.argv:
    child.kill()
    sys.exit("CUDA error: no kernel image is available")

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def send(self, values):
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def do_GET(self): self.send({{"data": [{{"id": arguments["--served-model-name"]}}]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send({{"choices": [{{"message": {{"content": asked["model"]}}}}]}})

HTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Any]]]:
    """Put the stand-in on the path; returns what it was called with each time, behind two process ids."""
    program, log = tmp_path / "bin" / "vllm", tmp_path / "calls.jsonl"
    program.parent.mkdir()
    program.write_text(VLLM.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def launching(**parameters: Any) -> dict[str, Any]:
    return {"backend": "openai", "servers": {"trained": {"launch": "vllm", "clips": "frames", **parameters}}}


def _gone(process: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_vllm_is_started_for_each_model_and_ended_with_all_it_started(
    world: World, asked: Ask, vllm: Callable[[], list[list[Any]]], tmp_path: Path
) -> None:
    trained = shutil.copytree(world.model_folder, tmp_path / "trained")
    what = asked(**launching(launch_args=["--max-model-len", "512"], media="file"))
    what = Asked(**vars(what) | {"trained": trained})
    found = ask_servers(what, lambda n: None)
    assert [found[name].text(0) for name in ("base", "trained")] == ["base", "trained"]
    calls = {call[call.index("--served-model-name") + 1]: call for call in vllm()}
    for (server, child, command, _, *options), name in zip(calls.values(), calls, strict=True):
        assert command == "serve"
        given = dict(zip(options[::2], options[1::2], strict=True))
        media = os.path.commonpath([Path(item["key"]).parent for items in world.media for item in items])
        assert given.pop("--port").isdigit()
        assert given == {
            "--host": "127.0.0.1",
            "--served-model-name": name,
            "--generation-config": "vllm",
            "--media-io-kwargs": '{"video": {"num_frames": -1}}',
            "--mm-processor-kwargs": json.dumps({"fps": world.processor.video_processor.fps}),
            "--allowed-local-media-path": media,
            "--max-model-len": "512",
        }
        assert _gone(server), name
        assert _gone(child), name
    assert calls["trained"][3] == str(trained)
    # The untrained model is served with the processor of the trained one.
    base = Path(calls["base"][3])
    assert (base / "model.safetensors").resolve() == (world.model_folder / "model.safetensors").resolve()
    assert (base / "processor_config.json").resolve() == (trained / "processor_config.json").resolve()


def test_vllm_is_ended_when_the_evaluation_fails(asked: Ask, vllm: Callable[[], list[list[Any]]]) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_servers(asked(**launching()), interrupted)
    [[server, child, *_]] = vllm()
    assert _gone(server)
    assert _gone(child)


def test_vllm_that_does_not_start_says_why(asked: Ask, vllm: Callable[[], list[list[Any]]]) -> None:
    with pytest.raises(
        UserError, match=r"(?s)servers.base: vLLM ended by itself with status 1; .*CUDA error: no kernel"
    ):
        ask_servers(asked(**launching(launch_args=["--fail"])), lambda n: None)


def test_vllm_that_is_not_installed_is_one_sentence(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"^evaluate.servers.base.launch is vllm, which is not installed: [^\n]*url"):
        ask_servers(asked(**launching()), lambda n: None)


def test_an_adapter_is_not_launched(asked: Ask, tmp_path: Path) -> None:
    (tmp_path / "trained" / "adapter").mkdir(parents=True)
    what = Asked(**vars(asked(**launching())) | {"trained": tmp_path / "trained"})
    with pytest.raises(UserError, match=r"the trained model is an adapter: set adapter\.export to merged"):
        ask_servers(what, lambda n: None)
