"""What a run has to know of its server before the first row: what answers, and connections to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from prompt_store.types import PromptRef, TaskType
from server.client import ClientError, PreludeClient


@dataclass(frozen=True, slots=True)
class Answerer:
    """What answers.

    Attributes:
        model: The field ``model`` of requests; a soft prompt by its version, so that no promotion changes it.
        has_head: Whether it classifies by a head of its own.
        record: The version's record in the catalog; None for the base model, or where the key may not read it.
    """

    model: str
    has_head: bool = False
    record: dict[str, Any] | None = None


def find_answerer(client: PreludeClient, name: str) -> Answerer:
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
        return Answerer(name)
    try:
        record = client.version(ref)
    except ClientError as error:
        if error.status == httpx.codes.FORBIDDEN:  # a key for nothing but generation
            return Answerer(name)
        if error.status != httpx.codes.NOT_FOUND:
            raise
        client.model(name)
        return Answerer(name)
    has_head = record["task_type"] == TaskType.SEQ_CLS
    return Answerer(f"{record['id']}@{record['version']}", has_head, record)


def connect(url: str, api_key: str | None, *, connections: int, timeout: float) -> httpx.AsyncClient:
    """A client for many requests at once; use it as a context.

    Raises:
        ClientError: If the key cannot be sent, or the URL is none.
    """
    try:
        parsed = httpx.URL(url)
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ClientError(f"{url} cannot be reached: it is no URL of http or https", code="unreachable")
        return httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=30.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )
    except UnicodeEncodeError as error:
        raise ClientError("the API key has a character that no header can carry") from error
    except httpx.InvalidURL as error:
        raise ClientError(f"{url} cannot be reached: {error}", code="unreachable") from error
