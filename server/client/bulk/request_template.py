"""Build the request of a row: its path, its body, and the rows that can share one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server.client.bulk.rows import Row

BATCH_TIER: Mapping[str, Any] = {"service_tier": "batch"}
"""Request fields of work that no person waits for."""

COMPLETIONS, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"


class BatchKey(NamedTuple):
    """Rows with the same key can share a request.

    Attributes:
        path: Path of the request.
        model: The field ``model``, several names for an ensemble; None if ``prompt_id`` names the soft prompt.
        prompt_id: The field ``prompt_id``.
        adapter_id: The field ``adapter_id``.
        task_id: The task of a multitask prompt.
        is_rows_own: Whether the row itself names a soft prompt or an adapter.
    """

    path: str
    model: str | tuple[str, ...] | None
    prompt_id: str | None
    adapter_id: str | None
    task_id: int | None
    is_rows_own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTemplate:
    """The parts of a request that all rows share.

    Attributes:
        model: The model for rows that name none; several names for an ensemble.
        labels: Labels to classify texts into; empty if texts are not classified, or by a head.
        by_head: Whether texts are classified by the soft prompt's head.
        task_id: The task of rows that name none.
        options: Additional fields of the body, such as ``max_tokens``.
    """

    model: str | tuple[str, ...]
    labels: Sequence[str] = ()
    by_head: bool = False
    task_id: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequences_per_row(self) -> int:
        """Number of sequences on the server for one row."""
        members = 1 if isinstance(self.model, str) else len(self.model)
        return members * max(1, len(self.labels))

    def key(self, row: Row) -> BatchKey:
        """The batch key of a row."""
        fields = row.fields
        path = CHAT if row.form == "messages" else CLASSIFY if self.labels or self.by_head else COMPLETIONS
        prompt_id, model, adapter_id = fields.get("prompt_id"), fields.get("model"), fields.get("adapter_id")
        is_own = any(name is not None for name in (prompt_id, model, adapter_id))
        if prompt_id is None and model is None:
            model = self.model
        task_id = fields.get("task_id")
        return BatchKey(path, model, prompt_id, adapter_id, self.task_id if task_id is None else task_id, is_own)

    def body(self, key: BatchKey, rows: Sequence[Row]) -> dict[str, Any]:
        """The body of a request for rows with this key."""
        named = {
            "model": list(key.model) if isinstance(key.model, tuple) else key.model,
            "prompt_id": key.prompt_id,
            "adapter_id": key.adapter_id,
            "task_id": key.task_id,
        }
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


def tier_fields(priority: int | None) -> Mapping[str, Any]:
    """Request fields of the service tier: ``batch``, or interactive with a priority if one is given."""
    return BATCH_TIER if priority is None else {"priority": priority}


def is_shared(key: BatchKey) -> bool:
    """Whether rows of this key can share a request; a conversation cannot."""
    return key.path != CHAT


def responses(key: BatchKey, reply: Mapping[str, Any], served_by: str | None, count: int) -> list[dict[str, Any]]:
    """The ``response`` of each row, as it is written to the output.

    Args:
        key: Key of the request.
        reply: The server's JSON.
        served_by: ``NAME@VERSION`` of the soft prompt that answered; None for the base model.
        count: Number of rows in the request.

    Raises:
        ValueError: If the reply does not answer this number of rows.
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
        raise ValueError("unexpected response") from error
