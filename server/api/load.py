"""The load of the last hour, in memory: one point every ten seconds."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from server.engine.stats import EngineStats

POINT_SECONDS = 10
"""Seconds of one point."""

MAX_POINTS = 360
"""Number of points that are kept: one hour."""

MAX_MARKS = 256

_MAX_TIMES = 256
"""Times kept for the percentiles of a point: a uniform sample of all."""

_MAX_CODES = 64


class FinishedRequest(Protocol):
    """What the record of a request says about the load."""

    @property
    def is_polled(self) -> bool:
        """Whether it is for a probe or metrics."""
        ...

    @property
    def outcome(self) -> str | None:
        """The outcome of an admitted request."""
        ...

    @property
    def first_token_seconds(self) -> float | None:
        """From its arrival to its first token."""
        ...

    @property
    def error(self) -> str | None:
        """The code of the error."""
        ...

    @property
    def change(self) -> str | None:
        """What it has changed."""
        ...

    @property
    def status(self) -> int | None:
        """HTTP status."""
        ...

    @property
    def prompt(self) -> str | None:
        """The name that it is about."""
        ...

    @property
    def version(self) -> int | None:
        """The version that it is about."""
        ...

    @property
    def tenant(self) -> str | None:
        """Tenant of its key."""
        ...


class Times:
    """A uniform sample of durations, of bounded size."""

    def __init__(self) -> None:
        self.count = 0
        self.sample = array("f")

    def add(self, seconds: float) -> None:
        """Add one duration."""
        self.count += 1
        if len(self.sample) < _MAX_TIMES:
            self.sample.append(seconds)
        elif (place := random.randrange(self.count)) < _MAX_TIMES:  # noqa: S311 - a sample, no secret
            self.sample[place] = seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """The load of ten seconds; amounts are of these seconds, counts of their end.

    Attributes:
        at: Unix time in seconds of its end.
        seconds: Its length.
    """

    at: float
    seconds: float
    generation_tokens: int
    prompt_tokens: int
    cache_queries: int
    cache_hits: int
    num_running: int
    num_waiting: int
    num_batch_waiting: int
    num_used_blocks: int
    num_idle_blocks: int
    num_blocks: int
    first_token: Times
    between_tokens: Times
    outcomes: Counter[str]
    errors: Counter[str]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened.

    Attributes:
        at: Unix time in seconds.
        kind: ``restart``, ``keys_reloaded``, or an action of the history, such as ``publish``.
        text: What it is about, such as ``NAME@VERSION``.
        tenant: Who may see it; None is everyone.
    """

    at: float
    kind: str
    text: str
    tenant: str | None = None


@dataclass(slots=True)
class Load:
    """Collects the load. Used on the event loop only.

    Attributes:
        points: The oldest first.
        marks: The oldest first.
        began: Unix time in seconds since which it counts.
    """

    points: deque[LoadPoint] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    marks: deque[Mark] = field(default_factory=lambda: deque(maxlen=MAX_MARKS))
    began: float = field(default_factory=time.time)
    _first_token: Times = field(default_factory=Times)
    _between_tokens: Times = field(default_factory=Times)
    _outcomes: Counter[str] = field(default_factory=Counter)
    _errors: Counter[str] = field(default_factory=Counter)
    _before: EngineStats = field(default_factory=EngineStats)
    _sampled_at: float = field(default_factory=time.time)

    def between_tokens(self, seconds: float) -> None:
        """Two consecutive tokens of a sequence arrived with this time between them."""
        self._between_tokens.add(seconds)

    def observe(self, record: FinishedRequest) -> None:
        """A request has ended."""
        if record.is_polled:
            return
        if record.outcome is not None:
            self._outcomes[record.outcome] += 1
        if record.first_token_seconds is not None:
            self._first_token.add(record.first_token_seconds)
        if record.error is not None and (record.error in self._errors or len(self._errors) < _MAX_CODES):
            self._errors[record.error] += 1
        if record.change is not None and record.status is not None and record.status < 400:
            version = "" if record.version is None else f"@{record.version}"
            self.mark(record.change, f"{record.prompt}{version}", tenant=record.tenant)

    def mark(self, kind: str, text: str = "", *, tenant: str | None = None) -> None:
        """Note something that happened now."""
        self.marks.append(Mark(time.time(), kind, text, tenant))

    def sample(self, stats: EngineStats, now: float) -> LoadPoint:
        """End a point.

        Args:
            stats: The engine's present state.
            now: Unix time in seconds.
        """
        before, self._before = (
            self._before,
            EngineStats(
                generation_tokens=stats.generation_tokens,
                prompt_tokens=stats.prompt_tokens,
                prefix_cache_queries=stats.prefix_cache_queries,
                prefix_cache_hits=stats.prefix_cache_hits,
            ),
        )
        point = LoadPoint(
            at=now,
            seconds=max(now - self._sampled_at, 1e-3),
            generation_tokens=max(0, stats.generation_tokens - before.generation_tokens),
            prompt_tokens=max(0, stats.prompt_tokens - before.prompt_tokens),
            cache_queries=max(0, stats.prefix_cache_queries - before.prefix_cache_queries),
            cache_hits=max(0, stats.prefix_cache_hits - before.prefix_cache_hits),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_batch_waiting=stats.num_batch_waiting,
            num_used_blocks=stats.num_used_blocks,
            num_idle_blocks=stats.num_cached_blocks,
            num_blocks=stats.num_blocks,
            first_token=self._first_token,
            between_tokens=self._between_tokens,
            outcomes=self._outcomes,
            errors=self._errors,
        )
        self._first_token, self._between_tokens = Times(), Times()
        self._outcomes, self._errors = Counter(), Counter()
        self._sampled_at = now
        self.points.append(point)
        return point

    @asynccontextmanager
    async def running(self, read_stats: Callable[[], EngineStats]) -> AsyncIterator[None]:
        """Sample every ``POINT_SECONDS`` during a block."""

        async def run() -> None:
            while True:
                await asyncio.sleep(POINT_SECONDS)
                self.sample(read_stats(), time.time())

        task = asyncio.create_task(run(), name="sample the load")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def percentiles(times: Sequence[Times]) -> tuple[float, float] | None:
    """The median and the 95th percentile of durations; None if there are none. Each sample counts by its number."""
    weighted = sorted((seconds, one.count / len(one.sample)) for one in times for seconds in one.sample)
    total = sum(weight for _, weight in weighted)
    if not weighted:
        return None
    found, passed = [], 0.0
    wanted = [0.5 * total, 0.95 * total]
    for seconds, weight in weighted:
        passed += weight
        while wanted and passed >= wanted[0] * (1 - 1e-9):
            found.append(seconds)
            wanted.pop(0)
    return found[0], found[1]
