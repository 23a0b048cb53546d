"""A run's requests, over the kept connections of one aiohttp session.

A run mostly shares its cores with the server. httpx takes 4 to 7 ms of CPU for a request at 64 in flight, because its
pool looks through all connections; aiohttp takes about a tenth of that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

import aiohttp
import httpx

from server.client.http import ClientError, key_headers, server_url

_CONNECT_SECONDS = 30.0


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


class NoResponseError(Exception):
    """No complete answer arrived; the text says why."""


class Transport(Protocol):
    """What sends requests; tests put a fake in its place.

    Attributes:
        base_url: Where to, for messages.
    """

    base_url: str

    async def post(self, path: str, content: bytes) -> Response:
        """Send JSON and read the answer. Cancelling it ends the request at the server too.

        Raises:
            NoResponseError: If there is none.
        """


@asynccontextmanager
async def open_transport(url: str, api_key: str | None) -> AsyncIterator[Transport]:
    """A session with a server; its connections are opened as they are needed, and closed when the block ends.

    Proxies are those of the environment (``HTTP_PROXY``, ``NO_PROXY``, ...), certificates those of httpx.

    Args:
        url: Where the server is; its path is a prefix, a user and password in it are sent as Basic authentication.
        api_key: Sent with every request, if given.

    Raises:
        ClientError: If the key cannot be sent, or the URL is not one of http or https.
    """
    parsed = server_url(url)
    if parsed.userinfo and api_key:
        raise ClientError("a URL with a user and password takes no API key: both are sent as the same header")
    # Compressed answers would take CPU on both sides of a loopback or local network.
    headers = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}
    headers |= key_headers(api_key)
    context = httpx.create_ssl_context() if parsed.scheme == "https" else True
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=context),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        trust_env=True,
    ) as session:
        yield AiohttpTransport(session, str(parsed))


class AiohttpTransport:
    """A ``Transport`` over an aiohttp session.

    Args:
        session: Sends the headers that every request has.
        base_url: Put before every path.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self.base_url = base_url
        self._session = session

    async def post(self, path: str, content: bytes) -> Response:
        """Send JSON and read the answer; see ``Transport.post``. A redirect is an answer: it is not followed."""
        try:
            async with self._session.post(self.base_url + path, data=content, allow_redirects=False) as response:
                body = await response.read()
        except aiohttp.ServerDisconnectedError as error:  # its text may be a dump of half an answer's head
            raise NoResponseError("the server closed the connection before it answered") from error
        except (aiohttp.ClientError, OSError) as error:
            raise NoResponseError(str(error) or type(error).__name__) from error
        return Response(response.status, {name.lower(): value for name, value in response.headers.items()}, body)
