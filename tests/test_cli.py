from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from kedro.framework.project import pipelines
from kedro.pipeline import Node, Pipeline

import tests.kedro_project
from qvl_pipeline import cli
from qvl_pipeline.cli.waking import woken_by_signals
from qvl_pipeline.errors import UserError
from tests.kedro_project import REPOSITORY, make_project, register_pipelines


@pytest.fixture(autouse=True)
def _same_process_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, tempfile.gettempdir()))
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    yield
    signal.signal(signal.SIGTERM, handler)


def kedro_run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.run, arguments)


def use(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """Make `node` the whole of `ingest`."""
    monkeypatch.setattr(
        tests.kedro_project, "register_pipelines", lambda: {**register_pipelines(), "ingest": Pipeline([node])}
    )
    pipelines.configure("tests.kedro_project")


@pytest.mark.parametrize("option", ["--pipeline", "-p", "--pipelines"])
def test_every_spelling_of_the_pipeline_option_works_without_a_warning(
    project: Path, option: str, recwarn: pytest.WarningsRecorder
) -> None:
    assert kedro_run(option, "ingest").exit_code == 0
    assert (project / "data/01_raw/digits.manifest.json").exists()
    assert [
        warning for warning in recwarn if "deprecated" in str(warning.message) and "--pipeline" in str(warning.message)
    ] == []


def test_several_pipelines_run_as_one(project: Path) -> None:
    assert kedro_run("--pipelines", "tokenize,ingest").exit_code == 0
    assert (project / "data/08_reporting/tiny_qwen3_vl/plan_summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--pipelines", "train"],
            "train cannot start, inputs do not exist yet:\n  base_model (data/06",
        ),
        (["--pipelines", "trian"], "there is no pipeline 'trian': did you mean 'train'?"),
        (["--pipelines", "xyz"], "there is no pipeline 'xyz': the pipelines are ingest, validate, sample,"),
        (
            ["--nodes", "trian"],
            "--nodes names 'trian', which is none of the nodes in the default pipeline: did you mean",
        ),
        (
            ["--from-nodes", "tokenise"],
            "'tokenise', which is none of the nodes in the default pipeline: did you mean 'tok",
        ),
        (
            ["--to-nodes", "xyz"],
            "--to-nodes names 'xyz', which is none of the nodes in the default pipeline: there are ev",
        ),
        (["--pipelines", "ingest", "--nodes", "train"], "none of the nodes in 'ingest': it is in 'train'"),
        (["--from-inputs", "raw_manifst"], "none of the entries in the default pipeline: did you mean 'raw_manifest'?"),
        (["--to-outputs", "params:trian"], "none of the entries in the default pipeline: did you mean 'params:train'?"),
        (
            ["--tags", "not_recoded"],
            "--tags names 'not_recoded', which is none of the tags in the default pipeline: there are",
        ),
        (["--pipelines", "compare", "--tags", "not_recoded"], "in 'compare': did you mean 'not_recorded'?"),
        (["--nodes", "train", "--to-nodes", "ingest"], "--nodes and --to-nodes leave nothing to run: no node fits all"),
        (
            ["--env", "nope"],
            "there is no profile 'nope': the profiles in conf/ are frozen_vision, long_video, qwen2_5_omni_7b",
        ),
        (["--params", "train.learning_rat=1"], "unknown key 'learning_rat': did you mean 'learning_rate'? (--params)"),
    ],
)
def test_what_a_person_can_mend_is_an_error_without_a_traceback(
    project: Path, arguments: list[str], error: str
) -> None:
    result = kedro_run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert error in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("train:\n\tseed: 1\n", "line 2, column 1", "a tab, where YAML allows only spaces: indent with spaces"),
        (
            "train:\n  seed: 1\n model: {}\n",
            "line 3, column 2",
            "parsing a block mapping from line 1 on, expected",
        ),
        ("model: {}\ntrain: [1\n", "line 3, column 1", "while parsing a flow sequence from line 2 on, "),
        ("train:\n  seed: 1\n  seed: 2\n", "line 3, column 3", "found duplicate key seed"),
    ],
)
@pytest.mark.parametrize("layer", ["tiny_qwen3_vl", "local"])
def test_a_configuration_file_that_cannot_be_read_is_named_with_the_line(
    project: Path, layer: str, text: str, place: str, reason: str
) -> None:
    (project / f"conf/{layer}/parameters.yml").write_text(text)
    result = kedro_run()
    assert result.exit_code == 1
    assert f"conf/{layer}/parameters.yml, {place} cannot be read: " in result.output
    assert reason in result.output
    assert len(result.output.splitlines()) == 1


def test_an_error_of_a_node_for_people_is_shown_as_it_is(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("the plan is stale: run tokenize")

    use(monkeypatch, Node(refuse, None, "raw_manifest"))
    assert kedro_run("--pipelines", "ingest").output.endswith("Error: the plan is stale: run tokenize\n")


def test_an_error_while_saving_is_shown_without_what_kedro_wraps_around_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path) -> None:
        raise UserError("the disk is full")

    use(monkeypatch, Node(lambda: write, None, "base_model"))
    assert kedro_run("--pipelines", "ingest").output.endswith("Error: the disk is full\n")


