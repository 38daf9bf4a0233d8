"""Parameters of the pack plan: which samples share a pack, and which packs form an optimizer step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block, Indifferent


class BatchingConfig(Block):
    """The declared batches. They are the same on any number of ranks; ranks only share them out.

    Attributes:
        dataset_type: `vision`, `vision_audio` and `qwen3_vl` are map-style: the whole training is planned before it
            starts. Sounds are data of any type; `vision_audio` says that the model must hear. Of the
            iterable types `vision_iterable` and `qwen3_vl_iterable`, samples are tokenised, shuffled and packed as they
            are read, without a plan, for `max_steps` steps, however many passes that takes.
        packing: Several samples per pack; otherwise each pack is one sample.
        packing_strategy: `best_fit` (best-fit-decreasing over the whole epoch) fills packs best, unless
            `packing_vit_patches` is as scarce as tokens. `first_fit` keeps the shuffled order. `balanced` makes packs
            of equal work, counting attention and vision tower: ranks wait less for each other, and packs are about 99 %
            full. Iterable types choose among the samples that wait.
        packing_length: Token budget of one pack.
        packing_vit_patches: Vision patch budget of one pack; `None` sets none.
        filter_overlong: Leave out samples longer than `packing_length` (each is listed); `false` refuses them.
        max_reject_fraction: Share of the training samples that may be left out, because they are longer than
            `packing_length` or cannot be tokenised, before `tokenize` fails. Of iterable types, the samples that are
            tokenised beforehand count.
        per_device_train_batch_size: Packs in one micro-batch of one rank.
        gradient_accumulation_steps: Micro-batches of one rank per optimizer step, at `data_parallel_size` ranks.
        data_parallel_size: Data-parallel ranks the global batch is declared for. On another number of ranks the global
            batch stays, and the number of micro-batches changes.
        num_train_epochs: Passes over the training samples.
        max_steps: Optimizer steps; overrides `num_train_epochs` when positive.
        group_by_length: Without packing, batch samples of similar length. Packs are of equal length already.
        shuffle_buffer_size: Iterable types: samples that the next one is drawn from, over all packs of a step; 1 keeps
            the order.
        seed: Seed of the order of samples.
    """

    dataset_type: Literal["vision", "vision_audio", "vision_iterable", "qwen3_vl", "qwen3_vl_iterable"] = "vision"
    packing: bool = True
    packing_strategy: Literal["best_fit", "first_fit", "balanced"] = "best_fit"
    packing_length: int = Field(default=16_384, ge=16)
    packing_vit_patches: int | None = Field(default=None, ge=4)
    filter_overlong: bool = True
    # A limit on what may be lost was kept to when the plan was made, or there is none.
    max_reject_fraction: Annotated[float, Indifferent()] = Field(default=0.05, ge=0, le=1)
    per_device_train_batch_size: int = Field(default=1, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1)
    num_train_epochs: int = Field(default=1, ge=1)
    max_steps: int = Field(default=-1, ge=-1)
    group_by_length: bool = False
    shuffle_buffer_size: int = Field(default=10_000, ge=1)
    seed: int = Field(default=42, ge=0)

    @model_validator(mode="after")
    def _iterable_needs_steps(self) -> BatchingConfig:
        if self.streamed and self.max_steps < 1:
            raise ValueError(f"dataset_type '{self.dataset_type}' has no length: set max_steps to the steps to train")
        if self.streamed and self.num_train_epochs != 1:
            raise ValueError(
                f"num_train_epochs means nothing with dataset_type '{self.dataset_type}', which is read for max_steps "
                "steps, however many passes that takes: drop it, or set it to 1"
            )
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: nothing would be trained; give a positive number, or -1 for epochs")
        return self

    @model_validator(mode="after")
    def _stream_knows_no_lengths_beforehand(self) -> BatchingConfig:
        if not self.streamed:
            if "shuffle_buffer_size" in self.model_fields_set:
                raise ValueError(
                    f"shuffle_buffer_size is for iterable types: dataset_type '{self.dataset_type}' shuffles everything"
                )
            return self
        if not self.packing and self.group_by_length:
            raise ValueError(
                f"group_by_length needs the lengths of all samples, which dataset_type '{self.dataset_type}' does not "
                "have: set packing: true, or use a map-style dataset_type"
            )
        return self

    @property
    def streamed(self) -> bool:
        """Whether training runs without a plan."""
        return self.dataset_type.endswith("iterable")

    @property
    def packs_per_step(self) -> int:
        """Packs of one optimizer step over all ranks: the global batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.data_parallel_size
