"""Metrics against the examples of their papers and against their reference implementations."""

from __future__ import annotations

import pytest
from pycocoevalcap.cider.cider import Cider

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.tasks import (
    anls,
    bleu,
    cider,
    exact_match,
    grounding,
    iou,
    multiple_choice,
    relaxed_accuracy,
    rouge_l,
)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("7", "7", 1),
        (" 7\n", "7", 1),
        ("The  LEFT\tone", "the left one", 1),
        ("STRASSE", "straße", 1),
        ("7.", "7", 0),
        ("seventeen", "seven", 0),
        ("", "7", 0),
        ("", " ", 1),
    ],
)
def test_exact_match_ignores_case_and_white_space_only(answer: str, expected: str, right: int) -> None:
    assert exact_match(answer, expected) == right


# The spellings that MMMU's `parse_multi_choice_response` looks for (mmmu/utils/eval_utils.py, also lmms-eval's
# tasks/mmmu/utils.py): "(B)", "B ", "B."; and those that VLMEvalKit's `can_infer_option` reads (vlmeval/utils/
# matching_util.py): a letter that stands alone once these are blanks: . ( ) [ ] , : ; ! * # { }
CONVENTIONS = ["B", "(B)", "B.", "B)", "[B]", "**B**", "B: a red car", "(B) a red car", "B. a red car", "{B}", "B!"]


@pytest.mark.parametrize("answer", CONVENTIONS)
@pytest.mark.parametrize("small", [False, True])
def test_options_are_read_as_other_harnesses_do_whatever_their_case(answer: str, small: bool) -> None:
    assert multiple_choice(answer.lower() if small else answer, "B") == 1
    assert multiple_choice(answer.lower() if small else answer, "C") == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is B.", 1),
        ("Answer: B", 1),
        ("answer: b", 1),
        ("The correct option is (b).", 1),
        ("Answer: (B) because it is red", 1),
        ("A man holds it, so B", 1),
        ("B. A red car", 1),
        ("b) I see a car", 1),
        ("C", 0),
        ("B, because A is wrong", 1),
        ("(B), as A is wrong", 1),
        ("B - the red car, not A", 1),
        ("B because A is wrong", 1),
        ("A, because B is wrong", 0),
        ("B, A", 0),
        ("B, and C", 0),
        ("A or B", 0),
        ("Both", 0),
        ("It's a Boat", 0),
        ("b and c", 0),
        ("be it so", 0),
        ("best", 0),
        ("", 0),
    ],
)
def test_the_chosen_option_is_the_one_that_stands_alone(answer: str, right: int) -> None:
    assert multiple_choice(answer, "B") == right


@pytest.mark.parametrize("expected", ["b", "(B)", "B.", "B. a red car"])
def test_the_expected_option_may_be_written_in_the_same_ways(expected: str) -> None:
    assert multiple_choice("B", expected) == 1
    assert multiple_choice("A", expected) == 0


def test_an_expected_answer_that_is_no_option_is_refused() -> None:
    with pytest.raises(UserError, match=r"task 'multiple_choice' expects an option's letter, but .* 'a red car'"):
        multiple_choice("B", "a red car")


# The docstring of `relaxed_correctness` in google-research/pix2struct, and ChartQA, section 5.1: "5 % for numbers".
@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("10.4", "10", 1),
        ("10.5", "10", 1),
        ("10.51", "10", 0),
        ("9.5", "10", 1),
        ("-10", "10", 0),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("1,000", "1000", 0),
        (" 10 ", "10", 1),
        (" Yes", "yes", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
    ],
)
def test_relaxed_accuracy_allows_five_percent_on_numbers(answer: str, expected: str, right: int) -> None:
    assert relaxed_accuracy(answer, expected) == right


def test_anls_is_similarity_down_to_one_half() -> None:
    # Biten et al. 2019, equation 1, by hand: 1 edit over 10 letters; 4 over 8 is the threshold, 5 over 8 below it.
    assert anls("Californi", "california") == pytest.approx(1 - 1 / 10)
    assert anls("abcd1234", "abcdefgh") == 0.5
    assert anls("abc12345", "abcdefgh") == 0.0
    assert anls("", "abc") == 0.0
    assert anls(" ABC ", "abc") == 1.0


def test_iou_of_boxes_worked_by_hand() -> None:
    assert iou("[0, 0, 10, 10]", "[0, 0, 10, 10]") == 1.0
    assert iou("5, 0, 15, 10", "[0, 0, 10, 10]") == pytest.approx(50 / 150)
    assert iou('```json\n[{"bbox_2d": [0, 0, 10, 5], "label": "2 cats"}]\n```', "0 0 10 10") == 0.5
    assert iou("(10,10) (0,0)", "0 0 10 10") == 1.0
    assert iou("In image 3, [0, 0, 10, 5]", "[0, 0, 10, 10]") == 0.5
    assert iou("the 2 cats of 1 picture: (0,0),(10,5)", "[0, 0, 10, 10]") == 0.5
    assert iou("[20, 20, 30, 30]", "[0, 0, 10, 10]") == 0.0
    assert iou("no cat here", "[0, 0, 10, 10]") == 0.0
    assert iou("[1, 1, 1, 1]", "[1, 1, 1, 1]") == 0.0
    assert (grounding("[0, 0, 10, 5]", "[0, 0, 10, 10]"), grounding("[0, 0, 10, 4]", "[0, 0, 10, 10]")) == (1.0, 0.0)
    with pytest.raises(UserError, match="'iou' expects four numbers"):
        iou("[0, 0, 1, 1]", "the cat")


def test_rouge_l_of_the_paper() -> None:
    # Lin 2004, section 3: "police kill the gunman" against "police killed the gunman"; the paper has no stemming, which
    # makes the two equal here. Its second candidate shares two of four words in order.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 1.0
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5


def test_bleu_of_a_perfect_and_of_a_foreign_sentence() -> None:
    perfect, foreign = bleu(
        ["the cat is on the mat"] * 2, [["the cat is on the mat", "x"], ["dogs bark loudly at night"]]
    )
    assert perfect == pytest.approx(1.0)
    assert foreign < 0.1


def test_cider_is_that_of_the_reference_implementation() -> None:
    answers = ["A man rides a horse.", "two dogs play"]
    wanted = [["a man rides a horse .", "a person on a horse"], ["two cats play in the garden"]]
    expected = Cider().compute_score(
        {0: wanted[0], 1: wanted[1]}, {0: ["a man rides a horse ."], 1: ["two dogs play"]}
    )[1]
    scores = cider(answers, wanted)
    assert scores == pytest.approx(expected.tolist())
    assert scores[0] > scores[1] > 0
