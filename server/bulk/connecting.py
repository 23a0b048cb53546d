"""What a run has to know of its server before the first row: what answers, and connections to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from prompt_store.types import PromptRef, TaskType
from server.client import ClientError, PreludeClient

_CONNECTIONS_PER_CLIENT = 16
_CONNECT_SECONDS = 30.0


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


class Connections:
    """Sends requests over as many connections as there are requests at once; use it as a context.

    httpx looks through all connections of a client at the begin and at the end of each request. With hundreds of them
    that takes longer than everything else, so there are several clients of a few connections each.

    Args:
        url: Where the server is.
        api_key: Sent with every request, if given.
        requests: Requests that there may be at once.
        timeout: Seconds that an answer may take.

    Attributes:
        base_url: The server's.

    Raises:
        ClientError: If the key cannot be sent, or the URL is none.
    """

    def __init__(self, url: str, api_key: str | None, *, requests: int, timeout: float) -> None:
        self.base_url = url.rstrip("/")
        try:
            parsed = httpx.URL(url)
            if parsed.scheme not in {"http", "https"} or not parsed.host:
                raise ClientError(f"{url} cannot be reached: it is no URL of http or https", code="unreachable")
            context = httpx.create_ssl_context()  # one for all: it reads a file of certificates
            self._clients = [
                httpx.AsyncClient(
                    base_url=self.base_url,
                    headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                    timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS),
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=_CONNECTIONS_PER_CLIENT),
                    verify=context,
                )
                for _ in range(-(-requests // _CONNECTIONS_PER_CLIENT))
            ]
        except UnicodeEncodeError as error:
            raise ClientError("the API key has a character that no header can carry") from error
        except httpx.InvalidURL as error:
            raise ClientError(f"{url} cannot be reached: {error}", code="unreachable") from error
        self._num_busy = [0] * len(self._clients)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.aclose()

    async def post(self, path: str, *, content: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """Send one request and read its answer.

        Raises:
            httpx.TransportError: If there is none.
        """
        index = next((i for i, busy in enumerate(self._num_busy) if busy < _CONNECTIONS_PER_CLIENT), 0)
        self._num_busy[index] += 1
        try:
            return await self._clients[index].post(path, content=content, headers=dict(headers))
        finally:
            self._num_busy[index] -= 1
