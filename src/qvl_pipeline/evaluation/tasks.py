"""What an answer is worth: one function for each task name, from answers and references to scores.

A score is a number from 0 to 1 (CIDEr: 0 to 10). References are lists of acceptable answers. All are free of language
models. Each names the paper and the implementation that its figures can be compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.benchmarks.choices import ai2d, option_letter, realworldqa
from qvl_pipeline.evaluation.benchmarks.mathvista import mathvista
from qvl_pipeline.evaluation.benchmarks.mmmu import mmmu
from qvl_pipeline.evaluation.benchmarks.vqa import vqa_accuracy

Score = Callable[[str, str], float]
ANLS_THRESHOLD = 0.5  # Biten et al. 2019: an answer at a greater distance is a wrong answer, not a misspelt one
RELAXED_TOLERANCE = 0.05  # Methani et al. 2020 (PlotQA), taken over by ChartQA
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
# Four numbers in brackets, two corners in brackets (Qwen-VL's `(1,2),(3,4)`), or four numbers that follow each other.
_BOXES = (
    re.compile(rf"[\[(]\s*({_NUMBER})" + rf"[\s,;]+({_NUMBER})" * 3 + r"\s*[\])]"),
    re.compile(r"\s*,?\s*".join([rf"[\[(]\s*({_NUMBER})[\s,;]+({_NUMBER})\s*[\])]"] * 2)),
    re.compile(rf"({_NUMBER})" + rf"[\s,;()\[\]]+({_NUMBER})" * 3),
)
_LATIN = re.compile(r"[a-z0-9]")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_ARTICLE = re.compile(r"^[AI]\s+(?!or\b|and\b)(?=[a-z])")
_CHOICE = re.compile(r"(?<![A-Za-z0-9'])\(?([A-Z])\)?(?![A-Za-z0-9'])")
# All of the answer, after what introduces it, or its beginning with a mark or a reason behind it.
_MARKED_CHOICE = re.compile(
    r"(?:(?:the )?(?:(?:correct|best|final) )?(?:answer|option|choice)(?: is)?:? *)?"
    r"[(\[{*]*([a-z])(?:[)\]}.:,;!*]*$|[)\].:] |[)\]}*]*(?:,| -) (?!and\b|or\b)(?=[a-z]{2})|,? (?:because|since)\b)",
    re.IGNORECASE,
)


def exact_match(answer: str, expected: str) -> float:
    """Tell whether two texts are the same up to case and white space.

    Equal means equal after stripping, case folding (`str.casefold`) and turning every run of white space into one
    space. Punctuation, articles and number formats count.
    """
    return float(_normalise(answer) == _normalise(expected))


def multiple_choice(answer: str, expected: str) -> float:
    """Tell whether the option chosen is the expected one.

    The option is a letter that is all of the answer (`B`, `(b)`, `Answer: B.`) or marked as an option at its beginning
    (`b) a red car`); else it is the only capital letter that stands alone (`It is red, so B`), where an `A` or `I` that
    begins a sentence is a word. Several different ones decide nothing and are wrong.

    The conventions are those of MMMU (Yue et al. 2024; `parse_multi_choice_response`, which lmms-eval took over) and of
    VLMEvalKit (`can_infer_option`). They know the letters of the sample's options, and MMMU takes the last of several
    and guesses where there is none.

    Raises:
        UserError: The expected text is no option.
    """
    wanted = _options(expected)
    if len(wanted) != 1:
        raise UserError(f"task 'multiple_choice' expects an option's letter, but the dataset's answer is {expected!r}")
    return float(_options(answer) == wanted)


def _options(text: str) -> set[str]:
    """Return the letters of all options that a text names, as capitals."""
    text = text.strip()
    if marked := _MARKED_CHOICE.match(text):
        return {marked[1].upper()}
    return set(_CHOICE.findall(_ARTICLE.sub("", text)))


def relaxed_accuracy(answer: str, expected: str) -> float:
    """Tell whether a number is within 5 % of the expected one; texts must match exactly, but for their case.

    ChartQA (Masry et al. 2022), in all cases as its reference implementation `relaxed_correctness` (google-research/
    pix2struct `pix2struct/metrics.py`, taken over by lmms-eval): `12%` is 0.12, a zero must be met exactly, and a
    number with a comma in it is a text.
    """
    given, wanted = _to_float(answer), _to_float(expected)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= RELAXED_TOLERANCE)
    return float(answer.lower() == expected.lower())


def anls(answer: str, expected: str) -> float:
    """Average normalised Levenshtein similarity of DocVQA and ST-VQA (Biten et al. 2019, arXiv:1905.13648).

    `1 - distance / length of the longer text`; 0 where that is below one half. In all cases as the script that Qwen-VL
    and lmms-eval publish their figures by: distances are of texts in small letters and without repeated spaces,
    lengths are of the texts in capitals, as they were given.
    """
    distance = Levenshtein.distance(*(" ".join(text.lower().split()) for text in (answer, expected)))
    longer = max(len(answer.upper()), len(expected.upper()))
    similarity = 1 - distance / longer if longer else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def iou(answer: str, expected: str) -> float:
    """Intersection over union of two boxes; 0 when the answer has no box.

    A box is the first four numbers in brackets, `x1, y1, x2, y2`, as in Qwen-VL's `{"bbox_2d": [1, 2, 3, 4], "label":
    "cat"}`; else the first two corners in brackets (`(1,2),(3,4)`); else the first four numbers that follow each other.
    Corners may come in either order.

    Raises:
        UserError: The expected text has no box.
    """
    wanted = _box(expected)
    if wanted is None:
        raise UserError(f"task 'iou' expects four numbers 'x1, y1, x2, y2', but the dataset's answer is {expected!r}")
    given = _box(answer)
    if given is None:
        return 0.0
    width = min(given[2], wanted[2]) - max(given[0], wanted[0])
    height = min(given[3], wanted[3]) - max(given[1], wanted[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = _area(given) + _area(wanted) - overlap
    return overlap / union if union else 0.0


def grounding(answer: str, expected: str) -> float:
    """Tell whether the boxes overlap by at least one half (accuracy@0.5 of RefCOCO, Yu et al. 2016)."""
    return float(iou(answer, expected) >= 0.5)


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence (Lin 2004), by `rouge_score` with stemming, as published with T5.

    Its words are of Latin letters and digits. Where the expected answer has none of these, words are of any letters,
    and characters of scripts that write no spaces: else all answers in such a language would be worth nothing.
    """
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = None if _LATIN.search(expected.lower()) else _AnyScript()
    scorer = RougeScorer(["rougeL"], use_stemmer=True, tokenizer=tokenizer)
    return float(scorer.score(expected, answer)["rougeL"].fmeasure)


class _AnyScript:
    """A tokenizer of `rouge_score`."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text.lower())


def words_of(text: str) -> list[str]:
    """Split a text into words, and where a script parts them by no spaces, into characters."""
    return _WORD.findall(text)


def best_reference(score: Score, answer: str, references: Sequence[str]) -> float:
    """Score an answer against the reference that it fits best."""
    return max(score(answer, reference) for reference in references)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU of each sentence on its own (`sacrebleu.sentence_bleu`, smoothed); see `corpus_bleu` for the mean."""
    from sacrebleu import sentence_bleu

    return [
        min(sentence_bleu(answer, list(texts)).score / 100, 1.0)
        for answer, texts in zip(answers, references, strict=True)
    ]


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all answers together (Papineni et al. 2002), by sacrebleu: no mean of sentences is equal to it."""
    from sacrebleu import corpus_bleu

    most = max(len(texts) for texts in references)
    padded = [[*texts, *[None] * (most - len(texts))] for texts in references]
    return corpus_bleu(list(answers), [list(column) for column in zip(*padded, strict=True)]).score / 100


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015), by pycocoevalcap; its mean is the corpus's score.

    Words are weighted by how rare they are among the references of all samples given here. Texts are lower-cased and
    split by sacrebleu's `13a` tokenizer, because the original's needs Java.

    Raises:
        UserError: pycocoevalcap is not installed.
    """
    scorer = import_cider()()
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    candidates = {number: [split(answer.lower())] for number, answer in enumerate(answers)}
    wanted = {number: [split(text.lower()) for text in texts] for number, texts in enumerate(references)}
    return [float(score) for score in scorer.compute_score(wanted, candidates)[1]]


def import_cider() -> type:
    """Import the scorer of CIDEr.

    Raises:
        UserError: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise UserError("task 'cider' needs pycocoevalcap: `uv pip install pycocoevalcap`") from error
    return Cider


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _to_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _box(text: str) -> tuple[float, float, float, float] | None:
    found = next(filter(None, (form.search(text) for form in _BOXES)), None)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


# Scored answer by answer.
BY_ANSWER: dict[str, Score] = {
    function.__name__: function
    for function in (exact_match, multiple_choice, relaxed_accuracy, anls, iou, grounding, rouge_l)
}
# Scored together, because the score of one depends on the others' references.
TOGETHER: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]] = {"bleu": bleu, "cider": cider}
# From an answer and all that is expected, as the column `answer` has it: the scores of benchmarks.
BENCHMARK_TASKS: dict[str, Score] = {
    function.__name__: function for function in (vqa_accuracy, mmmu, mathvista, ai2d, realworldqa, option_letter)
} | {"mlvu": option_letter}
# Tasks whose score of many answers is the mean over kinds of samples, each of which counts the same.
MEAN_OF_KINDS = ("mlvu",)
# Tasks whose score of many answers is not the mean of their scores.
NOT_A_MEAN: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {"bleu": corpus_bleu}
TASKS = (*BY_ANSWER, *TOGETHER, *BENCHMARK_TASKS)
# Tasks whose expected answers have a form.
FORMAL = ("multiple_choice", "iou", "grounding")
