"""HTTP transport of bulk runs: one aiohttp session that reuses its connections.

A run often shares its cores with the server. With 64 requests in flight httpx needs 4 to 7 ms of CPU time per
request, because its pool searches all connections; aiohttp needs about a tenth of that.
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
    """An HTTP response.

    Attributes:
        status: The HTTP status.
        headers: Headers by lower-case name; the last value of a repeated one.
        content: The body.
    """

    status: int
    headers: dict[str, str]
    content: bytes


class NoResponseError(Exception):
    """No complete response arrived; the message is the reason."""


class Transport(Protocol):
    """Sends requests; tests replace it with a fake.

    Attributes:
        base_url: URL of the server, for error messages.
    """

    base_url: str

    async def post(self, path: str, content: bytes) -> Response:
        """Send JSON and read the response. Cancelling it also ends the request on the server.

        Raises:
            NoResponseError: If no complete response arrives.
        """


@asynccontextmanager
async def open_transport(url: str, api_key: str | None) -> AsyncIterator[Transport]:
    """Open a transport to a server; its connections are closed when the block ends.

    Uses the proxies of the environment (``HTTP_PROXY``, ``NO_PROXY``, ...) and the certificates of httpx.

    Args:
        url: URL of the server. Its path is a prefix; a user and password are sent as Basic authentication.
        api_key: API key, sent with every request.

    Raises:
        ClientError: If the key cannot be sent, or the URL is not an http or https URL.
    """
    parsed = server_url(url)
    if parsed.userinfo and api_key:
        raise ClientError(
            "a URL with a user and password cannot be combined with an API key: both use the same header"
        )
    # Compression would cost CPU time on both sides, and such runs are mostly on a local network.
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
        session: The session, with the headers of every request.
        base_url: Prefix of every path.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self.base_url = base_url
        self._session = session

    async def post(self, path: str, content: bytes) -> Response:
        """See ``Transport.post``. Redirects are not followed."""
        try:
            async with self._session.post(self.base_url + path, data=content, allow_redirects=False) as response:
                body = await response.read()
        except aiohttp.ServerDisconnectedError as error:  # its text may be a dump of partial headers
            raise NoResponseError("the server closed the connection without a response") from error
        except (aiohttp.ClientError, OSError) as error:
            raise NoResponseError(str(error) or type(error).__name__) from error
        return Response(response.status, {name.lower(): value for name, value in response.headers.items()}, body)
