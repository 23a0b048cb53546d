"""Limits of an API key: requests and tokens per minute as token buckets, and concurrent requests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.api.keys.common_bucket import MINUTE, CommonBucket
from server.errors import RateLimitError

_BUSY_SECONDS = 1.0
"""``Retry-After`` for too many concurrent requests, because their end is unknown."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a key; None is unlimited.

    Attributes:
        requests_per_minute: Accepted requests.
        tokens_per_minute: Prompt tokens and new tokens together.
        max_concurrency: Accepted requests at the same time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """The state of one limit.

    Attributes:
        limit: Amount per minute.
        remaining: Amount that is left now.
        reset_seconds: Seconds until all of it is left again.
    """

    limit: int
    remaining: int
    reset_seconds: float


class TokenBucket:
    """Token bucket of one minute, filled evenly. In any T seconds it allows at most ``limit * (1 + T / 60)``.

    Attributes:
        common: The bucket of all servers that share a catalog, which then has to hold an amount as well as this one.

    Args:
        limit: Amount per minute; the bucket is full at first.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.common: CommonBucket | None = None
        self._clock = clock
        self._level = float(limit)
        self._filled_at = clock()

    @property
    def level(self) -> float:
        """The current amount, at most ``limit``; negative if tokens are owed."""
        own, common = self._refilled(), None if self.common is None else self.common.level
        return own if common is None else min(own, common)

    def share(self) -> None:
        """Count together with other servers from now on."""
        if self.common is None:
            self.common = CommonBucket(self.limit, self._clock)

    def _refilled(self) -> float:
        now = self._clock()
        self._level = min(float(self.limit), self._level + (now - self._filled_at) * self.limit / MINUTE)
        self._filled_at = now
        return self._level

    def _charge(self, amount: float) -> None:
        if self.common is not None:
            self.common.charge(amount)

    def seconds_until(self, amount: float) -> float:
        """Seconds until the bucket contains this amount if nothing is taken; 0 if it does now."""
        return max(0.0, amount - self.level) * MINUTE / self.limit

    def take(self, amount: int) -> None:
        """Take an amount that the bucket contains; check it first."""
        if amount > self.level:
            raise RuntimeError("more was taken than the bucket holds")
        self._level -= amount
        self._charge(amount)

    def give_back(self, amount: int) -> None:
        """Return unused tokens; the level does not exceed the limit."""
        self._level = min(float(self.limit), self._refilled() + amount)
        self._charge(-amount)

    def overdraw(self, amount: int) -> None:
        """Take tokens that were used already, even if the bucket is empty; it owes at most one minute's tokens."""
        owed = max(0.0, min(float(amount), self.level + self.limit))
        self._level = max(-float(self.limit), self._refilled() - amount)
        self._charge(owed)


class Allowance:
    """The part of a key's limits that one request uses.

    Tokens are reserved when their maximum number is known, and settled when their actual number is known.

    Attributes:
        used: Tokens used by the request.

    Args:
        requests: The key's bucket of requests, one of which is taken; None is unlimited.
        tokens: The key's bucket of tokens; None is unlimited.
    """

    def __init__(self, requests: TokenBucket | None, tokens: TokenBucket | None) -> None:
        self.used = 0
        self._requests = requests
        self._tokens = tokens
        self._num_taken = 0

    def require(self, least: int, likely: int) -> None:
        """Check whether the request may be tokenised; takes nothing.

        Args:
            least: Minimum number of tokens.
            likely: Estimated number of tokens; a full bucket is enough for any estimate.

        Raises:
            RateLimitError: If the bucket contains too few tokens now, or can never contain enough.
        """
        bucket = self._tokens
        if bucket is not None:
            self._check(bucket, least)
            self._check(bucket, min(likely, bucket.limit))

    def reserve(self, tokens: int, *, done: int = 0) -> None:
        """Reserve the maximum number of tokens of the request.

        Args:
            tokens: Number of tokens, in addition to those reserved before.
            done: Tokens already processed; they count even if the request is rejected now.

        Raises:
            RateLimitError: If the bucket contains too few tokens now, or can never contain enough.
        """
        bucket = self._tokens
        if bucket is None:
            return
        if bucket.seconds_until(tokens):
            self.settle(done)  # first, because it makes the reported time to wait longer
        self._check(bucket, tokens)
        bucket.take(tokens)
        self._num_taken += tokens

    def settle(self, done: int = 0) -> None:
        """Return unused reserved tokens, or take tokens used without reservation. Idempotent.

        Args:
            done: Tokens already processed, if more than ``used``.
        """
        self.used = max(self.used, done)
        if self._tokens is not None and self.used != self._num_taken:
            if self.used < self._num_taken:
                self._tokens.give_back(self._num_taken - self.used)
            else:
                self._tokens.overdraw(self.used - self._num_taken)
            self._num_taken = self.used

    def forget_request(self) -> None:
        """Do not count the request: the server rejected it for lack of capacity, before any work."""
        if self._requests is not None:
            self._requests.give_back(1)
            self._requests = None

    @staticmethod
    def _check(bucket: TokenBucket, tokens: int) -> None:
        if tokens > bucket.limit:
            raise RateLimitError(
                f"the request may take {tokens} tokens, prompt and max_tokens together, and this API key has "
                f"{bucket.limit} a minute: ask for fewer",
                retry_after=MINUTE,
                is_hopeless=True,
            )
        if seconds := bucket.seconds_until(tokens):
            raise RateLimitError(
                f"this API key has {bucket.limit} tokens a minute, {max(0, int(bucket.level))} of them now, "
                f"and the request may take {tokens}: try again in {seconds:.2f} s",
                retry_after=seconds,
            )


