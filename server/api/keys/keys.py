"""API keys: loading from file and settings, comparison in constant time, reloading."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from server.api.keys.callers import Caller
from server.api.keys.key_file import Key, parse_plain, read_keys
from server.api.keys.limits import KeyLimiter, Limits
from server.config import HttpSettings
from server.errors import AuthenticationError, ConfigurationError
from server.metrics.metrics import Metrics

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Interval between checks of the key file, in seconds."""

_INVALID = "the API key is not valid"

_Signature = tuple[int, int, int] | None


@dataclass(slots=True)
class KeyUse:
    """The use of a key since the server started.

    Attributes:
        requests: Number of requests with it, refused ones included.
        last_used_at: Unix time in seconds of the last one; None if there was none.
    """

    requests: int = 0
    last_used_at: float | None = None

    def note(self) -> None:
        """Count a request."""
        self.requests += 1
        self.last_used_at = time.time()


@dataclass(frozen=True, slots=True)
class Reload:
    """A reload of the key file.

    Attributes:
        at: Unix time in seconds.
        error: Why the file could not be used, so that the old keys remain; None if it could.
    """

    at: float
    error: str | None


class ApiKeys:
    """The accepted keys. Only their SHA-256 digests are stored.

    Attributes:
        last_reload: The last reload of the key file; None if there was none.

    Args:
        keys: At least one.
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)
        self._uses: dict[bytes, KeyUse] = {}
        self._are_limits_shared = False
        self.last_reload: Reload | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, authorization: str | None) -> Caller:
        """Check the value of an ``Authorization`` header, decoded as Latin-1.

        Returns:
            The caller that the key identifies.

        Raises:
            AuthenticationError: If it does not contain one of the keys.
        """
        if not authorization:
            raise AuthenticationError("an API key is required: send 'Authorization: Bearer KEY'")
        scheme, _, text = authorization.partition(" ")
        found = self._match(text.strip().encode("latin-1"))
        if scheme.lower() != "bearer" or found is None:
            raise AuthenticationError(_INVALID)
        return found.caller

    def find(self, text: str) -> Key:
        """The key with this text.

        Raises:
            AuthenticationError: If there is none.
        """
        found = self._match(text.strip().encode("utf-8", "surrogatepass"))
        if found is None:
            raise AuthenticationError(_INVALID)
        return found

    def _match(self, text: bytes) -> Key | None:
        digest = hashlib.sha256(text).digest()
        # Every digest is compared, so that the time does not reveal which key was similar.
        matches = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        if not matches:
            return None
        self._uses.setdefault(digest, KeyUse()).note()
        return matches[0]

    def by_digest(self, digest: bytes) -> Caller | None:
        """The caller of the key with this SHA-256 digest; None if there is none."""
        return next((key.caller for key in self._keys if key.digest == digest), None)

    def described(self) -> list[tuple[Key, KeyUse]]:
        """The keys in their order, each with its use since the server started."""
        return [(key, self._uses.get(key.digest, KeyUse())) for key in self._keys]

    def named(self, name: str | None) -> Caller | None:
        """The caller whose key has this name; None if there is none."""
        return next((key.caller for key in self._keys if key.caller.name == name), None)

    def share_limits(self) -> None:
        """Count the limits of all keys, also of later ones, together with other servers."""
        self._are_limits_shared = True
        for limiter in self.limiters().values():
            limiter.share()

    def limiters(self) -> dict[str, KeyLimiter]:
        """The limiters of the keys that have limits, by the names of the keys in records."""
        return {
            key.caller.name: key.caller.limiter
            for key in self._keys
            if key.caller.name is not None and key.caller.limiter.limits != Limits()
        }

    def replace(self, keys: Sequence[Key]) -> None:
        """Accept these keys from the next request on; running requests continue.

        A key with unchanged limits keeps its current use of them.
        """
        limiters = {key.digest: key.caller.limiter for key in self._keys}

        def with_old_limiter(key: Key) -> Key:
            old = limiters.get(key.digest)
            if old is None or old.limits != key.caller.limiter.limits:
                return key
            return replace(key, caller=replace(key.caller, limiter=old))

        self._keys = tuple(map(with_old_limiter, keys))
        if self._are_limits_shared:
            self.share_limits()
        kept = {key.digest for key in self._keys}
        self._uses = {digest: use for digest, use in self._uses.items() if digest in kept}


class KeyReloader:
    """Reloads the key file when it has changed, or on request. If it is invalid, the old keys remain.

    Args:
        http: The settings that name the file.
        keys: Updated with the new keys.
        metrics: Counts reloads.
        on_reloaded: Called after each reload with the keys of a valid file.
    """

    def __init__(
        self,
        http: HttpSettings,
        keys: ApiKeys,
        metrics: Metrics,
        on_reloaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_reloaded = on_reloaded
        self._http = http
        self._keys = keys
        self._metrics = metrics
        self._requested = asyncio.Event()
        self._signature = _signature(http.api_key_file)

    def request(self) -> None:
        """Request a reload, whether the file has changed or not. Call it on the event loop."""
        self._requested.set()

    async def run(self) -> None:
        """Watch the file until cancelled."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._requested.wait(), POLL_SECONDS)
            is_requested = self._requested.is_set()
            self._requested.clear()
            # Taken before the file is read, so that later changes are found by the next check.
            signature = await asyncio.to_thread(_signature, self._http.api_key_file)
            if is_requested or signature != self._signature:
                self._signature = signature
                await self._reload()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Reload the key file during a block, when it changes and on SIGHUP."""
        loop = asyncio.get_running_loop()
        # Only the main thread can handle signals. A server in another thread, as in tests, only polls the file.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main:
            loop.add_signal_handler(signal.SIGHUP, self.request)
        task = asyncio.create_task(self.run(), name="reload API keys")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if is_main:
                loop.remove_signal_handler(signal.SIGHUP)

    async def _reload(self) -> None:
        try:
            keys = await asyncio.to_thread(collect_keys, self._http)
        except ConfigurationError as error:
            self._metrics.count_key_reload("failure")
            logger.error("the API keys were not reloaded: %s", error)
            self._keys.last_reload = Reload(time.time(), str(error))
            return
        self._keys.replace(keys)
        self._on_reloaded()
        self._metrics.count_key_reload("success")
        self._keys.last_reload = Reload(time.time(), None)
        logger.info("%d API keys were reloaded", len(keys))


def collect_keys(http: HttpSettings) -> list[Key]:
    """All keys of the settings: those of the file and those given directly.

    Raises:
        ConfigurationError: If the file or a key is not valid, or a key is in both.
    """
    found = [] if http.api_key_file is None else read_keys(http.api_key_file)
    try:
        given = parse_plain((f"api_keys[{index}]", key) for index, key in enumerate(http.api_keys))
    except ValueError as error:
        raise ConfigurationError(f"the API keys cannot be used: {error}") from error
    digests = {key.digest for key in found}
    for index, key in enumerate(given):
        if key.digest in digests:
            raise ConfigurationError(f"api_keys[{index}] also appears in the API key file {http.api_key_file}")
    return found + given


def load_keys(http: HttpSettings) -> ApiKeys | None:
    """The accepted keys; None to serve every client that can connect.

    Raises:
        ConfigurationError: If the keys are not valid, or there are none, the host is not loopback and ``allow_open``
            is not set.
    """
    keys = collect_keys(http)
    if keys:
        return ApiKeys(keys)
    if not is_loopback(http.host):
        if http.ingress_secret_file is not None:
            return None  # the ingress signs what it lets in
        if not http.allow_open:
            raise ConfigurationError(
                f"host {http.host!r} can be reached from other machines: give --api-key-file or PRELUDE_API_KEYS, "
                "bind 127.0.0.1, or use --allow-open"
            )
        logger.warning("OPEN SERVER: anyone who can reach %s may use, replace and delete everything", http.host)
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``. Of names, only ``localhost`` counts as loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _signature(path: Path | None) -> _Signature:
    """A value that changes with the file; None if the file cannot be read."""
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
