"""Callers that the ingress of a cluster has authenticated, in a signed header.

The ingress checks an API key once. The replica gets the name of the key, signed with a secret that ingress and
replicas share, and looks the caller up in its own key file. So the secret gives no scope that no key has.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Callable
from enum import StrEnum

import msgspec

from server.errors import NotFromIngressError

INGRESS_HEADER = "x-prelude-ingress"
"""Request header that only the ingress can make."""

LOAD_HEADER = "x-prelude-load"
"""Response header for the ingress: sequences that the replica has, running and waiting."""

LIFETIME_SECONDS = 30.0
"""Seconds for which a signature is valid; the clocks of ingress and replicas may differ by less."""

_CONTEXT = b"prelude ingress 1\0"
"""Prefix of what is signed, so that no other use of the secret gives a valid header."""

_SIGNATURE_BYTES = 32
_MAX_CHARS = 512


class CallerKind(StrEnum):
    """Who sends a request."""

    KEY = "key"
    """The owner of an API key, which the ingress has checked."""
    UNKNOWN = "unknown"
    """A client without an API key: the replica decides by the cookie of a session, or the path needs no key."""
    CLUSTER = "cluster"
    """The cluster itself, which asks for load and metrics."""


class SignedCaller(msgspec.Struct, frozen=True, array_like=True):
    """What the ingress says of a request's sender.

    Attributes:
        kind: Who it is.
        key: Name of the API key, if it is the owner of one; it does not reveal the key.
        expires: Unix time in seconds.
    """

    kind: CallerKind
    key: str = ""
    expires: float = 0.0


class CallerSigner:
    """Makes and checks the header, which is bound to one request's method, target and id.

    Args:
        secret: Shared by the ingress and its replicas, at least 32 random bytes.
        clock: Unix time in seconds.
    """

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._clock = clock

    def sign(self, kind: CallerKind, key: str, *, method: str, target: bytes, request_id: str) -> str:
        """The value of the header.

        Args:
            kind: Who sends the request.
            key: Name of the API key; empty for other kinds.
            method: HTTP method.
            target: Path and query as they are sent.
            request_id: Value of X-Request-ID.
        """
        claims = msgspec.msgpack.encode(SignedCaller(kind, key, self._clock() + LIFETIME_SECONDS))
        signature = self._signature(claims, method, target, request_id)
        return base64.urlsafe_b64encode(signature + claims).decode().rstrip("=")

    def check(self, value: str | None, *, method: str, target: bytes, request_id: str) -> SignedCaller:
        """Read the header.

        Args:
            value: Its value; None if the request has none.
            method: As in ``sign``.
            target: As in ``sign``.
            request_id: As in ``sign``.

        Raises:
            NotFromIngressError: If it is missing, was signed with another secret or for another request, or has
                expired.
        """
        claims = None if value is None else self._read(value, method, target, request_id)
        if claims is None:
            raise NotFromIngressError("this server answers the ingress of its cluster only")
        if claims.expires <= self._clock():
            raise NotFromIngressError("the signature of the ingress has expired: compare the clocks of the machines")
        return claims

    def _read(self, value: str, method: str, target: bytes, request_id: str) -> SignedCaller | None:
        if len(value) > _MAX_CHARS:
            return None
        try:
            signed = base64.b64decode(value.encode("ascii") + b"=" * (-len(value) % 4), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error):
            return None
        signature, claims = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(claims, method, target, request_id)):
            return None
        return msgspec.msgpack.decode(claims, type=SignedCaller)

    def _signature(self, claims: bytes, method: str, target: bytes, request_id: str) -> bytes:
        # Every part but the last is given with its length, so that no two requests have the same text.
        parts = (claims, method.encode(), request_id.encode("latin-1", "replace"))
        head = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._secret, _CONTEXT + head + target, "sha256")


def target_of(raw_path: bytes, query: bytes) -> bytes:
    """Path and query of a request, as they are sent."""
    return raw_path + b"?" + query if query else raw_path
