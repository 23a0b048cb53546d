"""Send examples to a server and score the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.client.bulk.request_template import RequestTemplate, tier_fields
from server.client.bulk.rows import Row
from server.client.bulk.sender import Outcome, Sender, SendLimits
from server.client.bulk.summary import OnRows
from server.client.bulk.transport import Transport
from server.datasets import Example, LabelledText
from server.evaluation.examples import DEFAULT_MAX_TOKENS, EvaluatedModel, content_of, expected_of
from server.evaluation.scores import Scores, exact_match, score_labels

_MAX_NAMED = 8


class LabelsError(Exception):
    """None of the labels of the data is one of the head's; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """Request fields of generated answers.

    Attributes:
        max_tokens: Maximum number of new tokens.
        stop: Stop strings.
        priority: Priority as interactive requests; None is the service tier ``batch``.
        generate: Whether texts with a label are answered freely, rather than classified into the labels.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: Sequence[str] = ()
    priority: int | None = None
    generate: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The scores of one model.

    Attributes:
        scores: The scores.
        first_error: The error of the first row without an answer; None if all rows have one.
        answers: The answer of each row; None where there is none.
        errors: Why a row has no answer, by its number from 0.
    """

    scores: Scores
    first_error: str | None
    answers: Sequence[str | None] = ()
    errors: Mapping[int, str] = field(default_factory=dict)


async def evaluate_model(
    examples: Sequence[Example],
    evaluated: EvaluatedModel,
    options: AnswerOptions,
    http: Transport,
    limits: SendLimits,
    on_rows: OnRows,
) -> EvaluationResult:
    """Score a model on examples.

    Args:
        examples: At least one, all of one format.
        evaluated: The model.
        options: Request fields of generated answers.
        http: Transport to the server.
        limits: How much is sent at once.
        on_rows: Called with the number of new rows, and the number of errors so far.

    Raises:
        SenderError: If the server does not answer, or rejects every row.
        LabelsError: If none of the labels of the examples is one of the head's.
    """
    labels = sorted({example.label for example in examples if isinstance(example, LabelledText)})
    is_free = options.generate
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": options.max_tokens}
    fields |= tier_fields(options.priority)
    fields |= {"stop": list(options.stop)} if options.stop else {}
    fields |= {} if evaluated.ensemble is None else {"ensemble": evaluated.ensemble}
    template = RequestTemplate(
        model=evaluated.model,
        labels=[] if is_free or evaluated.has_head else [evaluated.separator + label for label in labels],
        by_head=not is_free and evaluated.has_head and bool(labels),
        options=fields,
    )
    sender = Sender(http, template, limits)
    answers: list[str | None] = []
    errors: dict[int, str] = {}
    first_error = None
    async for outcomes in sender.outcomes(_rows(examples, evaluated)):
        for outcome in outcomes:
            if evaluated.has_head and labels and not any(answers):
                _check_labels(evaluated.name, labels, outcome)
            answers.append(_answer(outcome))
            if outcome.error is not None:
                errors[outcome.row.index] = str(outcome.error["message"])
                first_error = first_error or f"line {outcome.row.line}: {outcome.error['message']}"
        on_rows(len(outcomes), len(errors))
    if labels:
        expected = [example.label for example in examples if isinstance(example, LabelledText)]
        if not evaluated.has_head:
            answers = [None if answer is None else _label(answer, evaluated.separator, is_free) for answer in answers]
        return EvaluationResult(score_labels(expected, answers, labels), first_error, answers, errors)
    scores = exact_match([expected_of(example) for example in examples], answers)
    return EvaluationResult(scores, first_error, answers, errors)


def _check_labels(name: str, labels: Sequence[str], outcome: Outcome) -> None:
    """Compare the labels of the data with those of the head, which an answer names."""
    known = list((outcome.response or {}).get("probabilities", ()))
    if known and not set(known) & set(labels):
        raise LabelsError(
            f"none of the labels of the data ({_some(labels)}) is one of the head of {name} ({_some(known)}): name "
            f"the head's labels with prelude edit {name} --labels, or change the data"
        )


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_MAX_NAMED]) + (", ..." if len(labels) > _MAX_NAMED else "")


def _rows(examples: Sequence[Example], evaluated: EvaluatedModel) -> Iterator[Row]:
    for index, example in enumerate(examples):
        form, content = content_of(example, evaluated)
        fields: dict[str, Any] = {form: content}
        if evaluated.has_tasks and example.task_id is not None:
            fields["task_id"] = example.task_id
        size = len(content) if isinstance(content, str) else sum(len(turn["content"]) for turn in content)
        yield Row(index, example.line or index + 1, fields, form, num_bytes=size)


def _answer(outcome: Outcome) -> str | None:
    response = outcome.response
    if response is None:
        return None
    if "label" in response:
        return str(response["label"])
    if "message" in response:
        return str(response["message"].get("content") or "")
    return str(response["text"])


def _label(answer: str, separator: str, is_free: bool) -> str:
    """The label in an answer: behind the separator, in a generated text without white space at both ends."""
    if is_free:
        return answer.strip().removeprefix(separator.strip()).strip()
    return answer.removeprefix(separator)
