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
        status: Status of the response.
        reason: Message; None if the status says enough.
    """

    def __init__(self, status: HTTPStatus, reason: str | None = None) -> None:
        super().__init__(reason or status.phrase)
        self.status = status
        self.reason = reason


def check_head(method: bytes, version: str, headers: Headers) -> None:
    """Check the head of a request.

    Args:
        method: Method of the request.
        version: HTTP version, such as ``1.1``.
        headers: All header lines.

    Raises:
        HeadError: If the method is CONNECT, the version is not supported, the Host is missing, repeated or malformed,
            or the body has a transfer coding other than ``chunked`` alone.
    """
    if version not in {"1.0", "1.1"}:
        raise HeadError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    if method == b"CONNECT":  # the following bytes are not a request, whatever the headers say
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
    """The authority of a target in absolute form, which replaces the Host header; None for other forms.

    Raises:
        HeadError: If it contains a user name.
        httptools.HttpParserInvalidURLError: If the target is not a URL.
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
    """The header line with the length of a request's body; None if there is no body.

    The headers have passed ``check_head`` and httptools, so there is at most one such line.
    """
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0):
            return name + b": " + value
    return None
