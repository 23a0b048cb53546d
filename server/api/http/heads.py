"""Checks of a request's head in addition to those of httptools: RFC 9112, sections 2.3, 3.2 and 6."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus

import httptools

Headers = Sequence[tuple[bytes, bytes]]
"""Header lines; names are lower case."""

_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
"""``uri-host [":" port]`` of RFC 3986; it may be empty."""


class HeadError(ValueError):
    """The head is not acceptable; the connection must be closed.

    Attributes:
        status: How it is answered.
        reason: For people; None where the status says enough.
    """

    def __init__(self, status: HTTPStatus, reason: str | None = None) -> None:
        super().__init__(reason or status.phrase)
        self.status = status
        self.reason = reason


def check_head(method: bytes, version: str, headers: Headers) -> None:
    """Return if a head may begin a request.

    Args:
        method: As it was sent.
        version: HTTP's, such as ``1.1``.
        headers: All header lines.

    Raises:
        HeadError: If it asks for a tunnel, the version is another one, the Host is missing, given twice or malformed,
            or the body has a transfer coding that is not ``chunked`` alone.
    """
    if version not in {"1.0", "1.1"}:
        raise HeadError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    if method == b"CONNECT":  # what follows is no request, whatever its length is said to be
        raise HeadError(HTTPStatus.BAD_REQUEST, "this server is not a proxy")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        raise HeadError(HTTPStatus.BAD_REQUEST, "the request has more than one Host header")
    if not hosts and version == "1.1":
        raise HeadError(HTTPStatus.BAD_REQUEST, "the request has no Host header")
    if hosts and not _HOST.fullmatch(hosts[0].strip(b" \t")):
        raise HeadError(HTTPStatus.BAD_REQUEST, "the Host header is malformed")
    codings = [value.strip(b" \t").lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        raise HeadError(HTTPStatus.BAD_REQUEST, "HTTP/1.0 has no Transfer-Encoding")
    if codings and codings != [b"chunked"]:
        raise HeadError(HTTPStatus.NOT_IMPLEMENTED, "the only Transfer-Encoding that is understood is 'chunked'")


def authority_of(target: bytes) -> bytes | None:
    """The authority of a target in absolute form, which stands for the Host header then; None for other forms.

    Raises:
        HeadError: If it holds a user name.
        httptools.HttpParserInvalidURLError: If the target is no URL.
    """
    if target[:1] in {b"/", b"*"}:
        return None
    url = httptools.parse_url(target)
    if not url.host:
        return None
    if url.userinfo:
        raise HeadError(HTTPStatus.BAD_REQUEST, "the target holds a user name")
    host = b"[" + url.host + b"]" if b":" in url.host else bytes(url.host)
    return b"%s:%d" % (host, url.port) if url.port else host


def framing_of(headers: Headers) -> bytes | None:
    """The header line that says how long a request's body is; None where it has none.

    The headers have passed ``check_head`` and httptools, so there is one such line at most.
    """
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0):
            return name + b": " + value
    return None
