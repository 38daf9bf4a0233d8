"""What is left out of training, said before it starts: samples that are too long, or that cannot be tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from qvl_pipeline.config import BatchingConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.arrow_rows import TokenizedSamples


@dataclass(frozen=True)
class LeftOut:
    """Training samples that are left out.

    Attributes:
        n: How many.
        of: Training samples in all; of a stream, those that were tokenised to be looked at.
        why: Reasons with their numbers, and the advice.
    """

    n: int
    of: int
    why: str

    @property
    def sentence(self) -> str:
        """What is left out, and what to do."""
        return f"{self.n:,} of {self.of:,} training samples ({self.n / self.of:.1%}) are left out: {self.why}"

    def check(self, batching: BatchingConfig) -> None:
        """Refuse a plan without too many of the samples.

        Raises:
            UserError: More are left out than `max_reject_fraction` allows.
        """
        if self.n > batching.max_reject_fraction * self.of:
            limit = f"{batching.max_reject_fraction:.1%} that batching.max_reject_fraction allows"
            raise UserError(f"{self.sentence}, or raise the limit: it is more than the {limit}")


def count_left_out(
    tokenized_path: Path, quarantine: pd.DataFrame, overlong: Sequence[str], batching: BatchingConfig
) -> LeftOut | None:
    """Count the training samples that are left out.

    Args:
        tokenized_path: File of `tokenized_samples`.
        quarantine: Table `tokenize_quarantine`.
        overlong: Samples that do not fit into a pack.
        batching: The budget of a pack.

    Returns:
        The count; `None` when nothing is left out.
    """
    table = TokenizedSamples(tokenized_path).columns(["sample_id", "split", "length", "vit_patches"]).to_pandas()
    train = table[table["split"] == "train"]
    lost = quarantine[quarantine["split"] == "train"]
    reasons = []
    if overlong:
        long = train[train["sample_id"].isin(overlong)]
        budget = f"packing_length ({batching.packing_length:,} tokens)"
        if batching.packing_vit_patches is not None:
            budget += f" or packing_vit_patches ({batching.packing_vit_patches:,})"
        reasons.append(
            f"{len(overlong):,} are longer than {budget}, the first is {overlong[0]}, the longest has "
            f"{long['length'].max():,} tokens and the largest {long['vit_patches'].max():,} patches"
        )
    if len(lost):
        rules = ", ".join(f"{rule} ({count:,})" for rule, count in Counter(lost["rule"]).most_common())
        reasons.append(f"{len(lost):,} cannot be tokenised, by {rules}")
    if not reasons:
        return None
    advice = ["raise batching.packing_length"] if overlong else []
    advice += ["mend the rows in tokenize_quarantine.parquet"] if len(lost) else []
    why = f"{'; '.join(reasons)}: {' and '.join(advice)}"
    return LeftOut(len(overlong) + len(lost), len(train) + len(lost), why)
