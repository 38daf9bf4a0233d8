from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset
from qwen_vl_utils.vision_process import calculate_video_frame_range
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qvl_pipeline.config import (
    BatchingConfig,
    DataEngineConfig,
    IngestConfig,
    ModelConfig,
    SampleConfig,
    ValidateConfig,
)
from qvl_pipeline.data.made_with import made_with, read_record
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.data.plan.steps import make_plan
from qvl_pipeline.datasets import FileDataset, FolderDataset, TableDataset
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStore, clip_id
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.pipelines.sample.pipeline import create_pipeline as create_sample
from qvl_pipeline.pipelines.tokenize.nodes import plan, prepare_base_model, tokenize
from qvl_pipeline.pipelines.tokenize.pipeline import create_pipeline as create_tokenize
from tests.data.samples import samples_table, write_images
from tests.media.clips import index_clips, number_in, write_clip

SECONDS = {
    "constant": [number / 10 for number in range(60)],
    "ntsc": [number * 1001 / 30000 for number in range(90)],
    "variable": np.concatenate([np.arange(40) / 20, 2 + np.arange(20) / 2]).tolist(),
}
TIME_BASES = {"constant": Fraction(1, 10), "ntsc": Fraction(1001, 30000), "variable": Fraction(1, 1000)}
INGEST = IngestConfig(datasets=[{"name": "source", "path": "x", "data_type": "json"}])
SAMPLE = SampleConfig(
    fps=3, video_min_frames=2, video_max_frames=12, video_min_pixels=1024, video_max_pixels=64 * 64, frame_cache=None
)
BATCHING = BatchingConfig(packing_length=256, max_reject_fraction=0.2)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(processor_type=request.param, image_max_pixels=100 * 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name, seconds in SECONDS.items():
        write_clip(folder / f"{name}.mp4", seconds, time_base=TIME_BASES[name], b_frames=2)
    return folder


@pytest.fixture(scope="module")
def media_index(folder: Path) -> pd.DataFrame:
    images = write_images(folder, {"a.png": (80, 120)})
    return pd.concat([images, index_clips(sorted(folder.glob("*.mp4")))], ignore_index=True)


@pytest.fixture(scope="module")
def valid_samples(folder: Path) -> pd.DataFrame:
    def clip(name: str, start: float | None = None, end: float | None = None) -> tuple:
        return ("video", str(folder / f"{name}.mp4"), start, end)

    image = ("image", str(folder / "a.png"))
    questions = {
        "constant": [clip("constant"), "?"],
        "ntsc_part": [clip("ntsc", 0.4, 2.3), "?"],
        "variable": [clip("variable"), "?"],
        "variable_part": [clip("variable", 1.5, 8.0), "?"],
        "two_videos": [clip("ntsc"), "and", clip("variable", 2.0, None), "?"],
        "image_and_video": [image, clip("constant", 3.0, None), "?"],
        "text": ["What is 3 + 4?"],
    }
    rows = [{"kind": kind, "messages": [("user", parts), ("assistant", "7")]} for kind, parts in questions.items()]
    turns = [("user", [clip("variable", 0.2, None)]), ("assistant", "1"), ("user", [clip("ntsc")]), ("assistant", "2")]
    long = [("user", "one two three " * 200), ("assistant", "7")]
    table = samples_table([*rows, {"kind": "two_turns", "messages": turns}, {"kind": "long", "messages": long}])
    table.attrs = made_with({}, validate=ValidateConfig())
    return table


@pytest.fixture(scope="module")
def run(
    model: ModelConfig,
    valid_samples: pd.DataFrame,
    media_index: pd.DataFrame,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Both stages, run by Kedro; every catalog entry by name."""
    folder = tmp_path_factory.mktemp("run")
    memory = {
        "valid_samples": valid_samples,
        "media_index": media_index,
        "params:sample": SAMPLE,
        "params:model": model,
        "params:batching": BATCHING,
        "params:data_engine": DataEngineConfig(),
        "params:ingest": INGEST,
    }
    catalog = DataCatalog(
        {name: MemoryDataset(value) for name, value in memory.items()}
        | {
            name: MemoryDataset()
            for name in (
                *("pack_plan", "token_statistics", "label_preview"),
                *("sample_quarantine", "sample_report", "sampled_samples"),
            )
        }
        | {name: FolderDataset(filepath=str(folder / name)) for name in ("video_frames", "base_model")}
        | {"tokenized_samples": FileDataset(filepath=str(folder / "tokenized.arrow"))}
        | {"stream_samples": FileDataset(filepath=str(folder / "stream.parquet"))}
        | {
            "tokenize_quarantine": TableDataset(
                filepath=str(folder / "tokenize_quarantine.parquet"), schema="qvl_pipeline.data.tables.QUARANTINE"
            )
        }
        | {"plan_summary": JSONDataset(filepath=str(folder / "plan_summary.json"))}
    )
    SequentialRunner().run(create_sample() + create_tokenize(), catalog)
    return {name: catalog.load(name) for name in create_tokenize().all_outputs() | {"video_frames"}}


def frames_shown(run: dict[str, Any], sample: pd.Series) -> list[list[float]]:
    """True seconds of the frames that the pictures of each clip of a sample show."""
    store = FrameStore(run["video_frames"])
    clips = [item for item in sample["media"] if item["type"] == "video"]
    return [
        [
            SECONDS[Path(item["path"]).stem][number_in(frame.transpose(1, 2, 0))]
            for frame in store.frames(clip_id(item["path"], item["start"], item["end"]))
        ]
        for item in clips
    ]


def test_qwen3_vl_reads_the_time_at_which_the_source_shows_the_frames(
    run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame
) -> None:
    processor = load_processor(run["base_model"], model)
    tokenized = TokenizedSamples(run["tokenized_samples"])
    for index, sample in valid_samples.iterrows():
        text = processor.tokenizer.decode(tokenized.row(index)["input_ids"])
        read = re.findall(r"<(\d+\.\d) seconds>", text)
        pairs = [np.reshape(shown, (-1, 2)).mean(axis=1) for shown in frames_shown(run, sample)]
        expected = [f"{second:.1f}" for pair in pairs for second in pair]
        assert read == (expected if model.processor_type == "qwen3_vl" else [])


def official_interval(item: dict[str, Any], frames_taken: int) -> float:
    """Seconds of a temporal patch by qwen_vl_utils' `sample_fps`."""
    rate = float(1 / TIME_BASES[Path(item["path"]).stem])
    part = {f"video_{name}": item[name] for name in ("start", "end") if item[name] is not None}
    *_, frames = calculate_video_frame_range(part, len(SECONDS[Path(item["path"]).stem]), rate)
    return 2 / (frames_taken / frames * rate)


def test_the_interval_told_is_the_official_one_and_the_true_one_where_the_rate_varies(
    run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame
) -> None:
    """What Qwen2.5-VL is told; Qwen3-VL reads seconds, and its interval is always the true one."""
    tokenized = TokenizedSamples(run["tokenized_samples"])
    official = 0
    for index, sample in valid_samples.iterrows():
        media = [medium for medium in tokenized.row(index)["media"] if medium["type"] == "video"]
        items = [item for item in sample["media"] if item["type"] == "video"]
        for item, medium, shown in zip(items, media, frames_shown(run, sample), strict=True):
            if model.processor_type == "qwen2_5_vl" and "variable" not in item["path"]:
                assert medium["seconds_per_grid"] == pytest.approx(official_interval(item, len(shown)), rel=1e-12)
                official += 1
                continue
            true = np.reshape(shown, (-1, 2)).mean(axis=1)
            told = true[0] + np.arange(medium["grid_t"]) * medium["seconds_per_grid"]
            assert np.abs(told - true).max() <= np.diff(SECONDS[Path(item["path"]).stem]).max()
    assert official == (5 if model.processor_type == "qwen2_5_vl" else 0)


def test_the_parameters_of_all_stages_before_are_recorded_with_the_tokens_and_the_frames(
    run: dict[str, Any], model: ModelConfig
) -> None:
    record = made_with({}, validate=ValidateConfig(), sample=SAMPLE, model=model)["made_with"]
    assert read_record(run["tokenized_samples"]) == read_record(run["video_frames"]) == record


def test_every_sample_is_a_row_whose_placeholders_and_patches_agree(
    run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame
) -> None:
    tokenized = TokenizedSamples(run["tokenized_samples"])
    processor = load_processor(run["base_model"], model)
    loader = PatchLoader(patch_size=model.family.patch_size, frame_store=run["video_frames"])
    rows = [tokenized.row(index) for index in range(len(tokenized))]
    assert [row["sample_id"] for row in rows] == valid_samples["sample_id"].tolist()
    for row in rows:
        placeholders = np.isin(row["input_ids"], [processor.image_token_id, processor.video_token_id]).sum()
        assert 4 * placeholders == row["vit_patches"] == len(loader.load(row["media"]))


def test_the_plan_holds_whole_samples_and_lists_those_that_are_too_long(
    run: dict[str, Any], valid_samples: pd.DataFrame
) -> None:
    """Nothing is truncated: a sample is in a pack with all its tokens, or on the list."""
    lengths = TokenizedSamples(run["tokenized_samples"]).columns(["length"])["length"].to_numpy()
    long = valid_samples.index[valid_samples["kind"] == "long"].tolist()
    assert run["plan_summary"]["overlong"] == valid_samples.loc[long, "sample_id"].tolist()
    assert lengths[long[0]] > 256
    planned = np.concatenate(run["pack_plan"]["sample_rows"].tolist())
    assert sorted([*planned, *long]) == list(range(len(valid_samples)))
    assert run["pack_plan"]["tokens"].tolist() == [lengths[rows].sum() for rows in run["pack_plan"]["sample_rows"]]


def test_no_budget_cuts_a_medium(run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame) -> None:
    """Whatever the budget, a sample is planned with all tokens of its media, or listed: never a part of it."""
    tokenized = TokenizedSamples(run["tokenized_samples"])
    processor = load_processor(run["base_model"], model)
    rows = [tokenized.row(index) for index in range(len(tokenized))]
    pads = [processor.image_token_id, processor.video_token_id]
    placeholders = np.array([np.isin(row["input_ids"], pads).sum() for row in rows])
    with_media = [row["length"] for row in rows if row["media"]]
    for budget in range(min(with_media), max(with_media) + 1, 3):
        pack_plan, summary = make_plan(run["tokenized_samples"], BatchingConfig(packing_length=budget), {"source": 1.0})
        planned = [samples.tolist() for samples in pack_plan["sample_rows"]]
        listed = [number for number, row in enumerate(rows) if row["sample_id"] in summary["overlong"]]
        assert sorted([*np.concatenate(planned), *listed]) == list(range(len(rows)))
        assert listed == [number for number, row in enumerate(rows) if row["length"] > budget]
        assert pack_plan["vit_patches"].tolist() == [4 * placeholders[samples].sum() for samples in planned]


def test_sizes_that_are_not_those_of_the_files_stop_the_stage(
    run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame, media_index: pd.DataFrame
) -> None:
    wrong = media_index.assign(width=media_index["width"].where(media_index["type"] != "image", 300))
    with pytest.raises(UserError, match=r"the processor makes \d+ tokens and \d+ patches of .*, but"):
        tokenize(valid_samples, wrong, run["video_frames"], run["base_model"], model, BATCHING, DataEngineConfig())


def test_the_tiny_model_is_a_folder_that_plain_transformers_loads(run: dict[str, Any], model: ModelConfig) -> None:
    manifest = json.loads((run["base_model"] / "manifest.json").read_text())
    assert manifest == {"path": ".", "family": model.processor_type, "parameters": model.decisive("tokens")}
    loaded = AutoModelForImageTextToText.from_pretrained(run["base_model"])
    assert loaded.config.model_type == model.processor_type
    assert type(AutoProcessor.from_pretrained(run["base_model"])).__name__.lower().startswith("qwen")


def test_the_tokenizer_of_the_tiny_model_sees_no_eval_text(model: ModelConfig, tmp_path: Path) -> None:
    turns = [("user", "zebra zebra"), ("assistant", "zebra")]
    train = {"messages": [("user", "digit"), ("assistant", "7")]}
    for name, rows in {"with": [train, {"split": "eval", "messages": turns}], "without": [train]}.items():
        prepare_base_model(samples_table(rows), model)(tmp_path / name)
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == (tmp_path / "without" / "tokenizer.json").read_bytes()


def test_a_pretrained_model_is_pointed_to(
    run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame, tmp_path: Path
) -> None:
    pretrained = model.model_copy(update={"load_from_pretrained_path": str(run["base_model"])})
    prepare_base_model(valid_samples, pretrained)(tmp_path / "base")
    manifest = json.loads((tmp_path / "base" / "manifest.json").read_text())
    path = str(run["base_model"])
    assert (manifest["path"], manifest["processor"], manifest["family"]) == (path, path, model.processor_type)
    assert AutoConfig.from_pretrained(manifest["path"]).model_type == model.processor_type
    assert load_processor(tmp_path / "base", pretrained).image_processor.size["longest_edge"] == 100 * 100


def test_a_model_that_is_not_there_is_an_error(model: ModelConfig, valid_samples: pd.DataFrame) -> None:
    missing = model.model_copy(update={"load_from_pretrained_path": "./no/such/model"})
    with pytest.raises(UserError, match=r"'./no/such/model' is neither a model folder nor a hub id"):
        prepare_base_model(valid_samples, missing)


def test_a_model_of_another_family_is_an_error(
    run: dict[str, Any], model: ModelConfig, valid_samples: pd.DataFrame
) -> None:
    other = {"qwen3_vl": "qwen2_5_vl", "qwen2_5_vl": "qwen3_vl"}[model.processor_type]
    wrong = ModelConfig(processor_type=other, load_from_pretrained_path=str(run["base_model"]))
    with pytest.raises(UserError, match=f"is of type {model.processor_type}, but model.processor_type is {other}"):
        prepare_base_model(valid_samples, wrong)


def test_the_plan_is_summed_up_in_print(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan(run["tokenized_samples"], run["stream_samples"], run["tokenize_quarantine"], BATCHING, INGEST)
    printed = capsys.readouterr().out
    summary = run["plan_summary"]
    for text in (f"{summary['packs']} of 256 tokens", f"{summary['tokens']:,}", "1 left out, the first is source/8"):
        assert text in printed


@pytest.mark.parametrize(
    ("changes", "proposes"),
    [
        ({"data_parallel_size": 3}, True),
        ({}, False),
        ({"data_parallel_size": 3, "packing_strategy": "balanced"}, False),
        # One pack, which the other of two ranks waits for whatever is in it.
        ({"data_parallel_size": 2, "packing_length": 16_384}, False),
    ],
)
def test_packs_that_let_ranks_wait_are_not_taken_in_silence(
    changes: dict[str, Any], proposes: bool, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan(
        run["tokenized_samples"],
        run["stream_samples"],
        run["tokenize_quarantine"],
        BATCHING.model_copy(update=changes),
        INGEST,
    )
    assert ("'balanced'" in capsys.readouterr().out) == proposes


def test_each_source_is_summed_up_and_printed(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan(run["tokenized_samples"], run["stream_samples"], run["tokenize_quarantine"], BATCHING, INGEST)
    printed = capsys.readouterr().out
    summary = run["plan_summary"]
    [source] = summary["sources"]
    assert (source["source"], source["samples"], source["overlong"], source["share"]) == ("source", 8, 1, 1.0)
    assert (source["tokens"], source["supervised_tokens"]) == (summary["tokens"], summary["supervised_tokens"])
    assert re.search(rf"source\s*│ 8\s*│ {summary['tokens']:,}\s*│ {summary['supervised_tokens']:,}", printed)


def test_the_label_preview_shows_every_sample_that_is_trained_on(
    run: dict[str, Any], valid_samples: pd.DataFrame
) -> None:
    shown = re.findall(r"<h3>(source/\d) ", run["label_preview"])
    trained = valid_samples["kind"] != "long"
    assert shown == valid_samples.loc[trained, "sample_id"].tolist()
    assert run["token_statistics"]["clips"]["total"] == 9


def test_what_is_left_out_is_said_before_training_and_may_be_too_much(
    run: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = (run["tokenized_samples"], run["stream_samples"], run["tokenize_quarantine"])
    plan(*inputs, BATCHING, INGEST)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    longest = TokenizedSamples(run["tokenized_samples"]).columns(["length"])["length"].to_numpy().max()
    expected = (
        r"1 of 9 training samples \(11\.1%\) are left out: 1 are longer than packing_length \(256 tokens\), the first "
        rf"is source/8, the longest has {longest:,} tokens and the largest 0 patches: raise batching.packing_length"
    )
    assert any(re.fullmatch(expected, line) for line in warned)
    with pytest.raises(UserError, match=expected + r", or raise the limit: it is more than the 5\.0% that batching\."):
        plan(*inputs, BatchingConfig(packing_length=256), INGEST)


def test_a_sample_that_the_template_refuses_is_counted_listed_and_left_out(
    run: dict[str, Any], model: ModelConfig, media_index: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Templates refuse what they do not know, by `raise_exception` or by failing in any other way."""
    shutil.copytree(run["base_model"], tmp_path / "base")
    template = (tmp_path / "base" / "chat_template.jinja").read_text()
    refusing = "{%- if messages[0].content[0].text == 'refuse' -%}{{ 1 // 0 }}{%- endif -%}"
    (tmp_path / "base" / "chat_template.jinja").write_text(refusing + template)
    samples = samples_table([{"messages": [("user", text), ("assistant", "7")]} for text in ("a", "refuse", "b")])
    write_tokens, _, write_quarantine = tokenize(
        samples, media_index, run["video_frames"], tmp_path / "base", model, BATCHING, DataEngineConfig()
    )
    write_tokens(tmp_path / "tokenized.arrow")
    write_quarantine(tmp_path / "quarantine.parquet")
    quarantine = pd.read_parquet(tmp_path / "quarantine.parquet")
    assert quarantine.to_dict("records") == [
        {"sample_id": "source/1", "source": "source", "row": 1, "split": "train", "rule": "template_refusal"}
        | {"detail": "the chat template refuses it: integer division or modulo by zero"}
    ]
    assert "template_refusal: 1, for example source/1: the chat template refuses it" in caplog.text
    kept = TokenizedSamples(tmp_path / "tokenized.arrow").columns(["sample_id"])["sample_id"].to_pylist()
    assert kept == ["source/0", "source/2"]
    batching = BATCHING.model_copy(update={"max_reject_fraction": 0.34})
    _, summary = plan(tmp_path / "tokenized.arrow", tmp_path / "none", quarantine, batching, INGEST)
    assert (summary["quarantined"], summary["samples"]) == ({"template_refusal": 1}, 2)
    with pytest.raises(UserError, match=r"1 of 3 .* left out: 1 cannot be tokenised, by template_refusal \(1\): mend"):
        plan(tmp_path / "tokenized.arrow", tmp_path / "none", quarantine, BATCHING, INGEST)
