"""What an evaluation would stumble over, all of which is known before there is a trained model."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.evaluation.benchmarks.harness import check_lmms_eval
from qvl_pipeline.evaluation.default_task import resolve_tasks
from qvl_pipeline.evaluation.gate import check_gate
from qvl_pipeline.evaluation.generation import check_generation
from qvl_pipeline.evaluation.metrics import check_scorable
from qvl_pipeline.evaluation.predictions import eval_samples
from qvl_pipeline.evaluation.servers.models import check_servers
from qvl_pipeline.kinds import kinds_in
from qvl_pipeline.media.arrow_rows import TokenizedSamples

logger = logging.getLogger(__name__)


def checked_samples(tokenized: Path, evaluate: EvaluateConfig) -> pd.DataFrame:
    """Choose the samples to evaluate, all of which can be scored.

    Args:
        tokenized: Arrow file of the tokenized samples.
        evaluate: Parameters of the stage.

    Returns:
        Table of `eval_samples`, each task with a metric, and `task_from` (`resolve_tasks`).

    Raises:
        UserError: There is nothing to evaluate, a task has no metric, a server cannot be asked, or a source, sample
            kind, argument of generation or lmms-eval, which `evaluate` names, is not there.
    """
    check_generation(evaluate)
    check_lmms_eval(evaluate.lmms_eval)
    check_servers(evaluate)
    chosen = resolve_tasks(eval_samples(TokenizedSamples(tokenized), evaluate.max_samples, evaluate.task_by_source))
    check_scorable(chosen)
    check_gate(kinds_in(chosen), evaluate.must_not_regress)
    return chosen


def warn_of_cut_answers(tokenized: Path, chosen: pd.DataFrame, max_new_tokens: int) -> None:
    """Log how many expected answers are longer than what is generated.

    Args:
        tokenized: Arrow file of the tokenized samples.
        chosen: The samples to evaluate, as `checked_samples` gives them.
        max_new_tokens: Longest answer in tokens.
    """
    table = TokenizedSamples(tokenized).columns(["prompt_length", "length"]).to_pandas().loc[chosen.index]
    tokens = table["length"] - table["prompt_length"] - 2  # `<|im_end|>` and a newline stand behind the answer
    cut = tokens > max_new_tokens
    if cut.any():
        logger.warning(
            "%d of %d expected answers are longer than evaluate.max_new_tokens (%d): answers are cut there, and cannot "
            "match. The longest, of sample %s, has %d tokens",
            cut.sum(),
            len(cut),
            max_new_tokens,
            chosen.loc[tokens.idxmax(), "sample_id"],
            tokens.max(),
        )