@pytest.mark.parametrize("saving", [True, False])
def test_a_full_disk_is_one_sentence(project: Path, monkeypatch: pytest.MonkeyPatch, saving: bool) -> None:
    def write(folder: Path | None = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/mnt/full")

    use(monkeypatch, Node((lambda: write) if saving else write, None, "base_model"))
    result = kedro_run("--pipelines", "ingest")
    assert result.exit_code == 1
    place = "data/06_models/tiny_qwen3_vl/base" if saving else "/mnt/full"
    assert f"{place} cannot be written, the disk is full: 0 bytes of it were written, " in result.output
    assert "are free there. Make room, and run the same command again" in result.output
    assert "Traceback" not in result.output


def test_waking_ends_with_its_block_also_while_a_child_is_there() -> None:
    def descriptors() -> list[str]:
        return [path.name for path in Path("/proc/self/fd").iterdir()]

    def refused() -> None:
        with pytest.raises(ValueError, match="main thread"), woken_by_signals():
            pass
        refusals.append(1)

    def threads_end() -> None:
        for thread in threading.enumerate():
            if thread.name == "signals":
                thread.join(10)
                assert not thread.is_alive()

    refusals: list[int] = []
    threads_end()  # those of other tests
    before = len(descriptors())
    with woken_by_signals():
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
    threads_end()
    child.kill()
    child.join()
    child.close()
    other = threading.Thread(target=refused)
    other.start()
    other.join()
    assert refusals
    assert len(descriptors()) == before
    assert (signal.getsignal(signal.SIGURG), signal.set_wakeup_fd(-1)) == (signal.SIG_DFL, -1)


def test_help_names_the_default_that_there_is() -> None:
    help_text = " ".join(kedro_run("--help").output.split())
    assert "--env TEXT Profile to run, a folder of conf/. Defaults to that of the embedded example." in help_text


def test_a_bug_keeps_its_traceback(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Node(lambda: 1 / 0, None, "raw_manifest"))
    result = kedro_run("--pipelines", "ingest")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupted_run_keeps_its_status_when_nobody_reads_its_output() -> None:
    code = (
        "import os, sys; from qvl_pipeline.cli.run import _end; reader, writer = os.pipe(); os.close(reader);"
        "sys.stdout = open(writer, 'w'); sys.stdout.write('unread'); _end(130)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


UNHEARD = """
import os, signal, sys, threading, time
from qvl_pipeline.cli.waking import woken_by_signals

def end(*_):
    moment = "at once" if time.monotonic() - started < 10 else "when the wait was over"
    sys.exit(f"heard {moment} in {threading.current_thread().name}")

signal.signal(signal.SIGTERM, end)
with woken_by_signals():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # another thread gets it, and this one waits on
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    threading.Event().wait(20)
"""


def test_a_signal_that_comes_just_before_the_main_thread_waits_is_heard() -> None:
    """What the system does then, noting the signal without interrupting the wait, it does for other threads, too."""
    code = [sys.executable, "-c", UNHEARD]
    done = subprocess.run(code, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "heard at once in MainThread\n")


def test_the_real_command_says_what_to_run_first(tmp_path: Path) -> None:
    """`kedro run` itself, with the real pipelines: it finds our command, and no other output disturbs."""
    folder = make_project(tmp_path / "project")
    done = subprocess.run(
        [sys.executable, "-m", "kedro", "run", "--pipeline", "train"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[:2] == [
        "Error: train cannot start, inputs do not exist yet:",
        "  base_model (data/06_models/tiny_qwen3_vl/base)",
    ]
    assert lines[-1] == "Run `kedro run --pipelines ingest,validate,sample,tokenize` first."
    assert not (folder / "mlflow.db").exists()


TEMPORARY = """
import multiprocessing, os, sys, tempfile
from qvl_pipeline.cli.run import _use_temporary_folder

if __name__ == "__main__":
    _use_temporary_folder()
    child = multiprocessing.get_context("forkserver").Process(target=print)
    child.start()
    child.join()
    tempfile.mkdtemp(prefix="torchelastic_")
    print(os.environ["TMPDIR"], os.environ["TORCHINDUCTOR_CACHE_DIR"], *os.listdir(), sep="\\n", flush=True)
    if len(sys.argv) > 1:
        os.kill(os.getpid(), int(sys.argv[1]))
"""


def test_temporary_files_go_with_the_run_or_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(TEMPORARY)
    place = Path(tempfile.mkdtemp(prefix="temporary files"))  # in a folder of pytest, its name would be too long

    def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
        command = [sys.executable, str(tmp_path / "start.py"), *arguments]
        return subprocess.run(
            command,
            cwd=place,
            env=environment | {"TMPDIR": str(place)} | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )

    start("9")
    [killed] = place.glob("qvl-run-*")
    assert any(path.name.startswith("torchelastic_") for path in killed.iterdir())
    done = start()
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert killed.name not in done.stdout, "it was removed before the second began"
    assert str(place / "torchinductor_") in done.stdout, "compiled code outlives the run"
    assert list(place.iterdir()) == []
    long = place / ("long" * 20)
    long.mkdir()
    assert start(TMPDIR=str(long)).returncode == 0
    assert list(long.iterdir()) == []
    shutil.rmtree(place)


def test_a_run_within_a_run_shares_its_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a replay starts one; waiting for a folder of its own, it would wait for whoever waits for it."""
    from qvl_pipeline.cli.run import _TEMPORARY, _use_temporary_folder
    from qvl_pipeline.unfinished import unfinished_folder

    with unfinished_folder(tmp_path, _TEMPORARY) as outer:
        monkeypatch.setenv("TMPDIR", outer)
        monkeypatch.setattr("tempfile.tempdir", outer)
        _use_temporary_folder()
        assert os.environ["TMPDIR"] == outer
        assert list(Path(outer).iterdir()) == []
