"""Counts the use of versions in memory, and adds it to the catalog at most once a minute."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prompt_store.errors import PromptStoreError
from prompt_store.types import PromptVersion
from prompt_store.use import Use
from server.api.soft_prompts.async_store import AsyncPromptStore

logger = logging.getLogger(__name__)

_MINUTES = 60
_MAX_RECENT = 10_000
_HOUR_SECONDS = 3600.0
_MAX_TIMED = 1000
_MAX_TIMES = 128

FLUSH_SECONDS = 60.0
"""Interval of the flushes; a server that is killed loses the use since the last one."""


class UsageCounter:
    """The use of versions that is not in the catalog yet. Used on the event loop only.

    Args:
        store: The store whose catalog gets the counts.
    """

    def __init__(self, store: AsyncPromptStore) -> None:
        self._store = store
        self._pending: dict[tuple[str, int], Use] = {}
        self._running: Counter[tuple[str, int]] = Counter()
        self._recent: OrderedDict[tuple[str, int], deque[list[int]]] = OrderedDict()
        """By version, the requests of each of the last minutes: minute and number."""
        self._times: OrderedDict[str, deque[tuple[float, float]]] = OrderedDict()
        """By name, the newest requests: end by the monotonic clock, and seconds."""

    def count(
        self,
        version: PromptVersion,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        is_error: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Count one request that a version has served, or failed to serve.

        Args:
            version: The version.
            prompt_tokens: Text tokens.
            completion_tokens: New tokens.
            is_error: Whether it failed.
            seconds: From its arrival to the end of its answer; None if it was not answered, or not at once.
        """
        key = version.name, version.version
        use = Use(1, prompt_tokens, completion_tokens, time.time_ns() // 1000, int(is_error))
        self._pending[key] = self._pending.get(key, Use()) + use
        self._note_recent(key, int(time.monotonic() // 60))
        if seconds is not None:
            self._note_time(version.name, time.monotonic(), seconds)

    def _note_time(self, name: str, now: float, seconds: float) -> None:
        times = self._times.setdefault(name, deque(maxlen=_MAX_TIMES))
        times.append((now, seconds))
        self._times.move_to_end(name)
        if len(self._times) > _MAX_TIMED:
            self._times.popitem(last=False)

    def _note_recent(self, key: tuple[str, int], minute: int) -> None:
        minutes = self._recent.pop(key, None) or deque(maxlen=_MINUTES)
        self._recent[key] = minutes
        if minutes and minutes[-1][0] == minute:
            minutes[-1][1] += 1
        else:
            minutes.append([minute, 1])
        if len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)

    def began(self, version: PromptVersion) -> None:
        """A request with a version was admitted."""
        self._running[version.name, version.version] += 1

    def ended(self, version: PromptVersion) -> None:
        """It has ended."""
        key = version.name, version.version
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]

    def running_now(self, name: str, version: int) -> int:
        """Admitted requests with a version that have not ended."""
        return self._running[name, version]

    def last_hour(self, name: str, version: int) -> int:
        """Requests that a version has served in the last hour, of the most recently used versions."""
        oldest = int(time.monotonic() // 60) - _MINUTES
        return sum(count for minute, count in self._recent.get((name, version), ()) if minute > oldest)

    def p95_seconds(self, name: str) -> float | None:
        """The 95th percentile of the time of a name's requests, of the newest 128 of the last hour; None without any.

        It is known for the 1,000 names that were used last.
        """
        since = time.monotonic() - _HOUR_SECONDS
        times = sorted(seconds for at, seconds in self._times.get(name, ()) if at > since)
        return times[math.ceil(0.95 * len(times)) - 1] if times else None

    def pending(self, name: str, version: int) -> Use:
        """The use of a version that is not in the catalog yet."""
        return self._pending.get((name, version), Use())

    def pending_of(self, name: str) -> Use:
        """The use of all versions of a name that is not in the catalog yet."""
        return sum((use for (known, _), use in self._pending.items() if known == name), Use())

    def pending_versions(self, name: str) -> list[int]:
        """The versions of a name with use that is not in the catalog yet."""
        return [version for known, version in self._pending if known == name]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Flush periodically during a block."""
        task = asyncio.create_task(self._run(), name="store the use of versions")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Add the counts to the catalog; while it cannot be reached, they stay in memory."""
        taken, self._pending = self._pending, {}
        if not taken:
            return
        try:
            await self._store.call(self._store.registry.add_use, taken)
        except PromptStoreError as error:
            for key, use in taken.items():
                self._pending[key] = use + self._pending.get(key, Use())
            logger.warning("the use of %d versions was not stored yet: %s", len(taken), error)
