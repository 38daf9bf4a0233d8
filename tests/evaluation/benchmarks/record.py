"""Score the random answers by lmms-eval's own functions.

`python -m tests.evaluation.benchmarks.record CHECKOUT COMMIT` writes `published_scores.json` beside this file, by which
the tests go. Of lmms-eval only the source is needed: what it imports besides, and no function that is called here uses,
is stood in for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from tests.evaluation.benchmarks.answers import TASKS, pairs

SCORES = Path(__file__).with_name("published_scores.json")
_STOOD_IN_FOR = {"datasets", "torch", "transformers", "sacrebleu", "loguru", "cv2", "lmms_eval.utils"}


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _stand_in(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _stand_in(name: str) -> Any:
    return MagicMock(name=name, __path__=[], __spec__=None)


def _published(checkout: Path) -> dict[str, Callable[[str, Any], Any]]:
    sys.path.insert(0, str(checkout))
    sys.modules |= {name: _stand_in(name) for name in _STOOD_IN_FOR}
    registry = _stand_in("lmms_eval.api.registry")
    for decorator in ("register_metric", "register_aggregation", "register_filter"):
        setattr(registry, decorator, lambda *_, **__: lambda function: function)
    sys.modules["lmms_eval.api.registry"] = registry
    sys.meta_path.append(_StandIns())
    tasks = {
        name: importlib.import_module(f"lmms_eval.tasks.{name}.utils")
        for name in ("ai2d", "mlvu", "mmmu", "realworldqa", "textvqa")
    }
    evals = importlib.import_module("lmms_eval.tasks.mathvista.mathvista_evals")
    evals.distance = importlib.import_module("rapidfuzz.distance").Levenshtein.distance
    metrics = importlib.import_module("lmms_eval.api.metrics")
    random.choice = lambda _: None  # an option that is drawn is none

    def mmmu(answer: str, question: dict[str, Any]) -> bool:
        published, wanted = tasks["mmmu"], question["answer"]
        if options := question.get("options"):
            texts, letters = published.get_multi_choice_info(options)
            return published.eval_multi_choice(wanted, published.parse_multi_choice_response(answer, letters, texts))
        return published.eval_open(wanted if len(wanted) > 1 else wanted[0], published.parse_open_response(answer))

    def mathvista(answer: str, question: dict[str, Any]) -> bool:
        kind, choices, precision = (question[key] for key in ("answer_type", "choices", "precision"))
        evaluator = evals.MathVistaEvaluator()
        evaluator.get_chat_response = lambda *_, **__: answer
        form = "multi_choice" if choices else "free_form"
        problem = {"question_type": form, "answer_type": kind, "choices": choices, "query": ""}
        found = evaluator.extract_answer(answer, problem)
        return evaluator.safe_equal(
            evaluator.normalize_extracted_answer(found, choices, form, kind, precision), question["answer"]
        )

    def ai2d(answer: str, wanted: str) -> Any:
        (given,) = tasks["ai2d"].MultiChoiceRegexFilter.apply(None, [[answer]], [None])
        folded = {"ignore_case": True, "ignore_punctuation": True}
        return metrics.exact_match_hf_evaluate([given.strip()], [wanted], **folded)["exact_match"]

    return {
        "option_letter": lambda answer, wanted: tasks["mlvu"].extract_characters_regex(answer) == wanted,
        "realworldqa": lambda answer, wanted: tasks["realworldqa"].realworldqa_process_results(
            {"answer": wanted}, [answer]
        )["exact_match"],
        "ai2d": ai2d,
        "vqa_accuracy": lambda answer, people: tasks["textvqa"].textvqa_process_results(
            {"answers": people, "question_id": 0}, [answer]
        )["exact_match"],
        "mmmu": mmmu,
        "mathvista": mathvista,
    }


def main(checkout: str, commit: str) -> None:
    """Write the scores of all tasks."""
    answers = {task: pairs(task) for task in TASKS}
    read = {task: json.loads if task in ("vqa_accuracy", "mmmu", "mathvista") else str for task in TASKS}
    published = _published(Path(checkout))
    scores = {
        task: [float(published[task](answer, read[task](wanted))) for answer, wanted in given]
        for task, given in answers.items()
    }
    lines = ",\n".join(f'"{task}": {json.dumps(values)}' for task, values in scores.items())
    SCORES.write_text(f'{{"lmms_eval": "{commit}",\n{lines}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
