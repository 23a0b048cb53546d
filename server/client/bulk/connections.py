"""HTTP/1.1 over connections that stay open: as much of it as a run needs, and no more.

A run mostly shares its cores with the server. What a general client does for each request (its pool looks through all
connections, every header goes through several layers) took more CPU than all the rest of a run; here a request is one
write, and an answer goes from the socket into httptools' parser.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol, cast
from urllib.request import getproxies, proxy_bypass

import httptools
import httpx

from server.client.http import key_headers, server_url

_CONNECT_SECONDS = 30.0
_JSON = "application/json"


class Response(NamedTuple):
    """An answer.

    Attributes:
        status: The HTTP status.
        headers: By name in lower case; the last of those that came twice.
        content: The body.
    """

    status: int
    headers: dict[str, str]
    content: bytes


class NoAnswerError(Exception):
    """No answer came, or no whole one; the text says why."""


class Poster(Protocol):
    """What sends requests.

    Attributes:
        base_url: Where to, for messages.
    """

    base_url: str

    async def post(self, path: str, content: bytes) -> Response:
        """Send JSON and read the answer. Being cancelled ends the request at the server too.

        Raises:
            NoAnswerError: If there is none.
        """


@asynccontextmanager
async def connected(url: str, api_key: str | None) -> AsyncIterator[Poster]:
    """Connections to a server, opened as they are needed; closed when the block ends.

    Args:
        url: Where the server is.
        api_key: Sent with every request, if given.

    Raises:
        ClientError: If the key cannot be sent, or the URL is none.
    """
    parsed, headers = server_url(url), key_headers(api_key)
    if parsed.userinfo or _is_proxied(parsed):
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=parsed, headers=headers, timeout=timeout, limits=limits) as client:
            yield ClientPoster(client)
        return
    connections = Connections(parsed, headers)
    try:
        yield connections
    finally:
        connections.close()


def _is_proxied(url: httpx.URL) -> bool:
    proxies = getproxies()
    return (url.scheme in proxies or "all" in proxies) and not proxy_bypass(url.host)


class ClientPoster:
    """Over httpx: slower, but it knows proxies and passwords in URLs.

    Args:
        client: The client.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.base_url = str(client.base_url).rstrip("/")
        self._client = client

    async def post(self, path: str, content: bytes) -> Response:
        """See ``Poster``."""
        try:
            response = await self._client.post(path, content=content, headers={"content-type": _JSON})
        except httpx.TransportError as error:
            raise NoAnswerError(str(error) or type(error).__name__) from error
        return Response(response.status_code, dict(response.headers), response.content)


class Connections:
    """Over connections of its own: as many as there are requests at once.

    Args:
        url: Where to; the path is a prefix.
        headers: Sent with every request.
    """

    def __init__(self, url: httpx.URL, headers: dict[str, str]) -> None:
        self.base_url = str(url)
        self._host, self._port = url.host, url.port or (443 if url.scheme == "https" else 80)
        self._context = httpx.create_ssl_context() if url.scheme == "https" else None
        self._prefix = url.raw_path.rstrip(b"/")
        given = {"host": url.netloc.decode(), "content-type": _JSON, "accept": _JSON, **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in given.items()).encode()
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []

    async def post(self, path: str, content: bytes) -> Response:
        """See ``Poster``."""
        head = b"POST %s HTTP/1.1\r\n%scontent-length: %d\r\n\r\n"
        request = head % (self._prefix + path.encode(), self._headers, len(content)) + content
        while True:
            is_kept = bool(self._idle)
            connection = self._idle.pop() if is_kept else await self._connect()
            try:
                response = await connection.ask(request)
            except NoAnswerError:
                if is_kept and not connection.has_begun:
                    continue  # the server closed it, as it may when nothing is asked for a while
                raise
            except BaseException:
                connection.close()
                raise
            if connection.is_open:
                self._idle.append(connection)
            return response

    def close(self) -> None:
        """Close all of them."""
        for connection in list(self._open):
            connection.close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._forget), self._host, self._port, ssl=self._context
                )
        except TimeoutError as error:
            raise NoAnswerError(f"no connection within {_CONNECT_SECONDS:g} s") from error
        except ssl.SSLError as error:
            raise NoAnswerError(f"TLS: {error.reason or error}") from error
        except OSError as error:
            raise NoAnswerError(error.strerror or str(error)) from error
        self._open.add(connection)
        return connection

    def _forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time.

    Args:
        on_lost: Told when it is closed, by whomever.

    Attributes:
        is_open: Whether another request may be sent.
        has_begun: Whether anything of the newest answer has come.
    """

    def __init__(self, on_lost: Callable[[_Connection], None]) -> None:
        self.is_open = False
        self.has_begun = False
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._ends_with_connection = False

    def ask(self, request: bytes) -> asyncio.Future[Response]:
        """Send a request; gives its answer, or a NoAnswerError."""
        answer = self._answer = asyncio.get_running_loop().create_future()
        self.has_begun = False
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection was closed")
        else:
            self._transport.write(request)
        return answer

    def close(self) -> None:
        """End it at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)  # not to be asked of uvloop's, which is no subclass
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Something came."""
        if self._answer is None:
            self.close()  # nothing was asked for: whatever it is, the next answer must not be taken for it
            return
        self.has_begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"what came is not HTTP: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed."""
        self.is_open = False
        if self._ends_with_connection and error is None:
            self._finish()
        elif isinstance(error, OSError):
            self._fail(error.strerror or str(error))
        else:
            self._fail("the connection ended before the answer did")
        self._on_lost(self)

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """All of them."""
        names = self._headers.keys()
        self._ends_with_connection = "content-length" not in names and "transfer-encoding" not in names

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """All of it."""
        if self._parser.get_status_code() < 200:  # an interim answer, such as 100; the real one follows
            self._headers, self._body, self._ends_with_connection = {}, [], False
            return
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()

    def _finish(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(Response(self._parser.get_status_code(), self._headers, b"".join(self._body)))
        self._headers, self._body, self._ends_with_connection = {}, [], False

    def _fail(self, reason: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(NoAnswerError(reason))
