"""A stage refuses what was made with other parameters than its run has, by whatever profile of the same dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from kedro.framework.project import pipelines
from kedro.utils import load_obj

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.config.base import Block
from qvl_pipeline.data.made_with import RECORDED, made_with, read_record, with_attrs, write_record
from qvl_pipeline.errors import UserError
from qvl_pipeline.pipeline_registry import STAGES
from qvl_pipeline.profiles.loader import ProfileLoader
from qvl_pipeline.settings import CONFIG_LOADER_ARGS
from tests.kedro_project import run

TEXT = {"datasets": [{"name": "a", "path": "data/01_raw/a.jsonl", "data_type": "jsonl"}], "demo": None}


@pytest.fixture
def real(project: Path) -> Path:
    """A project with the real pipelines."""
    pipelines.configure("qvl_pipeline.pipeline_registry")
    return project


def declared(project: Path) -> dict[str, Block]:
    """The blocks of the embedded example that decide its data."""
    values = yaml.safe_load((project / "conf/tiny_qwen3_vl/parameters.yml").read_text())
    return {block: BLOCKS[block](**values[block]) for block in ("ingest", "validate", "sample", "model")}


def put(project: Path, name: str, record: dict[str, Any]) -> None:
    """Put a hand-over in its place: one with a record and nothing else in it."""
    catalog = ProfileLoader(str(project / "conf"), **CONFIG_LOADER_ARGS)["catalog"]
    path = project / catalog[name]["filepath"]
    path.parent.mkdir(parents=True, exist_ok=True)
    attrs, schema = {"made_with": record}, pa.schema([])
    if "schema" in catalog[name]:
        schema = load_obj(catalog[name]["schema"])
    if path.suffix == ".json":
        path.write_text("{}")
    elif name not in RECORDED and path.suffix != ".parquet":
        path.touch()
    elif path.suffix == ".parquet":
        pq.write_table(schema.empty_table().cast(with_attrs(schema, attrs)), path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), with_attrs(schema, attrs)):
            pass
    else:
        path.mkdir(exist_ok=True)
        write_record(path, attrs)


def refusal(project: Path, *names: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(project, *names, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "entry", "changed", "said", "needed"),
    [
        ("validate", "samples", {"ingest": {"eval_fraction": 0.5}}, "ingest.eval_fraction", "ingest"),
        ("sample", "valid_samples", {"ingest": {"eval_fraction": 0.5}}, "ingest.eval_fraction", "ingest,validate"),
        ("sample", "valid_samples", {"validate": {"max_text_chars": 7}}, "validate.max_text_chars", "validate"),
        (
            "tokenize",
            "sampled_samples",
            {"validate": {"max_text_chars": 7}},
            "validate.max_text_chars",
            "validate,sample",
        ),
        ("tokenize", "sampled_samples", {"sample": {"fps": 7}}, "sample.fps", "sample"),
        ("train", "tokenized_samples", {"sample": {"fps": 7}}, "sample.fps", "sample,tokenize"),
        ("evaluate", "sampled_samples", {"sample": {"fps": 7}}, "sample.fps", "sample,tokenize"),
    ],
)
def test_every_stage_refuses_an_input_of_other_parameters(
    real: Path, stage: str, entry: str, changed: dict[str, Any], said: str, needed: str
) -> None:
    blocks = declared(real)
    for name in {name for other in STAGES[1:] for name in pipelines[other].inputs() if not name.startswith("params:")}:
        put(real, name, made_with({}, **{block: blocks[block] for block in RECORDED.get(name, ())})["made_with"])
    message = refusal(real, stage, params=changed)
    assert message.startswith(f"{stage} cannot start, because {entry} (data/")
    assert f") was made with {said} = " in message
    again = f"make it again by `kedro run --pipelines {needed}` with the same --params."
    assert f": give this run the former, or {again}" in message
    assert ("Profiles that are to differ in this need a `dataset` each" in message) == ("sample" not in changed)
    assert "\n" not in message


def test_the_frames_are_as_decisive_as_the_tokens(real: Path) -> None:
    """`sample` was run again with other parameters, but not `tokenize`."""
    blocks = declared(real)
    for name in {entry for entry in pipelines["train"].inputs() if not entry.startswith("params:")}:
        others = {"sample": BLOCKS["sample"](fps=9)} if name == "video_frames" else {}
        chain = {block: blocks[block] for block in RECORDED.get(name, ())}
        put(real, name, made_with({}, **chain | others)["made_with"])
    message = refusal(real, "train")
    assert "video_frames (data/05_model_input/tiny_qwen3_vl/video_frames) was made with sample." in message


def test_an_output_of_an_earlier_version_is_to_be_made_again(real: Path) -> None:
    put(real, "samples", {})
    put(real, "rejects", {})
    assert refusal(real, "validate", env="tiny_qwen2_5_vl") == (
        "validate cannot start, because samples (data/02_intermediate/digits/samples.parquet) does not say with which "
        "parameters of 'ingest' it was made: make it again by `kedro run --pipelines ingest --env tiny_qwen2_5_vl`. "
        "Profiles that are to differ in this need a `dataset` each, in their globals.yml."
    )


@pytest.mark.parametrize("entry", ["tokenized_samples", "video_frames"])
def test_an_input_that_was_cut_off_is_to_be_made_again(real: Path, entry: str) -> None:
    blocks = declared(real)
    for name in {entry for entry in pipelines["train"].inputs() if not entry.startswith("params:")}:
        put(real, name, made_with({}, **{block: blocks[block] for block in RECORDED.get(name, ())})["made_with"])
    files = {"tokenized_samples": "tokenized.arrow", "video_frames": "video_frames/made_with.json"}
    path = real / "data/05_model_input/tiny_qwen3_vl" / files[entry]
    path.write_bytes(path.read_bytes()[:10])
    message = refusal(real, "train")
    assert message.startswith(f"train cannot start, because {entry} (data/05_model_input/tiny_qwen3_vl/")
    assert ") cannot be read (" in message
    assert "make it again by `kedro run --pipelines " in message
    assert "\n" not in message


def test_two_profiles_of_one_dataset_cannot_take_each_others_tables(real: Path) -> None:
    folder = real / "conf/mine"
    folder.mkdir()
    (folder / "globals.yml").write_text("profile: mine\ndataset: digits\n")
    blocks = yaml.safe_load((real / "conf/tiny_qwen3_vl/parameters.yml").read_text())
    blocks["ingest"] = {**TEXT, "eval_fraction": 0.5}
    (folder / "parameters.yml").write_text(yaml.safe_dump(blocks))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = real / "data/01_raw/a.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(4)))
    run(real, "ingest", "validate", params={"ingest": TEXT})
    valid = real / "data/03_primary/digits/valid_samples.parquet"
    assert list(read_record(valid)) == ["ingest", "validate"]
    before = valid.read_bytes()
    message = refusal(real, "validate", env="mine")
    assert "was made with ingest.eval_fraction = 0.0, but this run has 0.5" in message
    assert "again by `kedro run --pipelines ingest --env mine`." in message
    assert "again by `kedro run --pipelines ingest,validate --env mine`." in refusal(real, "sample", env="mine")
    assert valid.read_bytes() == before
    # What its own run makes is its own, and now the other is refused.
    run(real, "ingest", "validate", env="mine")
    assert "ingest.eval_fraction = 0.5, but this run has 0.0" in refusal(real, "sample", params={"ingest": TEXT})
