"""All questions to one server: side by side, kept as they are answered, and what was not answered by name."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from qvl_pipeline.config import ServerConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.servers.client import Answer, ChatClient, NotAnsweredError
from qvl_pipeline.evaluation.servers.kept import KeptAnswers
from qvl_pipeline.evaluation.servers.media import NotAskableError
from qvl_pipeline.evaluation.servers.questions import Questions

logger = logging.getLogger(__name__)

# As many are named in the log, and reasons in the message.
_NAMED = 10
_REASONS = 3


@dataclass(frozen=True)
class Served:
    """What came of the questions.

    Attributes:
        answers: By row of the tokenized samples.
        failures: Why there is none, of all other rows.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def text(self, row: int) -> str | None:
        """Return the answer to a row; `None` where there is none."""
        return self.answers[row].text if row in self.answers else None


def ask_all(
    name: str,
    questions: Questions,
    client: ChatClient,
    rows: Sequence[int],
    kept: KeptAnswers,
    identity: str,
    on_done: Callable[[int], object],
    *,
    own: bool,
) -> Served:
    """Ask for all answers.

    Args:
        name: Name of the model in `evaluate.servers`.
        questions: Makes the requests.
        client: The server.
        rows: Rows of the tokenized samples.
        kept: Answers that are there, to which new ones are added at once.
        identity: Which model it is: answers of another are not taken over.
        on_done: Called with a number of answers whenever they are there.
        own: Whether its prompts have the tokens of training.

    Raises:
        UserError: More stay without an answer than `max_failures` allows; or the server is gone, or refuses all.
    """
    server, taken = questions.server, []
    planned = {row: questions.samples.row(row)["prompt_length"] for row in rows}
    compared = own and server.prompt_tokens != "off"

    def fits(row: int, answer: Answer) -> bool:
        return not compared or answer.prompt_tokens in (None, planned[row])

    def ask(row: int) -> Answer:
        try:
            body = questions.body(row)
        except OSError as error:
            raise UserError(f"{error}: a medium cannot be read; run the pipeline 'validate'") from error
        asked = hashlib.sha256(identity.encode() + b"\0" + body).hexdigest()
        # Of a server that has been told of other sampling since, another one may come.
        if (answer := kept.get(asked)) is not None and fits(row, answer):
            taken.append(row)
            return answer
        answer = client.answer(body)
        if server.prompt_tokens == "error" and not fits(row, answer):
            counted = f"the server counts {answer.prompt_tokens} tokens in its prompt, training {planned[row]}"
            raise NotAnsweredError(f"{counted}: it samples, resizes or renders otherwise")
        kept.add(asked, answer)
        return answer

    found = Served()
    with kept.writing(), ThreadPoolExecutor(server.concurrency) as pool:
        waiting = {pool.submit(ask, row): row for row in rows}
        try:
            for future in as_completed(waiting):
                row = waiting.pop(future)
                try:
                    found.answers[row] = future.result()
                except (NotAnsweredError, NotAskableError) as error:
                    found.failures[row] = str(error)
                on_done(1)
        finally:
            pool.shutdown(cancel_futures=True)  # those that are being answered are kept
    if taken:
        logger.info("%s: %d of %d answers are from an evaluation that was cut off", name, len(taken), len(rows))
    names = {row: questions.samples.row(row)["sample_id"] for row in rows}
    others = sorted(row for row, answer in found.answers.items() if not fits(row, answer))
    if others:
        first = others[0]
        logger.warning(
            "evaluate.servers.%s: the server counts other tokens than training in %d of %d prompts (%s instead of %d "
            "in '%s'): it samples, resizes or renders otherwise, and its scores are of that (docs/evaluation.md)",
            *(name, len(others), len(found.answers), found.answers[first].prompt_tokens, planned[first], names[first]),
        )
    _refuse_failures(name, found, names, server)
    return found


def _refuse_failures(name: str, found: Served, names: Mapping[int, str], server: ServerConfig) -> None:
    for row in sorted(found.failures)[:_NAMED]:
        logger.warning("evaluate.servers.%s: '%s' has no answer: %s", name, names[row], found.failures[row])
    failed, total = len(found.failures), len(names)
    if failed <= server.max_failures * total:
        return
    reasons = Counter(found.failures.values()).most_common(_REASONS)
    told = "; ".join(f"{count} times {reason}" if count > 1 else reason for reason, count in reasons)
    raise UserError(
        f"evaluate.servers.{name}: {failed} of {total} samples have no answer, the first is "
        f"'{names[min(found.failures)]}' ({told}); the others are kept: run again to ask for the missing ones, "
        "or allow some by max_failures"
    )
