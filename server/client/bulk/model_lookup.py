"""What a run has to know of its server before the first row: what answers, and how much may be asked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from prompt_store.types import PromptRef, TaskType
from server.client.bulk.sender import SendLimits
from server.client.http import ClientError, PreludeClient


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What answers.

    Attributes:
        model: The field ``model`` of requests; a soft prompt by its version, so that no promotion changes it.
        has_head: Whether it classifies by a head of its own.
        record: The version's record in the catalog; None for the base model, or where the key may not read it.
    """

    model: str
    has_head: bool = False
    record: dict[str, Any] | None = None


def resolve_model(client: PreludeClient, name: str) -> ResolvedModel:
    """What a name means now.

    Args:
        client: The server.
        name: The base model, or ``NAME``, ``NAME@VERSION``, ``NAME@ALIAS``.

    Raises:
        ClientError: If there is no such thing, or the server does not answer.
    """
    try:
        ref = PromptRef.parse(name)
    except ValueError:
        client.model(name)
        return ResolvedModel(name)
    try:
        record = client.version(ref)
    except ClientError as error:
        if error.status == httpx.codes.FORBIDDEN:  # a key for nothing but generation
            return ResolvedModel(name)
        if error.status != httpx.codes.NOT_FOUND:
            raise
        client.model(name)
        return ResolvedModel(name)
    has_head = record["task_type"] == TaskType.SEQ_CLS
    return ResolvedModel(f"{record['id']}@{record['version']}", has_head, record)


def default_concurrency(client: PreludeClient, model: str) -> int:
    """How many sequences to keep at a server so that its batch stays full while answers are on their way.

    Args:
        client: The server.
        model: Something that it serves; every entry of ``/v1/models`` tells of the server's places.

    Returns:
        Twice what runs in one step, as far as the server lets sequences wait; the default of ``SendLimits`` if the
        server does not answer or does not say.
    """
    try:
        card = client.model(model)
        num_running, num_waiting = int(card["max_num_seqs"]), int(card["max_waiting"])
    except (ClientError, KeyError, TypeError, ValueError):
        return SendLimits().concurrency
    return max(1, num_running + min(num_running, num_waiting))
