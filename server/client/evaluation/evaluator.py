"""Send examples to a server and score the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.client.bulk.request_template import RequestTemplate
from server.client.bulk.rows import Form, Row
from server.client.bulk.sender import Outcome, Sender, SendLimits
from server.client.bulk.summary import OnRows
from server.client.bulk.transport import Transport
from server.client.evaluation.scores import Scores, exact_match, score_labels
from server.datasets import Conversation, Example, LabelledText, PromptCompletion

DEFAULT_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A soft prompt, a version or the base model, with the text prompt if any.

    Attributes:
        name: Name in reports.
        model: The field ``model`` of its requests.
        has_head: Whether it has a classification head.
        text_prompt: Instruction before each text, or around ``{}``; None for none.
        has_tasks: Whether to send the ``task_id`` of rows.
        separator: Text between a text and a label that is scored, as in training.
    """

    name: str
    model: str
    has_head: bool = False
    text_prompt: str | None = None
    has_tasks: bool = False
    separator: str = "\n"

    def prompted(self, text: str) -> str:
        """Add the text prompt to a text."""
        if self.text_prompt is None:
            return text
        return self.text_prompt.replace("{}", text) if "{}" in self.text_prompt else self.text_prompt + text


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """Request fields of generated answers.

    Attributes:
        max_tokens: Maximum number of new tokens.
        stop: Stop strings.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The scores of one model.

    Attributes:
        scores: The scores.
        first_error: The error of the first row without an answer; None if all rows have one.
    """

    scores: Scores
    first_error: str | None


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
    """
    labels = sorted({example.label for example in examples if isinstance(example, LabelledText)})
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": options.max_tokens}
    fields |= {"stop": list(options.stop)} if options.stop else {}
    template = RequestTemplate(
        model=evaluated.model,
        labels=[] if evaluated.has_head else [evaluated.separator + label for label in labels],
        by_head=evaluated.has_head and bool(labels),
        options=fields,
    )
    sender = Sender(http, template, limits)
    answers: list[str | None] = []
    num_errors, first_error = 0, None
    async for outcomes in sender.outcomes(_rows(examples, evaluated)):
        for outcome in outcomes:
            answers.append(_answer(outcome))
            if outcome.error is not None:
                num_errors += 1
                first_error = first_error or f"line {outcome.row.line}: {outcome.error['message']}"
        on_rows(len(outcomes), num_errors)
    if labels:
        expected = [example.label for example in examples if isinstance(example, LabelledText)]
        if not evaluated.has_head:
            answers = [None if answer is None else answer.removeprefix(evaluated.separator) for answer in answers]
        return EvaluationResult(score_labels(expected, answers, labels), first_error)
    return EvaluationResult(exact_match([_expected(example) for example in examples], answers), first_error)


def _rows(examples: Sequence[Example], evaluated: EvaluatedModel) -> Iterator[Row]:
    for index, example in enumerate(examples):
        form, content = _content(example, evaluated)
        fields: dict[str, Any] = {form: content}
        if evaluated.has_tasks and example.task_id is not None:
            fields["task_id"] = example.task_id
        size = len(content) if isinstance(content, str) else sum(len(turn["content"]) for turn in content)
        yield Row(index, example.line or index + 1, fields, form, num_bytes=size)


def _content(example: Example, evaluated: EvaluatedModel) -> tuple[Form, Any]:
    match example:
        case LabelledText():
            return "text", evaluated.prompted(example.text)
        case PromptCompletion():
            return "prompt", evaluated.prompted(example.prompt)
        case Conversation():
            turns = [{"role": turn.role, "content": turn.content} for turn in example.messages[:-1]]
            if evaluated.text_prompt is not None:
                turns.insert(0, {"role": "system", "content": evaluated.text_prompt})
            return "messages", turns


def _expected(example: Example) -> str:
    match example:
        case Conversation():
            return example.messages[-1].content
        case PromptCompletion():
            return example.completion
        case LabelledText():
            return example.label


def _answer(outcome: Outcome) -> str | None:
    response = outcome.response
    if response is None:
        return None
    if "label" in response:
        return str(response["label"])
    if "message" in response:
        return str(response["message"].get("content") or "")
    return str(response["text"])
