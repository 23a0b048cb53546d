"""One request, passed to a replica and back as it is: both bodies stream, and the end of one side ends the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress

import aiohttp
from multidict import CIMultiDict
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from server.api.errors import describe
from server.api.http.disconnect import ClientDisconnected
from server.api.keys.signed_callers import INGRESS_HEADER, LOAD_HEADER, target_of
from server.api.task_group import task_group
from server.cluster.ingress.heads import REPLICA_HEADER
from server.cluster.ingress.replicas import Address
from server.errors import EngineDeadError

KEEP_ALIVE_SECONDS = 3.0
"""Seconds for which an idle connection is kept; replicas close theirs after five."""

_CONNECT_SECONDS = 5.0
_READ_BYTES = 256 * 1024

_OF_A_CONNECTION = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
    }
)
"""Headers that concern one connection only (RFC 9110, 7.6.1), and what the door has already answered."""

TRACE_HEADERS = frozenset({b"traceparent", b"tracestate"})

_END_OF_EVENT = b"\n\n"


class ReplicaUnreachableError(Exception):
    """The replica could not be connected: it has seen nothing of the request."""


class ReplicaLostError(Exception):
    """The replica ended before it began to answer."""


def http_session() -> aiohttp.ClientSession:
    """Connections to the replicas, to be closed by the caller."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, use_dns_cache=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BYTES,
        skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
        max_line_size=64 * 1024,
        max_field_size=64 * 1024,
    )


class RequestBody:
    """The body of a request, read once from the client, and again from memory if it is whole.

    Attributes:
        is_disconnected: Whether the client went before its end.

    Args:
        receive: The ASGI channel.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: list[bytes] = []
        self._is_whole = False
        self._is_streamed = False
        self.is_disconnected = False
        self._finished = asyncio.Event()

    async def read(self, max_bytes: int) -> bytes | None:
        """Read all of it into memory; None if it is longer, and then it can be sent only once.

        Raises:
            ClientDisconnected: If the client goes.
        """
        size = 0
        while not self._is_whole and size <= max_bytes:
            chunk = await self._next()
            size += len(chunk)
            self._read.append(chunk)
        return b"".join(self._read) if self._is_whole and size <= max_bytes else None

    @property
    def can_be_sent(self) -> bool:
        """Whether none of it has been sent and forgotten."""
        return self._is_whole or not self._is_streamed

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Its parts, those that were read first.

        Raises:
            ClientDisconnected: If the client goes.
        """
        for chunk in self._read:
            if chunk:
                yield chunk
        while not self._is_whole:
            self._is_streamed = True
            chunk = await self._next()
            if chunk:
                yield chunk

    @property
    def whole(self) -> bytes | None:
        """All of it if it is in memory, else None."""
        return b"".join(self._read) if self._is_whole and not self._is_streamed else None

    async def until_disconnected(self) -> None:
        """Wait until the client goes, once the body has been read.

        Raises:
            ClientDisconnected: Then.
        """
        await self._finished.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnected

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_disconnected = True
            raise ClientDisconnected
        if not message.get("more_body", False):
            self._is_whole = True
            self._finished.set()
        body: bytes = message.get("body", b"")
        return body


class Exchange:
    """One attempt to have a request answered by a replica.

    Attributes:
        started: Whether the client has got the beginning of an answer.

    Args:
        http: Connections to the replicas.
        scope: The request.
        body: Its body.
        send: The ASGI channel of the answer.
        signature: Signs it, by X-Request-ID.
        request_id: Value of X-Request-ID.
        trace: Headers of the trace, in place of those of the request; empty leaves them.
        on_answer: Called with the replica's load when it begins to answer.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        scope: Scope,
        body: RequestBody,
        send: Send,
        *,
        signature: str,
        request_id: str,
        trace: Mapping[str, str],
        on_answer: Callable[[int], None],
    ) -> None:
        self._http = http
        self._scope = scope
        self._body = body
        self._send = send
        self._signature = signature
        self._request_id = request_id
        self._trace = trace
        self._on_answer = on_answer
        self.started = False

    async def run(self, address: Address) -> None:
        """Pass the request to a replica, and its answer to the client.

        Raises:
            ReplicaUnreachableError: If it could not be connected.
            ReplicaLostError: If it ended before it answered.
            ClientDisconnected: If the client has gone.
            EngineDeadError: If it ended within an answer that is no event stream, so that the connection must close.
        """
        async with task_group() as group:
            watcher = group.create_task(self._body.until_disconnected())
            await self._pass(address)
            watcher.cancel()

    async def _pass(self, address: Address) -> None:
        target = target_of(self._scope["raw_path"], self._scope["query_string"]).decode("latin-1")
        try:
            response = await self._http.request(
                self._scope["method"],
                URL(address.url + target, encoded=True),
                headers=self._headers(),
                data=self._data(),
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as error:
            raise ReplicaUnreachableError(str(error)) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            if self._body.is_disconnected:
                raise ClientDisconnected from error
            raise ReplicaLostError(str(error)) from error
        try:
            await self._answer(response, address)
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()  # which ends the request at the replica

    def _headers(self) -> CIMultiDict[str]:
        dropped = {*_OF_A_CONNECTION, *_named_by_connection(self._scope["headers"]), INGRESS_HEADER.encode()}
        dropped |= TRACE_HEADERS if self._trace else set()
        headers = CIMultiDict[str](
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._scope["headers"]
            if name not in dropped and name not in (b"x-request-id", REPLICA_HEADER)
        )
        headers.update(self._trace)
        headers["x-request-id"] = self._request_id
        headers[INGRESS_HEADER] = self._signature
        return headers

    def _data(self) -> bytes | AsyncIterator[bytes] | None:
        whole = self._body.whole
        if whole is not None:
            return whole or None
        headers = dict(self._scope["headers"])
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return None
        return self._body.chunks()

    async def _answer(self, response: aiohttp.ClientResponse, address: Address) -> None:
        headers = [
            (name.lower(), value) for name, value in response.raw_headers if name.lower() not in _OF_A_CONNECTION
        ]
        load = next((value for name, value in headers if name == LOAD_HEADER.encode()), None)
        if load is not None and load.isdigit():
            self._on_answer(int(load))
        headers = [(name, value) for name, value in headers if name != LOAD_HEADER.encode()]
        headers.append((REPLICA_HEADER, address.name.encode()))
        if response.headers.get("connection", "").lower() == "close":
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})
        self.started = True
        is_stream = response.content_type == "text/event-stream"
        end = _END_OF_EVENT
        try:
            async for chunk in response.content.iter_any():
                end = (end + chunk)[-2:]
                await self._send_body(chunk)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            lost = EngineDeadError(f"the replica {address.name} ended while the request ran")
            if not is_stream:
                raise lost from error
            last = b"data: " + describe(lost, request_id=self._request_id).body + _END_OF_EVENT
            await self._send_body(last if end == _END_OF_EVENT else _END_OF_EVENT + last)
        await self._send_body(b"", more=False)

    async def _send_body(self, body: bytes, *, more: bool = True) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": more}
        with suppress(OSError):  # the client has gone, which the watcher reports
            await self._send(message)


def _named_by_connection(headers: list[tuple[bytes, bytes]]) -> set[bytes]:
    """The headers that the header Connection names: they concern this connection only, too."""
    return {part.strip().lower() for name, value in headers if name == b"connection" for part in value.split(b",")}
