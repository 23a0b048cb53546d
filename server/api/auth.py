"""API keys: read from a file, held as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path

from server.config import HttpSettings
from server.errors import AuthenticationError, ConfigurationError


class ApiKeys:
    """The keys that the server takes. Only their sha256 digests are held.

    Args:
        keys: The keys themselves, as the operator wrote them.
    """

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: str | None) -> str:
        """Check the value of an ``Authorization`` header, its bytes decoded as Latin-1 (which ASGI does).

        Returns:
            What the key is called in records: the beginning of its digest, which does not give it away.

        Raises:
            AuthenticationError: If it holds none of the keys.
        """
        if not authorization:
            raise AuthenticationError("this server needs an API key: send 'Authorization: Bearer KEY'")
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every digest is compared, so that the time does not tell which key came close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise AuthenticationError("the API key is not valid")
        return f"key-{digest.hex()[:12]}"


def read_keys(path: Path) -> list[str]:
    """Read one key a line; empty lines and lines that start with ``#`` are skipped.

    Raises:
        ConfigurationError: If the file cannot be read, or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the API key file {path} cannot be read: {error}") from error
    keys = [line for raw in lines if (line := raw.strip()) and not line.startswith("#")]
    if not keys:
        raise ConfigurationError(f"the API key file {path} holds no key")
    return keys


def load_keys(http: HttpSettings) -> ApiKeys | None:
    """The server's keys, or None where everybody who can connect is served.

    Raises:
        ConfigurationError: If the key file is not usable, or there is none and the host is not loopback.
    """
    if http.api_key_file is not None:
        return ApiKeys(read_keys(http.api_key_file))
    if not is_loopback(http.host):
        raise ConfigurationError(
            f"host {http.host!r} can be reached from other machines: give --api-key-file, or bind 127.0.0.1"
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``. A name other than ``localhost`` is not trusted to be."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
