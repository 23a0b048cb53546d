"""Cross-origin protection: pages of other origins may not change or read anything unless they are allowed.

The rule is that of Go's ``http.CrossOriginProtection``. Starlette's CORS middleware is not used: it rejects
preflights in plain text, without a request id, and lets caches mix up responses to different origins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware
from server.errors import ConfigurationError, CrossOriginError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

METHODS = "GET, HEAD, POST, PUT, DELETE"
"""Methods that an allowed origin may use."""

EXPOSED_HEADERS = (
    *("content-disposition", "etag", "retry-after", "retry-after-ms", "www-authenticate"),
    *("x-prelude-prompt", "x-request-id", "x-should-retry"),
    *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
"""Response headers that pages of allowed origins may read, besides the CORS-safelisted ones."""

PREFLIGHT_SECONDS = 600
"""How long a browser may cache a preflight, in seconds."""

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.ASCII)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, \t-]{1,2048}", re.ASCII)


class Origins:
    """The allowed origins.

    Args:
        urls: Each ``scheme://host`` or ``scheme://host:port``.

    Raises:
        ConfigurationError: If one of them is not an origin.
    """

    def __init__(self, urls: Sequence[str] = ()) -> None:
        self._origins = frozenset(map(_read, urls))

    def __len__(self) -> int:
        return len(self._origins)

    def __contains__(self, origin: str | None) -> bool:
        """Whether an Origin header's value is one of them."""
        return origin is not None and origin.lower() in self._origins

    def headers_for(self, origin: str | None) -> dict[str, str]:
        """The headers that let a page of this origin read a response; empty if it is not allowed."""
        if origin is None or origin not in self:
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": ", ".join(EXPOSED_HEADERS),
        }


class CorsMiddleware(HttpMiddleware):
    """Lets pages of allowed origins read every response, including errors and streams.

    Args:
        app: The rest of the application.
        origins: At least one.
    """

    def __init__(self, app: ASGIApp, *, origins: Origins) -> None:
        super().__init__(app)
        self._origins = origins

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        added = self._origins.headers_for(Headers(scope=scope).get("origin"))

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(added)
                headers.add_vary_header("Origin")
            await send(message)

        await self.app(scope, receive, send_with_origin)


class CrossOriginMiddleware(HttpMiddleware):
    """Rejects unsafe requests from pages of other origins before their body is read; answers allowed preflights.

    Args:
        app: The rest of the application.
        origins: The allowed origins.
    """

    def __init__(self, app: ASGIApp, *, origins: Origins) -> None:
        super().__init__(app)
        self._origins = origins

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the origin of one request."""
        headers, method = Headers(scope=scope), scope["method"]
        if method == "OPTIONS" and "access-control-request-method" in headers:
            if headers.get("origin") in self._origins:
                await _preflight(headers)(scope, receive, send)
                return
        elif method not in SAFE_METHODS and is_foreign(headers) and headers.get("origin") not in self._origins:
            raise CrossOriginError(_explain(headers.get("origin", "")))
        await self.app(scope, receive, send)


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another origin sent the request. Every current browser sends one of the two headers.

    Browsers send ``Sec-Fetch-Site`` to https and to loopback, and ``Origin`` with unsafe methods.
    """
    sites = headers.getlist("sec-fetch-site")
    if sites:
        return any(site not in {"same-origin", "none"} for site in sites)
    host = headers.get("host", "").lower()
    return any(origin.lower().partition("://")[2] != (host or None) for origin in headers.getlist("origin"))


def _explain(origin: str) -> str:
    if _ORIGIN.fullmatch(origin) is None:
        return "a page of another origin may not send this"
    return f"a page of {origin} may not send this: start the server with --allow-origin {origin} if it should"


def _preflight(headers: Headers) -> Response:
    """Allow all methods and the requested headers: API keys restrict access, not header names."""
    allowed = {
        "access-control-allow-methods": METHODS,
        "access-control-max-age": str(PREFLIGHT_SECONDS),
    }
    names = headers.get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(names):
        allowed["access-control-allow-headers"] = names
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)


def _read(url: str) -> str:
    origin = url.strip().lower().removesuffix("/")
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise ConfigurationError(
            f"--allow-origin {url!r} is not an origin: give scheme://host or scheme://host:port, such as "
            "http://localhost:3000"
        )
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" if port == _DEFAULT_PORTS.get(scheme) else origin
