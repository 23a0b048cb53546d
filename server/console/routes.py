"""``/console``: the page, and the sessions of those who log in there."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from server.api.http.http_middleware import HttpMiddleware
from server.api.keys.callers import ANYBODY, Caller, Scope
from server.api.keys.limits import TokenBucket
from server.api.keys.sessions import Sessions
from server.api.operations import Operation
from server.api.request_body import RequestBody, require_json
from server.api.session_cookies import delete_cookies, is_https, require_console_header, set_cookie, token_of
from server.console.pages import INDEX, built_pages
from server.errors import AuthenticationError, NotFoundError, RateLimitError

router = APIRouter(prefix="/console", tags=["console"])

TRIES_PER_MINUTE = 10
"""Logins that one address may try in a minute."""

_MAX_ADDRESSES = 4096
_IPV6_PREFIX = 64


class Tries:
    """Limits the logins of each address; the addresses that tried last are kept, at most ``_MAX_ADDRESSES``.

    Args:
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, address: str) -> None:
        """Count one try.

        Raises:
            RateLimitError: If the address has none left; has the time until it does.
        """
        origin = _network_of(address)
        bucket = self._buckets.setdefault(origin, TokenBucket(TRIES_PER_MINUTE, self._clock))
        self._buckets.move_to_end(origin)
        if len(self._buckets) > _MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        if seconds := bucket.seconds_until(1):
            raise RateLimitError(
                f"{TRIES_PER_MINUTE} logins a minute may be tried from one address: try again in {seconds:.0f} s",
                retry_after=seconds,
            )
        bucket.take(1)


def _network_of(address: str) -> str:
    """The address, or the /64 network of an IPv6 address, all of which one client may use."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))


@dataclass(frozen=True, slots=True)
class Login:
    """What logging in needs.

    Attributes:
        sessions: None if the server has no keys.
        tries: The logins that were tried.
    """

    sessions: Sessions | None
    tries: Tries = field(default_factory=Tries)

    @property
    def required(self) -> Sessions:
        """The sessions; NotFoundError if the server has no keys."""
        if self.sessions is None:
            raise NotFoundError("this server has no API keys: no login is needed")
        return self.sessions


async def _login(request: Request) -> Login:
    login = request.app.state.login
    if not isinstance(login, Login):
        raise TypeError("the application was not made by create_app")
    return login


LoginDep = Annotated[Login, Depends(_login)]


class LoginBody(RequestBody):
    """A login."""

    key: str = Field(description="The API key; the server keeps only its digest.", min_length=1, max_length=4096)


class SessionBody(BaseModel):
    """Who is logged in."""

    object: Annotated[str, Field(description="Always `console.session`.")] = "console.session"
    has_keys: bool = Field(description="Whether the server has API keys, and so a login.")
    name: str | None = Field(description="Name of the key in the key file.")
    key: str | None = Field(description="The beginning of the key's digest, as in the history; null without keys.")
    tenant: str = Field(description="Tenant of the key.")
    scopes: list[Scope] = Field(description="Scopes of the key, in alphabetical order.")
    expires_at: int | None = Field(
        description="When the session ends if it is not used, in Unix seconds; null without keys."
    )


@router.post("/session", status_code=204, dependencies=[Depends(require_json)])
@Operation(scopes=None, errors=(401, 403, 404, 429))
async def begin_session(body: LoginBody, request: Request, login: LoginDep) -> Response:
    """Log in with an API key, and get a cookie in its place.

    The cookie counts for requests from the server's own pages, and for other methods than GET only together with the
    header `X-Prelude-Console: 1`. `Authorization` wins over it. A session ends 12 hours after its last use, 7 days
    after the login, or when its key leaves the key file.
    """
    sessions = login.required
    login.tries.take("" if request.client is None else request.client.host)
    token = sessions.begin(body.key)
    response = Response(status_code=204)
    set_cookie(response, token, secure=is_https(request.scope))
    return response


@router.get("/session")
@Operation(scopes=None, errors=(401,))
async def get_session(request: Request, response: Response, login: LoginDep) -> SessionBody:
    """Get the key of the session: name, tenant and scopes. Without keys, that of every client."""
    if login.sessions is None:
        return _session_body(ANYBODY, None)
    token = token_of(request.scope)
    session = None if token is None else login.sessions.find(token)
    if token is None or session is None:
        raise AuthenticationError("no session: log in with POST /console/session")
    renewed = login.sessions.renewed(token)
    if renewed is not None:
        set_cookie(response, renewed, secure=is_https(request.scope))
    return _session_body(session.caller, session.expires_at)


@router.delete("/session", status_code=204)
@Operation(scopes=None, errors=(401, 403))
async def end_session(request: Request, login: LoginDep) -> Response:
    """Log out: the session ends on the server, and the browser forgets its cookie."""
    token = token_of(request.scope)
    if token is not None and login.sessions is not None:
        require_console_header(request.scope)
        login.sessions.end(token)
    response = Response(status_code=204)
    delete_cookies(response)
    return response


def _session_body(caller: Caller, expires_at: float | None) -> SessionBody:
    return SessionBody(
        has_keys=expires_at is not None,
        name=caller.key_name,
        key=caller.name,
        tenant=caller.tenant,
        scopes=sorted(caller.scopes),
        expires_at=None if expires_at is None else int(expires_at),
    )


@router.head("/{path:path}", include_in_schema=False)
@router.get("/{path:path}", include_in_schema=False)
@Operation(scopes=None, errors=(404,))
async def show_file(path: str, request: Request) -> Response:
    """Answer a file of the console, or its page."""
    return built_pages().answer(path, request.headers)


@router.head("", include_in_schema=False)
@router.get("", include_in_schema=False)
@Operation(scopes=None, errors=())
async def show_page(request: Request) -> Response:
    """Answer the page of the console."""
    return built_pages().answer(INDEX, request.headers)


API_PAGE = "/console#/api"
"""The console's reference of the API."""


class ConsoleEntryMiddleware(HttpMiddleware):
    """Leads to the console: browsers from ``/``, and everyone from where FastAPI would have its documentation."""

    async def handle(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        answer = _entry(scope) if scope["method"] in {"GET", "HEAD"} else None
        await (self.app if answer is None else answer)(scope, receive, send)


def _entry(scope: AsgiScope) -> Response | None:
    """The redirection for a request's path; None if it has none."""
    if scope["path"] in {"/docs", "/redoc"}:
        return RedirectResponse(API_PAGE)
    if scope["path"] == "/" and "text/html" in Headers(scope=scope).get("accept", "").lower():
        return RedirectResponse("/console", headers={"vary": "Accept"})
    return None
