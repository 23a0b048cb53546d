"""The cookie of a console session: when it counts, and how it is set."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import Scope

from server.api.http.origins import is_foreign
from server.api.keys.callers import Caller
from server.api.keys.sessions import Sessions
from server.errors import AuthenticationError

COOKIE = "prelude_session"
"""Name of the cookie over http."""

SECURE_COOKIE = f"__Host-{COOKIE}"
"""Name of the cookie over https: browsers accept it only with ``Secure``, for this host and all paths."""

CONSOLE_HEADER = "x-prelude-console"
"""Header that a request needs besides the cookie, unless it is a GET. Pages of other origins cannot set it."""


def is_https(scope: Scope) -> bool:
    """Whether the browser uses https; a proxy that ends TLS is known by the page's own origin."""
    origin = Headers(scope=scope).get("origin", "")
    return scope.get("scheme") == "https" or origin.lower().startswith("https://")


def token_of(scope: Scope) -> str | None:
    """The token in a request's cookie; None if there is none, or the request is a page's of another origin."""
    headers = Headers(scope=scope)
    if is_foreign(headers):
        return None
    cookies: dict[str, str] = {}
    for header in headers.getlist("cookie"):
        cookies |= cookie_parser(header)
    names = (SECURE_COOKIE,) if is_https(scope) else (SECURE_COOKIE, COOKIE)
    return next((cookies[name] for name in names if name in cookies), None)


def caller_by_cookie(scope: Scope, sessions: Sessions) -> Caller | None:
    """The caller of a request that has a session and no ``Authorization``; None if it has no session's cookie.

    Raises:
        AuthenticationError: If the session has ended, or the request lacks ``CONSOLE_HEADER``.
    """
    token = token_of(scope)
    if token is None:
        return None
    require_console_header(scope)
    session = sessions.find(token)
    if session is None:
        raise AuthenticationError("the session has ended: log in again")
    scope["state"]["is_current"] = lambda: sessions.find(token, is_use=False) is not None
    return session.caller


def require_console_header(scope: Scope) -> None:
    """Check that a request with a session's cookie has ``CONSOLE_HEADER``, or is a GET.

    Raises:
        AuthenticationError: If it is neither.
    """
    if scope["method"] != "GET" and Headers(scope=scope).get(CONSOLE_HEADER) != "1":
        raise AuthenticationError(
            "a session counts only with the header 'X-Prelude-Console: 1', unless the request is a GET"
        )


def set_cookie(response: Response, token: str, *, secure: bool) -> None:
    """Give the browser the token of a session."""
    name = SECURE_COOKIE if secure else COOKIE
    response.set_cookie(name, token, path="/", secure=secure, httponly=True, samesite="strict")


def delete_cookies(response: Response) -> None:
    """Take the tokens of sessions from the browser."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    response.delete_cookie(SECURE_COOKIE, path="/", secure=True, httponly=True, samesite="strict")
