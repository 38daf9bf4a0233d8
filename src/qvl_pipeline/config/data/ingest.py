"""Parameters of the `ingest` stage: which sources make up the dataset."""

from __future__ import annotations

import os.path
import posixpath
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from qvl_pipeline.config.base import Block, Indifferent
from qvl_pipeline.secrets import url_holds_secret

# What fsspec's file systems call their credentials. Parameters are written to MLflow, DVC and logs.
_SECRET = re.compile(r"secret|password|passwd|token|credential|(^|_)(key|sas)$|connection_string", re.IGNORECASE)


BenchmarkName = Literal[
    *("chartqa", "docvqa", "textvqa", "mmmu", "mathvista", "ai2d", "realworldqa", "videomme", "mlvu")
]


class DatasetSource(Block):
    """One declared source of samples.

    Attributes:
        name: Name of the source, the first part of every `sample_id`. Letters, digits, `_`, `-` and `.`. Default: the
            name of the file or folder, without its endings.
        path: File, or folder of files of the type, relative to the project root or absolute; or a URL that fsspec knows
            (`s3://`, `gs://`, …).
        data_folder: Folder that relative media paths start from; media outside of it are refused. May be a URL too:
            its media are then copied into `ingest.cache_folder`.
        data_type: File type of `path`. `json` is a list of rows, `jsonl` a row a line; these and `csv` may be
            compressed (`.gz`, `.zst`). `arrow` is Arrow IPC, file or stream; `hf_dataset` a folder that `save_to_disk`
            of Hugging Face datasets made; `webdataset` a tar archive in which neighbours of one name are a sample.
        benchmark: Published benchmark that the rows are of, in the layout of its Hugging Face repository: they are
            evaluated by `evaluate` alone, neither trained on nor in the loss over the eval split. `path` is the folder
            of the repository, whose split that is quoted is read, or a file of it.
        format: Form of the rows. `auto` detects it row by row; a stated form rejects rows of any other. `text`, plain
            texts of which all tokens are trained on, must be stated.
        split: Split of every row; `None` takes the row's own `split` column, else a seeded hash with `eval_fraction`.
            The rows of a benchmark are a split of their own, `benchmark`.
        weight: How often each training sample of the source is seen per epoch. A fraction takes that share of them.
        repeat: Whole number that `weight` is multiplied with; rows are not stored more than once.
        limit: Only the first rows, so many of the source, are read; `None` reads all.
        storage_options: Options of the file system of the URLs, such as `endpoint_url` or `anon`. Credentials do not
            belong here, but into the environment or the files where the library of the file system looks for them.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    path: str = Field(min_length=1)
    data_folder: str = ""
    data_type: Literal["parquet", "json", "jsonl", "csv", "arrow", "hf_dataset", "webdataset"]
    benchmark: BenchmarkName | None = None
    format: Literal["auto", "openai", "sharegpt", "llava", "alpaca", "text"] = "auto"
    split: Literal["train", "eval", "benchmark"] | None = None
    # These two are for the plan.
    weight: Annotated[float, Indifferent("frames")] = Field(default=1.0, gt=0)
    repeat: Annotated[int, Indifferent("frames")] = Field(default=1, ge=1)
    limit: int | None = Field(default=None, ge=1)
    storage_options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_by_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") is None and isinstance(values.get("path"), str):
            stem = values["path"].rstrip("/").rpartition("/")[2].partition(".")[0]
            return {**values, "name": re.sub(r"[^A-Za-z0-9_-]", "_", stem) or "source"}
        return values

    @model_validator(mode="before")
    @classmethod
    def _benchmark_says_the_rest(cls, values: Any) -> Any:
        # Before the name is taken from the path: of such validators, the last one is first.
        if not isinstance(values, dict) or not isinstance(values.get("benchmark"), str):
            return values
        path = str(values.get("path", ""))
        folder = path.rpartition("/")[0] if path.endswith(".parquet") else path
        said = {"name": values["benchmark"], "data_type": "parquet", "data_folder": folder, "split": "benchmark"}
        return said | {key: value for key, value in values.items() if key not in said or value is not None}

    @model_validator(mode="after")
    def _no_secrets(self) -> DatasetSource:
        for key in _secret_keys(self.storage_options):
            raise ValueError(
                f"storage_options.{key} looks like a credential, and parameters are recorded: give it to the library "
                "of the file system in the environment (AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …)"
            )
        for name in ("path", "data_folder"):
            if secret := url_holds_secret(getattr(self, name)):
                raise ValueError(
                    f"{name} holds {secret}, and parameters are recorded: give the credentials in the environment"
                )
        return self

    @model_validator(mode="after")
    def _given_values_are_used(self) -> DatasetSource:
        if self.storage_options and "://" not in self.path + self.data_folder:
            raise ValueError(f"storage_options are for URLs, and '{self.path}' is a local path: drop them")
        for key in ("weight", "repeat"):
            if self.split in ("eval", "benchmark") and getattr(self, key) != 1:
                raise ValueError(
                    f"{key} is for samples that are trained on, and split is '{self.split}': drop one of them"
                )
        return self

    @model_validator(mode="after")
    def _benchmarks_are_not_trained_on(self) -> DatasetSource:
        if self.benchmark is None and self.split == "benchmark":
            raise ValueError("split 'benchmark' is for the rows of one: say which as `benchmark`, or take 'eval'")
        if self.benchmark and self.split != "benchmark":
            raise ValueError(
                f"benchmark is {self.benchmark}, whose rows are evaluated and never trained on, and split is "
                f"'{self.split}': drop split"
            )
        if self.benchmark and (self.format != "auto" or self.data_type != "parquet"):
            raise ValueError(
                f"benchmark is {self.benchmark}, whose files and columns are known: drop format, data_type"
            )
        return self

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return what decides the samples; two spellings of one path are the same."""
        kept = super().decisive(of)
        places = {key: kept[key] for key in ("path", "data_folder") if "://" not in kept[key]}
        return kept | {key: _from_project(place) for key, place in places.items()}


