"""Parameters of the engine under the data stages: where rows are worked on, and with how much memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block, Indifferent


class DataEngineConfig(Block):
    """Where the data stages work. Nothing here changes what is written: it is the same bytes with any value.

    (But for rows that are too long for `memory_limit_gib`, which are rejects.)

    Attributes:
        runner: `native` works on this machine, on all of its cores; `ray` on a Ray cluster: `ingest` and `validate` by
            Daft, `sample` and `tokenize` in tasks. The project folder and the media must be at the same path on all
            nodes of the cluster, and the same packages be installed there.
        ray_address: Address of the cluster, such as `ray://head:10001` or `auto`; `None` starts Ray on this machine.
        memory_limit_gib: Memory that `ingest` keeps within, however many rows there are; what Python and its libraries
            take from the start (0.4 GiB) is in it. Of what is above 1 GiB, each process that reads rows has 0.1 GiB: at
            1 GiB one process reads them all. A row that takes more than a fiftieth of it is rejected.
        batch_rows: Most rows that are worked on in one piece. Fewer spread a small file over more cores.
    """

    runner: Annotated[Literal["native", "ray"], Indifferent()] = "native"
    ray_address: Annotated[str | None, Indifferent()] = None
    memory_limit_gib: Annotated[float, Indifferent()] = Field(default=2.0, ge=1.0)
    batch_rows: Annotated[int, Indifferent()] = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _address_needs_ray(self) -> DataEngineConfig:
        if self.ray_address is not None and self.runner != "ray":
            raise ValueError(f"ray_address is set, but runner is '{self.runner}': set it to ray, or drop the address")
        return self
