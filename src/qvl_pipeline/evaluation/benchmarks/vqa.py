"""Soft accuracy of VQA and TextVQA: how many of ten people gave the answer."""

from __future__ import annotations

import json
import re
from statistics import mean

_AGREEING = 3  # as many people make an answer right
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
# The original gives `re.UNICODE`, which is 32, in the place of the number of replacements.
_FULL_STOPS = int(re.UNICODE)
_ARTICLES = ("a", "an", "the")
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS.split())}
# Contractions that people type with one apostrophe too few.
_WITH_APOSTROPHES = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for place, character in enumerate(word)
    if character == "'"
}


def vqa_accuracy(answer: str, expected: str) -> float:
    """Score an answer by how many people gave it (Antol et al. 2015), as TextVQA and lmms-eval do.

    `min(1, agreeing / 3)`, averaged over the people, each of whom is left out once. Texts are normalised by the rules
    of EvalAI.

    Args:
        answer: The answer.
        expected: JSON list of the people's answers.
    """
    given, people = normalised(answer), [normalised(text) for text in json.loads(expected)]
    agreeing = people.count(given)
    return float(mean(min(1.0, (agreeing - (text == given)) / _AGREEING) for text in people))


def normalised(text: str) -> str:
    """Normalise an answer as EvalAI's processor does (facebookresearch/mmf `EvalAIAnswerProcessor`).

    Small letters, digits for numbers up to ten, no articles, apostrophes in contractions. Punctuation beside a space
    goes, and other punctuation becomes a space; so does none of it in numbers.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = kept = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space else " ")
    kept = _FULL_STOP.sub("", kept, count=_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
