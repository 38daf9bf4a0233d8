"""Why a sample that is valid cannot be tokenised: the rules of the table `tokenize_quarantine`."""

from __future__ import annotations

from dataclasses import dataclass

from qvl_pipeline.errors import UserError

TOKENIZE_RULES = {
    "template_refusal": "The chat template refuses the conversation.",
    "template_rewrites": "The chat template renders earlier turns in another way once others follow.",
    "answer_not_marked": "The chat template does not open and close the assistant's turns.",
    "media_not_placed": "The chat template does not place the media of a turn, or places others.",
    "tools_not_rendered": "The chat template leaves out tools, tool calls or their results.",
    "nothing_to_train": "There is no assistant turn that is trained on.",
}


class UnusableSampleError(UserError):
    """A sample cannot be tokenised, because of what is in it.

    Attributes:
        rule: Name of the rule, a key of `TOKENIZE_RULES`.
        detail: What is wrong with the sample, without naming it.
    """

    def __init__(self, sample_id: str, rule: str, detail: str) -> None:
        """Refuse a sample under `rule`, for the reason `detail`."""
        super().__init__(f"sample '{sample_id}': {detail}")
        self.rule = rule
        self.detail = detail


@dataclass(frozen=True)
class Unusable:
    """A sample that cannot be tokenised."""

    sample_id: str
    rule: str
    reason: str
