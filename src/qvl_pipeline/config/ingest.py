"""Parameters of the `ingest` stage: which sources make up the dataset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block


class DatasetSource(Block):
    """One declared source of samples.

    Attributes:
        name: Name of the source, the first part of every `sample_id`. Letters, digits, `_`, `-` and `.`.
        path: File (or folder of parquet/arrow files), relative to the project root or absolute.
        data_folder: Folder that relative media paths start from; media outside of it are refused.
        data_type: File type of `path`.
        split: Split of every row; `None` takes the row's own `split` column, else a seeded hash with `eval_fraction`.
        weight: How often each training sample of the source is seen per epoch. A fraction takes that share of them.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    path: str
    data_folder: str = ""
    data_type: Literal["parquet", "json", "jsonl"]
    split: Literal["train", "eval"] | None = None
    weight: float = Field(default=1.0, gt=0)


class DigitsDemoConfig(Block):
    """The embedded dataset of real handwritten digits, drawn into images and clips.

    Attributes:
        folder: Where the files are written, relative to the project root.
        seed: Seed of every choice made while drawing.
        train_samples: Number of good training samples, all kinds together.
        eval_samples: Number of good evaluation samples, all kinds together.
    """

    folder: str = "data/01_raw/digits"
    seed: int = 0
    train_samples: int = Field(default=4000, ge=1)
    eval_samples: int = Field(default=280, ge=1)


class IngestConfig(Block):
    """Parameters of the `ingest` stage.

    Attributes:
        demo: The embedded dataset to build first; `None` when the sources are your own.
        datasets: The declared sources, in order.
        eval_fraction: Share of rows without a stated split that go to `eval`.
        seed: Seed of the hash that assigns splits.
    """

    demo: DigitsDemoConfig | None = None
    datasets: list[DatasetSource] = Field(min_length=1)
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    seed: int = 42

    @model_validator(mode="after")
    def _unique_names(self) -> IngestConfig:
        names = [source.name for source in self.datasets]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"datasets: the name '{doubled[0]}' is used twice; give each source its own name")
        return self
