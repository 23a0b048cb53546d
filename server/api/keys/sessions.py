"""Sessions of the console: a browser's token in place of an API key, which the page does not keep."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from server.api.keys.callers import Caller
from server.api.keys.keys import ApiKeys
from server.api.keys.secret_file import read_secret

MAX_SESSIONS = 1000
"""Maximum number of sessions in memory; one more ends an unused one of the key that has the most."""

IDLE_SECONDS = 12 * 3600.0
"""Seconds after which an unused session ends."""

MAX_AGE_SECONDS = 7 * 24 * 3600.0
"""Seconds after which a session ends, used or not."""

_TOKEN_BYTES = 32
_DIGEST_BYTES = 32
_MAX_TOKEN_CHARS = 512
_MAX_ENDED = 10_000
_RENEW_SECONDS = 3600.0
_CONTEXT = b"prelude console session 1\0"
"""Prefix of what is signed, so that no other use of the secret gives a valid token."""


@dataclass(frozen=True, slots=True)
class Session:
    """A valid session.

    Attributes:
        caller: The caller that its key identifies now.
        expires_at: Unix time in seconds at which it ends if it is not used.
    """

    caller: Caller
    expires_at: float


class Sessions(ABC):
    """The sessions of one server. Used on the event loop only, so it needs no lock.

    Attributes:
        keys: The accepted keys; a session ends with its key.

    Args:
        keys: The accepted keys.
        clock: Unix time in seconds.
    """

    def __init__(self, keys: ApiKeys, clock: Callable[[], float] = time.time) -> None:
        self.keys = keys
        self._clock = clock

    @abstractmethod
    def begin(self, key: str) -> str:
        """Begin a session and return its token.

        Raises:
            AuthenticationError: If the key is not valid.
        """

    @abstractmethod
    def find(self, token: str, *, is_use: bool = True) -> Session | None:
        """The session of a token; None if it is unknown or has ended.

        Args:
            token: What the client sent.
            is_use: Whether this counts as use of the session.
        """

    @abstractmethod
    def end(self, token: str) -> None:
        """End a session; no effect if it has ended."""

    def renewed(self, token: str) -> str | None:
        """A token that replaces a valid one because it expires later; None if the token stays."""
        return None


@dataclass(slots=True)
class _Entry:
    key: bytes
    began: float
    used: float


class MemorySessions(Sessions):
    """Sessions kept by this server: the SHA-256 digests of random tokens, with those of their keys."""

    def __init__(self, keys: ApiKeys, clock: Callable[[], float] = time.time) -> None:
        super().__init__(keys, clock)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        """By digest of the token, the least recently used first."""

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, key: str) -> str:
        """Begin a session and return its token: 32 random bytes in base64."""
        found = self.keys.find(key)
        now = self._clock()
        if len(self._entries) >= MAX_SESSIONS:
            self._make_room(now)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._entries[_digest(token)] = _Entry(found.digest, now, now)
        return token

    def find(self, token: str, *, is_use: bool = True) -> Session | None:
        """The session of a token."""
        digest = _digest(token)
        entry = self._entries.get(digest)
        if entry is None:
            return None
        now = self._clock()
        caller = self.keys.by_digest(entry.key)
        if caller is None or _expiry(entry.began, entry.used) <= now:
            del self._entries[digest]
            return None
        if is_use:
            entry.used = now
            self._entries.move_to_end(digest)
        return Session(caller, _expiry(entry.began, entry.used))

    def end(self, token: str) -> None:
        """End a session."""
        self._entries.pop(_digest(token), None)

    def _make_room(self, now: float) -> None:
        for digest, entry in list(self._entries.items()):
            if self.keys.by_digest(entry.key) is None or _expiry(entry.began, entry.used) <= now:
                del self._entries[digest]
        if len(self._entries) >= MAX_SESSIONS:
            ((key, _),) = Counter(entry.key for entry in self._entries.values()).most_common(1)
            del self._entries[next(digest for digest, entry in self._entries.items() if entry.key == key)]


class _Claims(msgspec.Struct, frozen=True, array_like=True):
    """The content of a self-contained token: the name of its key, times in Unix seconds, and a nonce."""

    key_name: str
    began: float
    expires: float
    nonce: bytes


class SignedSessions(Sessions):
    """Sessions for several servers: the token says whose session it is, signed with HMAC-SHA256 and one secret.

    ``end`` is known to this server alone; elsewhere the token is valid until it expires.

    Args:
        keys: The accepted keys.
        secret: At least ``MIN_SECRET_BYTES``, the same on all servers. Never derive it from keys or their digests.
        clock: Unix time in seconds.
    """

    def __init__(self, keys: ApiKeys, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        super().__init__(keys, clock)
        self._secret = secret
        self._ended: dict[bytes, float] = {}
        """Nonces of ended sessions, with the times at which they expire."""

    def begin(self, key: str) -> str:
        """Begin a session and return its token."""
        name = self.keys.find(key).caller.name
        if name is None:
            raise TypeError("a key has no name")
        now = self._clock()
        return self._token(_Claims(name, now, _expiry(now, now), secrets.token_bytes(_TOKEN_BYTES)))

    def find(self, token: str, *, is_use: bool = True) -> Session | None:
        """The session of a token."""
        claims = self._read(token)
        caller = None if claims is None else self.keys.named(claims.key_name)
        return None if claims is None or caller is None else Session(caller, claims.expires)

    def end(self, token: str) -> None:
        """End a session on this server."""
        claims = self._read(token)
        if claims is None:
            return
        if len(self._ended) >= _MAX_ENDED:
            now = self._clock()
            self._ended = {nonce: expires for nonce, expires in self._ended.items() if expires > now}
            while len(self._ended) >= _MAX_ENDED:  # the one that would expire first
                del self._ended[min(self._ended, key=self._ended.__getitem__)]
        self._ended[claims.nonce] = claims.expires

    def renewed(self, token: str) -> str | None:
        """A token with a later expiry, once an hour of the old one has passed."""
        claims = self._read(token)
        if claims is None:
            return None
        expires = _expiry(claims.began, self._clock())
        if expires - claims.expires < _RENEW_SECONDS:
            return None
        return self._token(msgspec.structs.replace(claims, expires=expires))

    def _token(self, claims: _Claims) -> str:
        content = msgspec.msgpack.encode(claims)
        return base64.urlsafe_b64encode(self._sign(content) + content).decode().rstrip("=")

    def _sign(self, content: bytes) -> bytes:
        return hmac.digest(self._secret, _CONTEXT + content, "sha256")

    def _read(self, token: str) -> _Claims | None:
        """The content of a token that is signed, has not expired and was not ended here."""
        if len(token) > _MAX_TOKEN_CHARS:
            return None
        try:
            signed = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error):
            return None
        signature, content = signed[:_DIGEST_BYTES], signed[_DIGEST_BYTES:]
        if not hmac.compare_digest(signature, self._sign(content)):
            return None
        claims = msgspec.msgpack.decode(content, type=_Claims)
        return None if claims.expires <= self._clock() or claims.nonce in self._ended else claims


def open_sessions(keys: ApiKeys | None, secret_file: Path | None) -> Sessions | None:
    """The sessions of a server: signed if there is a file with a secret, otherwise in memory; None without keys.

    Raises:
        ConfigurationError: If the file cannot be read, or the secret is too short.
    """
    secret = None if secret_file is None else read_secret(secret_file, "session secret")
    if keys is None:
        return None
    return MemorySessions(keys) if secret is None else SignedSessions(keys, secret)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _expiry(began: float, used: float) -> float:
    return min(used + IDLE_SECONDS, began + MAX_AGE_SECONDS)
