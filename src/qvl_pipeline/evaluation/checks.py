"""What an evaluation would stumble over, all of which is known before there is a trained model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.evaluation.generation import check_generation
from qvl_pipeline.evaluation.metrics import check_gate, check_scorable
from qvl_pipeline.evaluation.predictions import eval_samples
from qvl_pipeline.media.arrow_rows import TokenizedSamples


def checked_samples(tokenized: Path, evaluate: EvaluateConfig) -> pd.DataFrame:
    """Choose the samples to evaluate, all of which can be scored.

    Args:
        tokenized: Arrow file of the tokenized samples.
        evaluate: Parameters of the stage.

    Returns:
        Table of `eval_samples`.

    Raises:
        UserError: There is nothing to evaluate, a task has no metric, or a source, sample kind or argument of
            generation that `evaluate` names is not there.
    """
    check_generation(evaluate)
    chosen = eval_samples(TokenizedSamples(tokenized), evaluate.max_samples, evaluate.task_by_source)
    check_scorable(chosen)
    check_gate(chosen["kind"], evaluate.must_not_regress)
    return chosen
