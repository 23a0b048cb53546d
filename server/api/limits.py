"""What one API key may use: requests and tokens a minute as token buckets, and requests at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.errors import RateLimitError

_MINUTE = 60.0
_BUSY_SECONDS = 1.0
"""When to try again where too many requests run: nobody knows when one of them ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A key's limits; None is without limit.

    Attributes:
        requests_per_minute: Generation requests.
        tokens_per_minute: Prompt tokens and new ones together.
        max_concurrency: Generation requests at the same time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


class TokenBucket:
    """Holds a minute's worth at most, and fills evenly. In any T seconds no more goes than ``limit * (1 + T / 60)``.

    Args:
        limit: What a minute allows; the bucket begins full.
        clock: Seconds, never going back.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        """What it holds now: 0 to ``limit``."""
        now = self._clock()
        self._level = min(float(self.limit), self._level + (now - self._filled_at) * self.limit / _MINUTE)
        self._filled_at = now
        return self._level

    def seconds_until(self, amount: float) -> float:
        """How long until it holds so much, if nothing is taken meanwhile; 0 if it does now."""
        return max(0.0, amount - self.level) * _MINUTE / self.limit

    def take(self, amount: int) -> None:
        """Take what it holds; check first."""
        level = self.level
        if amount > level:
            raise RuntimeError("more was taken than the bucket holds")
        self._level = level - amount

    def give_back(self, amount: int) -> None:
        """Put back what was taken and not used; what would be over the limit is lost."""
        self._level = min(float(self.limit), self.level + amount)


@dataclass(slots=True)
class Reservation:
    """What one request may use.

    Attributes:
        tokens: Tokens that were taken for it.
        used: Those that it has used; the rest is given back.
    """

    tokens: int
    used: int = 0


class KeyLimiter:
    """Holds one key to its limits. Used on the event loop only, so it needs no lock.

    Args:
        limits: The limits.
        clock: Seconds, never going back.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.num_running = 0
        self._requests = limits.requests_per_minute and TokenBucket(limits.requests_per_minute, clock)
        self._tokens = limits.tokens_per_minute and TokenBucket(limits.tokens_per_minute, clock)

    @contextmanager
    def admitted(self, tokens: int, *, counts_request: bool = True) -> Iterator[Reservation]:
        """Admit a request until the block ends; nothing is taken for one that is refused.

        Args:
            tokens: The most that it can use.
            counts_request: Whether it is a request of its own, and not only more tokens of one that was admitted.

        Raises:
            RateLimitError: If it is over a limit; says when it would not be, or that it always is.
        """
        limits = self.limits
        if counts_request and limits.max_concurrency is not None and self.num_running >= limits.max_concurrency:
            raise RateLimitError(
                f"this API key may have {limits.max_concurrency} requests at once, and has", retry_after=_BUSY_SECONDS
            )
        if self._tokens and tokens > self._tokens.limit:
            raise RateLimitError(
                f"the request may take {tokens} tokens, prompt and max_tokens together, and this API key has "
                f"{self._tokens.limit} a minute: ask for fewer",
                retry_after=_MINUTE,
                is_hopeless=True,
            )
        if counts_request and self._requests and (seconds := self._requests.seconds_until(1)):
            raise RateLimitError(
                f"this API key may send {self._requests.limit} requests a minute: try again in {seconds:.2f} s",
                retry_after=seconds,
            )
        if self._tokens and (seconds := self._tokens.seconds_until(tokens)):
            raise RateLimitError(
                f"this API key has {self._tokens.limit} tokens a minute, {int(self._tokens.level)} of them now, "
                f"and the request may take {tokens}: try again in {seconds:.2f} s",
                retry_after=seconds,
            )
        if counts_request and self._requests:
            self._requests.take(1)
        if self._tokens:
            self._tokens.take(tokens)
        self.num_running += counts_request
        reservation = Reservation(tokens)
        try:
            yield reservation
        finally:
            self.num_running -= counts_request
            if self._tokens:
                self._tokens.give_back(max(0, reservation.tokens - reservation.used))

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*``: the limits, what is left, and when all of it is there again."""
        found = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket:
                found[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{what}"] = str(int(bucket.level))
                found[f"x-ratelimit-reset-{what}"] = duration(bucket.seconds_until(bucket.limit))
        return found


def duration(seconds: float) -> str:
    """A time as OpenAI writes it in headers (Go's ``time.Duration``): ``0s``, ``20ms``, ``8.64s``, ``1m3.5s``."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
