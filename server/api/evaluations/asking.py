"""The request of one row, and the outcome that follows from its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prompt_store.jobs.types import Evaluation, EvaluationRow, Outcome
from server.api.keys.in_process import Reply
from server.datasets import Example, LabelledText
from server.evaluation.examples import EvaluatedModel, content_of
from server.evaluation.scores import Scores, exact_match, score_labels
from server.evaluation.significance import wilson

MAX_SCORED_LABELS = 500
"""Labels whose scores are kept."""

MAX_CONFUSED_LABELS = 64
"""Labels of a confusion matrix."""

_MAX_ERROR_CHARS = 2000
_MAX_NAMED = 8


class Asker:
    """Makes the requests of an evaluation and reads the answers.

    Args:
        evaluation: The evaluation.
        labels: All labels of the data; empty without labels.
    """

    def __init__(self, evaluation: Evaluation, labels: Sequence[str]) -> None:
        settings: Mapping[str, Any] = evaluation.settings
        self._labels = labels
        self._keeps_texts = bool(settings["keep_texts"])
        self._model = EvaluatedModel(
            name=evaluation.model,
            model=evaluation.model,
            has_head=bool(settings.get("by_head")),
            text_prompt=settings.get("text_prompt"),
            has_tasks=bool(settings.get("has_tasks")),
            separator=settings.get("separator") or "",
        )
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": settings["max_tokens"]}
        if settings["stop"]:
            self._options["stop"] = settings["stop"]

    def request(self, example: Example) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for an example."""
        form, content = content_of(example, self._model)
        body: dict[str, Any] = {"model": self._model.model}
        if self._model.has_tasks and example.task_id is not None:
            body["task_id"] = example.task_id
        if form == "text":
            body["input"] = content
            if not self._model.has_head:
                body["labels"] = [self._model.separator + label for label in self._labels]
            return "/v1/classify", body
        body |= self._options
        return ("/v1/chat/completions" if form == "messages" else "/v1/completions"), {**body, form: content}

    def head_fault(self, example: Example, reply: Reply) -> str | None:
        """Why no answer can be right: none of the labels of the data is one of the head's. None if one is."""
        if not (self._model.has_head and isinstance(example, LabelledText)) or reply.status != 200:
            return None
        known = json.loads(reply.body)["data"][0]["probabilities"]
        if set(known) & set(self._labels):
            return None
        ours, theirs = (", ".join(sorted(labels)[:_MAX_NAMED]) for labels in (self._labels, known))
        return f"none of the labels of the data ({ours}) is one of the head of {self._model.name} ({theirs})"

    def outcome(self, row: EvaluationRow, example: Example, expected: str, reply: Reply) -> EvaluationRow:
        """A row with its outcome.

        Args:
            row: The row.
            example: What was asked.
            expected: The right answer.
            reply: The answer to its request.
        """
        body = json.loads(reply.body)
        if reply.status != 200:
            message = str(body["error"]["message"])[:_MAX_ERROR_CHARS]
            return replace(row, outcome=Outcome.ERROR, error=message)
        if isinstance(example, LabelledText):
            kept: str | None
            answer = str(body["data"][0]["label"])
            if not self._model.has_head:
                answer = answer.removeprefix(self._model.separator)
            is_right, kept = answer == expected, answer
        else:
            choice = body["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
            is_right, kept = text.strip() == expected.strip(), text if self._keeps_texts else None
        return replace(row, outcome=Outcome.RIGHT if is_right else Outcome.WRONG, answer=kept)


def scores_of(rows: Sequence[EvaluationRow], metric: str) -> dict[str, Any]:
    """The scores of rows that all have an outcome, as the catalog keeps them."""
    scores = _scores(rows, metric)
    whole = scores.as_json
    num_labels = len(scores.labels or ())
    return {
        "accuracy": scores.accuracy,
        "interval": list(wilson(sum(scores.right), len(scores.right))),
        "macro_f1": scores.macro_f1,
        "labels": whole.get("labels") if num_labels <= MAX_SCORED_LABELS else None,
        "confusion": whole.get("confusion") if num_labels <= MAX_CONFUSED_LABELS else None,
    }


def _scores(rows: Sequence[EvaluationRow], metric: str) -> Scores:
    if metric == "accuracy":
        expected = [row.expected or "" for row in rows]
        return score_labels(expected, [row.answer for row in rows], sorted(set(expected)))
    # Texts need not be kept: a right answer is compared with itself.
    answers = {Outcome.RIGHT: "right", Outcome.WRONG: "wrong", Outcome.ERROR: None, None: None}
    return exact_match(["right"] * len(rows), [answers[row.outcome] for row in rows])
