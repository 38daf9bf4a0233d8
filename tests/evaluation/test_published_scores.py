"""Thousands of random pairs: scores are those of the definitions by which figures are published, to the last bit."""

from __future__ import annotations

import random

import pytest

from qvl_pipeline.evaluation.tasks import anls, best_reference, relaxed_accuracy

PAIRS = 1_000
WORDS = ["Straße", "the", "ﬁne", "Ünder", "1,000", "12%", "İstanbul", "a", "Q4", "10", "0", "-3.5", "nan", "inf", "1e3"]
SPACES = [" ", "  ", "\t", "\n", ""]


def distance(one: str, other: str) -> int:
    """Edits from one text to the other (Levenshtein 1966), by the table of all beginnings."""
    table = [[i + j if not i * j else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, start=1):
        for j, b in enumerate(other, start=1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


def published_anls(answers: list[str], prediction: str) -> float:
    """As Qwen-VL's `infographicsvqa_eval.py` and lmms-eval define it, for all references of a question at once."""
    distances = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        edits = distance(" ".join(answer.strip().lower().split()), " ".join(prediction.strip().lower().split()))
        distances.append(edits / length if length else 0.0)
    similarity = 1 - min(distances)
    return 0.0 if similarity < 0.5 else similarity


def published_relaxed_accuracy(target: str, prediction: str) -> bool:
    """As pix2struct and lmms-eval define ChartQA's relaxed correctness."""

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    wanted, given = number(target), number(prediction)
    if given is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(given - wanted) / abs(wanted) <= 0.05


def text(rng: random.Random) -> str:
    """Some words and numbers with the characters on which implementations part."""
    parts = [part for _ in range(rng.randint(0, 3)) for part in (rng.choice(WORDS), rng.choice(SPACES))]
    return "".join(parts) + rng.choice(["", "", ".", "%", " "])


def changed(given: str, rng: random.Random) -> str:
    """The text with another case, other spaces, a letter more or less."""
    if rng.random() < 0.4:
        given = rng.choice([str.upper, str.lower, str.swapcase, str.casefold])(given)
    if given and rng.random() < 0.5:
        at = rng.randrange(len(given))
        given = given[:at] + rng.choice(["", "x", " ", "ß", ","]) + given[at + 1 :]
    return given


@pytest.mark.parametrize("seed", [0, 1])
def test_anls_is_the_published_one(seed: int) -> None:
    rng = random.Random(seed)
    scores = []
    for _ in range(PAIRS):
        references = [text(rng) for _ in range(rng.randint(1, 3))]
        answer = changed(rng.choice(references), rng) if rng.random() < 0.8 else text(rng)
        scores.append(best_reference(anls, answer, references))
        assert scores[-1] == published_anls(references, answer), (answer, references)
    assert len(set(scores)) > 20, "not only right and wrong ones"


@pytest.mark.parametrize("seed", [0, 1])
def test_relaxed_accuracy_is_the_published_one(seed: int) -> None:
    rng = random.Random(seed)
    scores = []
    for _ in range(PAIRS):
        if rng.random() < 0.5:
            value = rng.uniform(-1000, 1000) * rng.choice([0, 1, 1, 1])
            ending = rng.choice(["", "", "%", "%%", " "])
            target = f"{value:.{rng.randint(0, 3)}f}{ending}"
            answer = f"{value * rng.choice([1, 0.95, 1.05, 1.051, 0.949, -1]):{rng.choice(['', ',', '.2f'])}}{ending}"
        else:
            target = text(rng)
            answer = changed(target, rng)
        scores.append(relaxed_accuracy(answer, target))
        assert scores[-1] == published_relaxed_accuracy(target, answer), (answer, target)
    assert 100 < sum(scores) < 900