class KeyLimiter:
    """Enforces the limits of one key. Used on the event loop only, so it needs no lock.

    Attributes:
        num_running: Accepted requests that have not ended.
        num_elsewhere: The same on the other servers that share the catalog, as of the last exchange with it.

    Args:
        limits: The limits.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.num_running = 0
        self.num_elsewhere = 0
        self._requests = limits.requests_per_minute and TokenBucket(limits.requests_per_minute, clock)
        self._tokens = limits.tokens_per_minute and TokenBucket(limits.tokens_per_minute, clock)

    def share(self) -> None:
        """Count together with other servers from now on."""
        for bucket in (self._requests, self._tokens):
            if bucket:
                bucket.share()

    @property
    def common(self) -> dict[str, CommonBucket]:
        """The buckets that it shares with other servers, by what they count: ``requests`` and ``tokens``."""
        buckets = {"requests": self._requests, "tokens": self._tokens}
        return {what: bucket.common for what, bucket in buckets.items() if bucket and bucket.common}

    @contextmanager
    def admitted(self, *, takes_tokens: bool = True) -> Iterator[Allowance]:
        """Admit a request until the block ends, before any work; a rejected request takes nothing.

        Args:
            takes_tokens: Whether it will use tokens; then at least one must be left.

        Raises:
            RateLimitError: If a limit is exceeded, or earlier requests owe tokens; has the time until it is not.
        """
        limits = self.limits
        if limits.max_concurrency is not None and self._num_running_in_all >= limits.max_concurrency:
            raise RateLimitError(
                f"this API key may have {limits.max_concurrency} requests at once, and has", retry_after=_BUSY_SECONDS
            )
        if self._requests and (seconds := self._requests.seconds_until(1)):
            raise RateLimitError(
                f"this API key may send {self._requests.limit} requests a minute: try again in {seconds:.2f} s",
                retry_after=seconds,
            )
        if takes_tokens and self._tokens and (seconds := self._tokens.seconds_until(1)):
            raise RateLimitError(
                f"this API key has {self._tokens.limit} tokens a minute, and none now: try again in {seconds:.2f} s",
                retry_after=seconds,
            )
        if self._requests:
            self._requests.take(1)
        self.num_running += 1
        allowance = Allowance(self._requests or None, self._tokens or None)
        try:
            yield allowance
        finally:
            self.num_running -= 1
            allowance.settle()

    @property
    def _num_running_in_all(self) -> int:
        return self.num_running + self.num_elsewhere

    @property
    def places_left(self) -> int | None:
        """Requests that could be accepted beside those that run; None is unlimited."""
        most = self.limits.max_concurrency
        return None if most is None else max(0, most - self._num_running_in_all)

    @property
    def left(self) -> dict[str, Left]:
        """What is left of ``requests`` and ``tokens`` a minute; without those that have no limit."""
        buckets = {"requests": self._requests, "tokens": self._tokens}
        return {
            what: Left(bucket.limit, max(0, int(bucket.level)), bucket.seconds_until(bucket.limit))
            for what, bucket in buckets.items()
            if bucket
        }

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*``: the limits, the remaining amounts, and the time until they are reset."""
        found = {}
        for what, left in self.left.items():
            found[f"x-ratelimit-limit-{what}"] = str(left.limit)
            found[f"x-ratelimit-remaining-{what}"] = str(left.remaining)
            found[f"x-ratelimit-reset-{what}"] = duration(left.reset_seconds)
        return found


def duration(seconds: float) -> str:
    """Format a time as OpenAI does in headers (Go's ``time.Duration``): ``0s``, ``20ms``, ``8.64s``, ``1m3.5s``."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