DemoKind = Literal[
    *("single_image", "two_images", "video", "image_and_video", "two_videos", "text", "multi_turn", "next_digit"),
    *("audio", "audio_and_image"),
]


class DigitsDemoConfig(Block):
    """The embedded dataset of real handwritten digits, drawn into images and clips, and of spoken ones.

    Attributes:
        folder: Where the files are written, relative to the project root.
        seed: Seed of every choice made while drawing.
        train_samples: Number of good training samples, all kinds together.
        eval_samples: Number of good evaluation samples, all kinds together.
        kinds: Kinds of questions and their weights in training; in the evaluation all weigh the same. Empty takes the
            mix of the embedded example: all but `next_digit`, which is for an adapter to learn, and
            `audio` and `audio_and_image`, whose spoken digits are for a model that hears.
    """

    folder: str = "data/01_raw/digits"
    seed: int = Field(default=0, ge=0)
    train_samples: int = Field(default=4000, ge=1)
    eval_samples: int = Field(default=280, ge=1)
    kinds: dict[DemoKind, PositiveInt] = Field(default_factory=dict)


class IngestConfig(Block):
    """Parameters of the `ingest` stage.

    Attributes:
        demo: The embedded dataset to build first; `None` when the sources are your own.
        datasets: The declared sources, in order.
        dataset_format: How sources are declared: `yaml`, in `datasets` or in a YAML file.
        dataset_path: YAML file with a list `datasets`, instead of the list here; relative to the project root.
        eval_fraction: Share of rows without a stated split that go to `eval`.
        seed: Seed of the hash that assigns splits.
        cache_folder: Where files go that the stage must make itself: media that are embedded in rows (by content), and
            copies of remote files (by URL and version). Later stages read them there.
    """

    demo: DigitsDemoConfig | None = None
    datasets: list[DatasetSource] = Field(min_length=1)
    dataset_format: Annotated[Literal["yaml"], Indifferent()] = "yaml"
    dataset_path: Annotated[str | None, Indifferent()] = None
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    seed: int = 42
    cache_folder: Annotated[str, Indifferent()] = "data/01_raw/cache"

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return what decides the samples."""
        kept = super().decisive(of)
        if not self.eval_fraction:
            del kept["seed"]
        return kept

    def media_folders(self) -> list[str]:
        """Return the real paths of the folders that media are in: those of the sources, and of what the stage makes."""
        given = [source.data_folder for source in self.datasets if "://" not in source.data_folder]
        own = [f"{self.cache_folder}/{name}" for name in ("embedded", "remote")]
        return sorted({os.path.realpath(folder) for folder in [*given, *own]})

    @model_validator(mode="before")
    @classmethod
    def _read_dataset_path(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("dataset_path"), str):
            return values
        declared = _declared_in(values["dataset_path"])
        if values.get("datasets") not in (None, declared):
            raise ValueError("datasets and dataset_path are both set: declare the sources in one of them")
        return {**values, "datasets": declared}

    @model_validator(mode="after")
    def _unique_names(self) -> IngestConfig:
        names = [source.name for source in self.datasets]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"datasets: the name '{doubled[0]}' is used twice; give each source its own name")
        return self

    @model_validator(mode="after")
    def _splits_are_possible(self) -> IngestConfig:
        if all(source.split in ("eval", "benchmark") for source in self.datasets):
            raise ValueError(
                "datasets: every source has 'split: eval' or is a benchmark, so there is nothing to train on"
            )
        if self.eval_fraction and all(source.split for source in self.datasets):
            raise ValueError("eval_fraction is for sources without a split, and every one has one: drop it")
        return self


def _from_project(path: str) -> str:
    """Return the shortest form of a path, from the project root on where it is inside of that."""
    normal = posixpath.normpath(path)
    inside = Path(normal).is_relative_to(Path.cwd())
    return str(Path(normal).relative_to(Path.cwd())) if inside else normal


def _declared_in(path: str) -> list[Any]:
    """Return the list `datasets` of a YAML file.

    Raises:
        ValueError: There is no such file, or no such list in it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"dataset_path: '{path}' cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or content.keys() != {"datasets"} or not isinstance(content["datasets"], list):
        raise ValueError(f"dataset_path: '{path}' must hold one key, 'datasets', with a list of sources")
    return content["datasets"]


def _secret_keys(options: dict[str, Any]) -> list[str]:
    """Return the keys of options, also of those inside of others, that name a credential; `a.b` is b inside of a."""
    found = []
    for key, value in options.items():
        if _SECRET.search(key):
            found.append(key)
        elif isinstance(value, dict):
            found += [f"{key}.{inner}" for inner in _secret_keys(value)]
    return found
