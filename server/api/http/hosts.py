"""The host names that a server without keys accepts, as protection against DNS rebinding."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware
from server.errors import ConfigurationError, MisdirectedRequestError

_ANY = "*"
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)
_IPV4_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
_IPV6_LOOPBACK = ipaddress.ip_address("::1")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
    """The accepted names in the Host header: those of loopback, and the configured ones.

    Args:
        names: Names in lower case, without a final dot; addresses in Python's format.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    @classmethod
    def parse(cls, names: Sequence[str], *, is_guarded: bool) -> Self | None:
        """Read the setting.

        Args:
            names: Names or addresses without a port; ``*`` accepts any.
            is_guarded: Whether names are checked even if none is configured.

        Returns:
            The names, or None if every name is accepted.

        Raises:
            ConfigurationError: If one of them is neither a name nor an address.
        """
        found = frozenset(map(_read, names))
        return None if _ANY in found or not (found or is_guarded) else cls(found)

    def __contains__(self, host: str) -> bool:
        """Whether a Host header's value, with or without a port, is one of them."""
        name = name_of(host)
        if name in self._names or name == "localhost":
            return True
        address = _address(name)
        return address is not None and (str(address) in self._names or _is_loopback(address))


def name_of(host: str) -> str:
    """The value of a Host header in lower case, without port, brackets and final dot."""
    host = host.strip().lower()
    if host.startswith("["):
        address, bracket, _ = host[1:].partition("]")
        return address if bracket else host
    return host.partition(":")[0].removesuffix(".")


class HostMiddleware(HttpMiddleware):
    """Rejects requests for another host with 421.

    A browser sends the host name of the page's URL, whatever address that name has now. So a page that points its
    name at this machine (DNS rebinding) cannot use this server as its own.

    Args:
        app: The rest of the application.
        hosts: The accepted names.
    """

    def __init__(self, app: ASGIApp, *, hosts: Hosts) -> None:
        super().__init__(app)
        self._hosts = hosts

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the Host header of one request. Only HTTP/1.0, which browsers do not use, may lack it."""
        for host in Headers(scope=scope).getlist("host"):
            if host not in self._hosts:
                raise MisdirectedRequestError(_explain(name_of(host)))
        await self.app(scope, receive, send)


def _explain(name: str) -> str:
    if _NAME.fullmatch(name) is None and _address(name) is None:
        return "this server does not answer for the host that the request names"
    return f"this server does not answer for the host {name!r}: start it with --allowed-host {name} if it should"


def _read(name: str) -> str:
    plain = name.strip().lower().removesuffix(".")
    if plain == _ANY:
        return plain
    address = _address(plain.removeprefix("[").removesuffix("]"))
    if address is not None:
        return str(address)
    if _NAME.fullmatch(plain) is None:
        raise ConfigurationError(
            f"--allowed-host {name!r} is not a host name or address: give it without scheme and port"
        )
    return plain


def _address(name: str) -> _Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(address: _Address) -> bool:
    return address == _IPV6_LOOPBACK or (address.version == 4 and address in _IPV4_LOOPBACK)
