from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
from scipy.stats import binomtest

from qvl_pipeline.intervals import wilson_interval
from qvl_pipeline.reports.evaluation.answers import confusion
from qvl_pipeline.reports.evaluation.report import render_report
from qvl_pipeline.reports.thumbnail import Thumbnail

PIXEL = "data:image/png;base64,iVBORw0KGgo="
NASTY = '<script>alert(1)</script> & "co"'


class Page(HTMLParser):
    """The text and the addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.addresses, self.tags, self._skip = "", [], [], False
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._skip = tag == "style"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text += f" {data}"


def prediction(number: int, kind: str, trained_correct: bool, **answers: str) -> dict[str, Any]:
    row = {
        "sample_id": f"made/{number}",
        "source": "made",
        "kind": kind,
        "task": "exact_match",
        "question": f"question {number}",
        "expected": "7",
        "base_answer": "",
        "trained_answer": "7" if trained_correct else "1",
        "base_score": 0.0,
        "trained_score": float(trained_correct),
        "trained_loss": 0.1 * number,
    }
    return {**row, **answers}


def metrics_row(step: int, loss: float) -> dict[str, float]:
    others = {"learning_rate": 1e-3, "grad_norm": 1.5, "tokens_per_second": 900.0}
    return {"step": step, "loss": loss, "data_wait_share": 0.012, "peak_memory_gib": 0.5 + step, **others}


@pytest.fixture
def facts() -> dict[str, Any]:
    return report_facts()


def report_facts() -> dict[str, Any]:
    """Arguments of `render_report`."""
    rows = [prediction(n, "video", n >= 4) for n in range(8)] + [prediction(8, "text", True, question=NASTY)]
    return {
        "title": "tiny",
        "subtitle": "Qwen3-VL",
        "metrics": {
            "trained": {
                "text": {"exact_match": 1.0, "loss": 0.1, "perplexity": 1.105, "n": 1},
                "video": {"exact_match": 0.5, "loss": 0.7, "perplexity": 2.014, "n": 8},
                "overall": {"exact_match": 5 / 9, "loss": 0.6, "perplexity": 1.82, "n": 9},
            },
            "base": {
                "text": {"exact_match": 0.0, "loss": 4.0, "perplexity": 54.6, "n": 1},
                "video": {"exact_match": 0.625, "loss": 4.0, "perplexity": 54.6, "n": 8},
                "overall": {"exact_match": 5 / 9, "loss": 0.6, "perplexity": 1.82, "n": 9},
            },
        },
        "predictions": pd.DataFrame(rows),
        "slices": {
            model: {
                "source": {"made": {"exact_match": 5 / 9, "loss": loss, "perplexity": 1.82, "n": 9}},
                "prompt_length": {"12-40": {"exact_match": 5 / 9, "loss": loss, "perplexity": 1.82, "n": 9}},
            }
            for model, loss in (("trained", 0.617), ("base", 4.321))
        },
        "training_metrics": pd.DataFrame([metrics_row(step, 4 / step) for step in range(1, 60)]),
        "train_result": {
            "steps": 1234,
            "tokens": 1_234_567,
            "supervised_tokens": 4321,
            "train_time_s": 3725.4,
            "tokens_per_second": 331.4,
            "final_loss": 0.1834,
            "world_size": 1,
            "device": "cuda",
            "plan_fingerprint": "f1nger",
            "git_commit": None,
        },
        "plan_summary": {
            "packs": 99,
            "samples": 888,
            "fill": 0.9731,
            "epochs": 2,
            "packing_length": 1024,
            "fingerprint": "f1nger",
            "overlong": ["made/77"],
        },
        "validation_report": {
            "counts": {"ingested": 4290, "valid": 4280, "quarantined": 8, "rejected": 2},
            "rules": {"not_json": 2, "missing_media": 7, "too_long": 1, "duplicate": 0},
            "put_aside": {"made": {"caption": 3}},
        },
        "validation_page": "../made/validation.html",
        "media": lambda sample_id: [[Thumbnail(PIXEL, f"picture of {sample_id}")]],
        "parameters": {"train": {"learning_rate": 2e-3, "seed": 42, "ema_decay": 0.5, "adam_epsilon": 1e-8}},
        "samples_page": "samples/index.html",
    }


def test_the_page_asks_nobody_for_anything(facts: dict[str, Any]) -> None:
    html = render_report(**facts)
    page = Page(html)
    assert {address for address in page.addresses if not address.startswith("data:")} == {
        *("../made/validation.html", "samples/index.html")
    }
    assert 'The <a href="../made/validation.html">validation page</a>' in html
    assert not re.search(r"url\(|@import|https?:", html)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)


def test_the_same_facts_give_the_same_page(facts: dict[str, Any]) -> None:
    assert render_report(**facts) == render_report(**facts)


def test_text_of_the_data_is_shown_not_obeyed(facts: dict[str, Any]) -> None:
    facts["predictions"].loc[0, "trained_answer"] = NASTY
    facts["title"] = NASTY
    html = render_report(**facts)
    assert "<script" not in html
    assert Page(html).text.count(NASTY) >= 4


def test_headline_accuracy_and_gain(facts: dict[str, Any]) -> None:
    text = Page(render_report(**facts)).text
    assert "Trained model 55.6 % 5 of 9 exact matches" in text
    assert "Gain +0.0 percentage points" in text
    assert "video exact_match 8 50.0 % 21.5 % – 78.5 % 62.5 % −12.5" in text  # noqa: RUF001
    assert "Training time 1 h 2 min 1,234 steps on 1 rank, cuda" in text


def test_facts_of_training_and_data(facts: dict[str, Any]) -> None:
    text = Page(render_report(**facts)).text
    for fact in ("Tokens 1,234,567", "Packs filled to 97.3 %", "Over-long samples left out 1", "Final loss 0.1834"):
        assert fact in text
    assert "4,290 ingested = 4,280 valid + 8 quarantined + 2 rejected" in text
    assert "missing_media 7 not_json 2 too_long 1" in text
    assert "duplicate" not in text
    assert "Plan fingerprint f1nger" in text
    assert "Git commit" not in text


def test_parameters_that_differ_from_their_defaults_and_those_that_all_ask_for_are_shown(facts: dict[str, Any]) -> None:
    text = Page(render_report(**facts)).text
    assert "train.learning_rate 0.002 1e-05 train.seed 42 train.ema_decay 0.5 0 Data" in text
    assert "Parameters" not in Page(render_report(**facts | {"parameters": {}})).text


def test_all_curves_are_drawn_with_the_eval_loss_and_the_rates_of_parts(facts: dict[str, Any]) -> None:
    html = render_report(**facts)
    titles = ("Loss", "Gradient norm", "Learning rate", "Tokens per second", "Peak memory, GiB")
    for title in (*titles, "Waiting for data, % of the time"):
        assert f'aria-label="{title} by optimizer step"' in html
    assert "eval split</span>" not in html
    metrics = facts["training_metrics"]
    parts = {
        "learning_rate/vit": 1e-4,
        "learning_rate/llm": 1e-3,
        "eval_loss": metrics["loss"].where(metrics.index % 9 == 0),
    }
    page = render_report(**facts | {"training_metrics": metrics.assign(**parts)})
    assert "eval split</span>" in page
    assert Page(page).text.count("Learning rate vit llm") == 1


def test_wrong_answers_come_first_the_least_likely_first(facts: dict[str, Any]) -> None:
    text = Page(render_report(**facts)).text
    shown = re.findall(r"question (\d)", text)
    assert shown == ["3", "2", "1", "0", "4", "5"], "four wrong ones by their loss, and the first two right ones"
    assert "video 4 of 8 right" in text
    assert "picture of made/8" in text


def test_every_model_that_answered_is_shown_the_trained_one_first(facts: dict[str, Any]) -> None:
    facts["predictions"] = facts["predictions"].assign(api_answer="seven", api_score=0.0, base_answer=None)
    text = Page(render_report(**facts)).text
    assert "Expected 7 Trained ✗ 1 api ✗ seven" in text
    assert "Base ✗" not in text


def test_a_long_answer_is_folded_and_whole(facts: dict[str, Any]) -> None:
    answer = " ".join(f"word{number}" for number in range(400))
    facts["predictions"].loc[0, "trained_answer"] = answer
    html = render_report(**facts)
    head, rest = re.search(
        r"<dd>(word0 [^<]*)<details class=\"rest\"><summary>[\d,]+ more characters</summary>([^<]*)", html
    ).groups()
    assert head + rest == answer
    assert len(head) <= 420


def test_pictures_are_enlarged_without_a_script(facts: dict[str, Any]) -> None:
    html = render_report(**facts)
    assert html.count('<input class="zoom" type="checkbox" aria-label="enlarge"><img ') == html.count("<img ") > 0


def test_short_answers_have_a_confusion_matrix(facts: dict[str, Any]) -> None:
    pairs = {("yes", "Yes"): 5, ("yes", "no"): 2, ("no", "no"): 4, ("no", "perhaps"): 1, ("once", "never"): 1}
    rows = [
        prediction(number, "text", expected.casefold() == answer.casefold(), expected=expected, trained_answer=answer)
        for number, (expected, answer) in enumerate(pair for pair, times in pairs.items() for pair in [pair] * times)
    ]
    found = confusion(pd.DataFrame(rows))
    assert found["labels"] == ["no", "yes", "another answer"]
    assert [[cell["n"] for cell in row["cells"]] for row in found["rows"]] == [[4, 0, 1], [2, 5, 0]]
    assert found["mistakes"][0] == {"expected": "yes", "answered": "no", "n": 2}
    assert (found["shown"], found["total"]) == (12, 13)
    assert confusion(pd.DataFrame(rows).assign(task="rouge_l")) is None
    facts["predictions"] = pd.concat([facts["predictions"], pd.DataFrame(rows)])  # which expect a 7
    assert "yes 0 2 5 0 7" in Page(render_report(**facts)).text


def test_the_score_itself_is_shown_where_an_answer_is_not_just_right_or_wrong(facts: dict[str, Any]) -> None:
    facts["predictions"].loc[0, ["task", "trained_score"]] = ["rouge_l", 0.25]
    facts["metrics"]["trained"]["video"]["rouge_l"] = 0.25
    facts["metrics"]["base"]["video"]["rouge_l"] = 0.25
    html = render_report(**facts)
    assert '<span class="mark">rouge_l 0.25</span>' in html


def test_a_report_without_the_base_model(facts: dict[str, Any]) -> None:
    del facts["metrics"]["base"]
    facts["predictions"]["base_answer"] = pd.Series(None, dtype="string")
    facts["predictions"]["base_score"] = pd.Series(None, dtype="Float64")
    del facts["slices"]["base"]
    text = Page(render_report(**facts)).text
    assert "Trained model 55.6" in text
    assert "Base" not in text
    assert "Gain" not in text


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([], "No optimizer step with a finite loss was logged."),
        ([float("nan")] * 3, "the loss of all 3 logged steps is not a finite number"),
        ([2.0, float("inf"), 1.0], "1 logged step has a loss that is not finite."),
    ],
)
def test_a_training_with_few_or_broken_losses(facts: dict[str, Any], losses: list[float], sentence: str) -> None:
    rows = [metrics_row(step, loss) for step, loss in enumerate(losses, start=1)]
    facts["training_metrics"] = pd.DataFrame(rows, columns=list(metrics_row(1, 1.0)))
    assert sentence in Page(render_report(**facts)).text


@pytest.mark.parametrize(("right", "n"), [(0, 10), (8, 10), (10, 10), (1, 1), (263, 280)])
def test_wilson_interval(right: int, n: int) -> None:
    reference = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((reference.low, reference.high), abs=1e-7)
