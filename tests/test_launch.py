"""`python -m qvl_pipeline.launch`: the guide's examples to their scores, with tiny models in place of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl_pipeline.demo.digits import build_digits
from qvl_pipeline.demo.tiny_model import build_tiny_model
from tests.kedro_project import REPOSITORY, make_project
from tests.profiles.lmms.test_import import EXAMPLES

# What a CPU and a minute allow; the rest is the guide's.
HERE = [
    *("model.attn_implementation=auto", "train.dataloader_num_workers=0", "sample.num_workers=1"),
    # Of so few rows, those that are planted to be found are a large share.
    *(
        "validate.max_reject_fraction=1.0",
        "ingest.eval_fraction=0.0",
        "evaluate.max_new_tokens=2",
        "evaluate.max_samples=4",
    ),
]
STREAMED = ["batching.max_steps=2", "train.save_steps=0"]


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qvl_pipeline.launch", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_database: str) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_database)
    folder = make_project(tmp_path / "project")
    (folder / "src" / "qvl_pipeline").symlink_to(REPOSITORY / "src" / "qvl_pipeline")
    return folder


def with_tiny_model(folder: Path, example: str) -> Path:
    """Write the guide's example with the embedded data for its own, and a tiny model for the weights."""
    build_digits(folder / "data/01_raw/digits", seed=0, train_samples=28, eval_samples=7)
    build_tiny_model(folder / "tiny", family=example, seed=0, corpus=["Which digit is it?", "7"])
    text = EXAMPLES[example].read_text()
    text = text.replace("path/to/your/dataset.parquet", "data/01_raw/digits/messages.parquet")
    text = text.replace('data_folder: ""', 'data_folder: "data/01_raw/digits"')
    (entry,) = yaml.safe_load(text)
    model = entry["config"]["model_config"]["load_from_pretrained_path"]
    path = folder / "your_config.yaml"
    path.write_text(text.replace(model, "tiny"))
    return path


@pytest.mark.timeout(960)
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_guides_example_is_trained_and_evaluated_by_one_command(place: Path, example: str) -> None:
    with_tiny_model(place, example)
    steps = STREAMED if example == "qwen3_vl" else []
    done = launch(place, "config_yaml=your_config.yaml", "data_parallel_size=1", *HERE, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = place / "data/08_reporting/your_config"
    scores: dict[str, Any] = json.loads((reports / "metrics.json").read_text())
    assert scores["trained"]["overall"]["n"] > 0
    result = json.loads(next((place / "data/06_models/your_config").rglob("result.json")).read_text())
    assert result["steps"] == (2 if example == "qwen3_vl" else result["steps"]) > 0
    assert (place / "data/06_models/your_config/trained/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "config_yaml=FILE is missing"),
        (["config_yaml=no.yaml"], "no.yaml cannot be read"),
        (["config_yaml"], "'config_yaml' must be key=value"),
        (["config_yaml=a.yaml", "hydra.output_subdir=null"], "Hydra is not used here"),
        (["config_yaml=a.yaml", "hydra/job_logging=disabled"], "Hydra is not used here"),
        (["config_yaml=a.yaml", "learning_rate=1"], "named with their block, as in train.learning_rate"),
        (["config_yaml=a.yaml", "nam=x"], "did you mean 'name'?"),
        (["config_yaml=a.yaml", "data_parallel_size=0"], "must be a whole number of at least 1"),
        (["config_yaml=a.yaml", "train.freeze_modules=[a,b]"], "a value with a comma cannot be given here"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    project: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from qvl_pipeline.launch import launch as command

    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code == 1
    assert sentence in capsys.readouterr().err


def test_torchrun_is_told_that_it_is_not_needed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from qvl_pipeline.launch import launch as command

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    done = CliRunner().invoke(command, ["config_yaml=a.yaml"])
    assert (done.exit_code, "start this without torchrun" in done.output) == (1, True)


def test_the_batch_is_that_of_the_gpus_here_and_of_the_first_call(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from qvl_pipeline.launch import launch as command

    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda python, words: started.append(words[1:]))
    file = project / "wide.yaml"
    file.write_text(EXAMPLES["qwen3_vl"].read_text().replace("sp_ulysses_degree: 1", "sp_ulysses_degree: 2"))
    sizes = []
    for gpus in (8, 4):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert CliRunner().invoke(command, ["config_yaml=wide.yaml", "train.seed=1", "train.bf16=false"]).exit_code == 0
        blocks = yaml.safe_load((project / "conf/wide/parameters.yml").read_text())
        sizes.append(blocks["batching"]["data_parallel_size"])
    assert sizes == [4, 4]
    assert started == [["-m", "kedro", "run", "--env", "wide", "--params", "train.seed=1,train.bf16=false"]] * 2


def test_trainer_arguments_of_the_guide_are_parameters_as_they_stand() -> None:
    from kedro.framework.cli.utils import _split_params

    from qvl_pipeline.config import BatchingConfig, TrainConfig
    from qvl_pipeline.errors import UserError
    from qvl_pipeline.profiles.snippets import with_blocks

    # The snippets of the guide's sections, each on a command line.
    snippets = [
        *("sp_ulysses_degree=2", "use_liger_kernel=true", "use_rmpad=true", 'freeze_modules=["visual"]', "bf16=true"),
        *("gradient_checkpointing=true", "max_steps=1000", "num_train_epochs=1", "group_by_length=true"),
    ]
    given = _split_params(None, None, ",".join(f"train.{snippet}" for snippet in snippets))
    blocks = with_blocks(given)
    train, batching = TrainConfig(**blocks["train"]), BatchingConfig(**blocks["batching"])
    assert (train.sp_ulysses_degree, train.freeze_modules, train.use_rmpad, train.bf16) == (2, ["visual"], True, True)
    assert (batching.max_steps, batching.num_train_epochs, batching.group_by_length) == (1000, 1, True)
    assert with_blocks({"train": {"seed": 1}}) == {"train": {"seed": 1}}
    with pytest.raises(UserError, match=r"train.max_steps=3 and batching.max_steps=4: keep the second"):
        with_blocks({"train": {"max_steps": 3}, "batching": {"max_steps": 4}})
