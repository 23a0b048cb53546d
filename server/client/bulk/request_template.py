"""How a row is asked: which path, which body, and which rows may share one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server.client.bulk.rows import Row

COMPLETIONS, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"


class BatchKey(NamedTuple):
    """Rows of the same key may be asked in one request.

    Attributes:
        path: Where to.
        model: The field ``model``; None where ``prompt_id`` says it.
        prompt_id: The field ``prompt_id``.
        task_id: The task of a multitask prompt.
        is_rows_own: Whether the row itself named its soft prompt.
    """

    path: str
    model: str | None
    prompt_id: str | None
    task_id: int | None
    is_rows_own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTemplate:
    """What is asked of every row.

    Attributes:
        model: What answers a row that names nothing itself.
        labels: What texts are classified into; empty where they are not, or by a head.
        by_head: Whether texts are classified by the soft prompt's own head.
        task_id: The task of a row that names none.
        options: More fields of the body, such as ``max_tokens``.
    """

    model: str
    labels: Sequence[str] = ()
    by_head: bool = False
    task_id: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequences_per_row(self) -> int:
        """Places of the server that one row takes."""
        return max(1, len(self.labels))

    def key(self, row: Row) -> BatchKey:
        """Which request a row may go in."""
        fields = row.fields
        path = CHAT if row.form == "messages" else CLASSIFY if self.labels or self.by_head else COMPLETIONS
        prompt_id, model = fields.get("prompt_id"), fields.get("model")
        is_own = prompt_id is not None or model is not None
        if prompt_id is None and model is None:
            model = self.model
        task_id = fields.get("task_id")
        return BatchKey(path, model, prompt_id, self.task_id if task_id is None else task_id, is_own)

    def body(self, key: BatchKey, rows: Sequence[Row]) -> dict[str, Any]:
        """The body that asks for these rows, which have this key."""
        named = {"model": key.model, "prompt_id": key.prompt_id, "task_id": key.task_id}
        body = {**self.options, **{name: value for name, value in named.items() if value is not None}}
        if key.path == CHAT:
            (row,) = rows
            body["messages"] = row.content
        elif key.path == CLASSIFY:
            body["input"] = [row.content for row in rows]
            if self.labels:
                body["labels"] = list(self.labels)
        else:
            body["prompt"] = [row.content for row in rows]
        return body


def is_shared(key: BatchKey) -> bool:
    """Whether several rows of this key go in one request; a conversation has one of its own."""
    return key.path != CHAT


def responses(key: BatchKey, reply: Mapping[str, Any], served_by: str | None, count: int) -> list[dict[str, Any]]:
    """What each row of a request was answered, as it is written to the output.

    Args:
        key: The request's key.
        reply: The server's JSON.
        served_by: ``NAME@VERSION`` of what answered; None for the bare base.
        count: Rows that were asked.

    Raises:
        ValueError: If this is no answer to so many rows.
    """
    try:
        model = served_by or reply["model"]
        if key.path == CLASSIFY:
            found = {
                item["index"]: {
                    "model": model,
                    "label": item["label"],
                    "probability": item["probability"],
                    "probabilities": item["probabilities"],
                }
                for item in reply["data"]
            }
        elif key.path == CHAT:
            choice = reply["choices"][0]
            message = {name: value for name, value in choice["message"].items() if value is not None}
            found = {0: {"model": model, "message": message, "finish_reason": choice["finish_reason"]}}
        else:
            found = {
                choice["index"]: {"model": model, "text": choice["text"], "finish_reason": choice["finish_reason"]}
                for choice in reply["choices"]
            }
        if found.keys() != set(range(count)):
            raise ValueError(f"the server answered {len(found)} of {count} rows")
        return [found[index] for index in range(count)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError("the response is not that of a Prelude server") from error
