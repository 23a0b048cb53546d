"""What a run needs to know about its server before the first row: the model, and the default concurrency."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import httpx

from prompt_store.types import PromptKind, PromptRef, TaskType
from server.client.bulk.sender import SendLimits
from server.client.http import ClientError, PreludeClient


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """The model that a name refers to.

    Attributes:
        model: The field ``model`` of requests. It names versions, so that a promotion does not change them.
        has_head: Whether the soft prompt or the adapter has a classification head.
        record: The version's record in the catalog, of a pair the soft prompt's; None for the base model, or if the
            key may not read it.
    """

    model: str
    has_head: bool = False
    record: dict[str, Any] | None = None


def resolve_model(client: PreludeClient, name: str, adapter: str | None = None) -> ResolvedModel:
    """Resolve a name to a model.

    Args:
        client: Client of the server.
        name: The base model, or ``NAME``, ``NAME@VERSION``, ``NAME@ALIAS``, or two of these with ``+`` between.
        adapter: An adapter beside it.

    Raises:
        ClientError: If the model does not exist, or the server does not answer.
    """
    first = _resolve_joint(client, name)
    if adapter is None:
        return first
    second = _resolve_joint(client, adapter)
    is_base = client.model(first.model)["parent"] is None
    return second if is_base else _joined(first, second)


def _resolve_joint(client: PreludeClient, name: str) -> ResolvedModel:
    parts = name.split("+")
    try:
        for part in parts:
            PromptRef.parse(part)
    except ValueError:
        client.model(name)
        return ResolvedModel(name)
    return reduce(_joined, [_resolve(client, part) for part in parts])


def _joined(first: ResolvedModel, second: ResolvedModel) -> ResolvedModel:
    records = [found.record for found in (first, second) if found.record is not None]
    records.sort(key=lambda record: record["kind"] == PromptKind.ADAPTER)  # the soft prompt's first
    return ResolvedModel(
        f"{first.model}+{second.model}", first.has_head or second.has_head, records[0] if records else None
    )


def _resolve(client: PreludeClient, name: str) -> ResolvedModel:
    try:
        ref = PromptRef.parse(name)
    except ValueError:
        client.model(name)
        return ResolvedModel(name)
    try:
        record = client.version(ref)
    except ClientError as error:
        if error.status == httpx.codes.FORBIDDEN:  # the key may only generate
            return ResolvedModel(name)
        if error.status != httpx.codes.NOT_FOUND:
            raise
        client.model(name)
        return ResolvedModel(name)
    has_head = record["task_type"] == TaskType.SEQ_CLS
    return ResolvedModel(f"{record['id']}@{record['version']}", has_head, record)


def default_concurrency(client: PreludeClient, model: str) -> int:
    """Number of sequences in flight that keeps the server's batch full while responses are on their way.

    Args:
        client: Client of the server.
        model: Any served model; each entry of ``/v1/models`` contains the server's limits.

    Returns:
        Twice the server's ``--max-num-seqs``, but at most ``--max-waiting`` more than it. The default of
        ``SendLimits`` if the limits are unknown.
    """
    try:
        card = client.model(model)
        num_running, num_waiting = int(card["max_num_seqs"]), int(card["max_waiting"])
    except (ClientError, KeyError, TypeError, ValueError):
        return SendLimits().concurrency
    return max(1, num_running + min(num_running, num_waiting))
