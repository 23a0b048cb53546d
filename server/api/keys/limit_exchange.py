"""Counts the limits of keys together with the other servers of a shared catalog, beside the requests."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from prompt_store.errors import PromptStoreError
from prompt_store.limits.shared_limits import BucketId, SharedLimits, SharedUse
from server.api.keys.common_bucket import CommonBucket
from server.api.keys.keys import ApiKeys
from server.api.keys.limits import KeyLimiter
from server.metrics.metrics import Metrics

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS = 0.5
"""Pause between two exchanges. A server does not know what the others took within the last two exchanges."""

MAX_EXCHANGE_SECONDS = 3.0
"""A longer exchange has failed: until one succeeds, this server counts alone."""

CLEAN_SECONDS = 60.0
"""Pause between two deletions of rows that are not needed any more."""


CallInThread = Callable[..., Awaitable[Any]]
"""Runs a blocking function in a thread, such as ``asyncio.to_thread``."""


class LimitExchange:
    """Adds this server's use to the catalog and learns that of the others. Used on the event loop only.

    No request waits for it: requests take from buckets in memory, and an exchange brings them up to date. While the
    catalog cannot be reached, the limits hold for this server alone, as without a shared catalog.

    Args:
        shared: The rows in the catalog.
        call: Runs its methods, which block, in a thread.
        keys: The keys whose limits are shared.
        metrics: Counts exchanges.
    """

    def __init__(self, shared: SharedLimits, call: CallInThread, keys: ApiKeys, metrics: Metrics) -> None:
        self._shared = shared
        self._call = call
        self._keys = keys
        self._metrics = metrics
        self._server = uuid.uuid4().hex
        self._noted: dict[str, int] = {}
        """The running requests that the catalog knows of this server, without zeros."""
        self._is_alone = False
        self._cleaned_at = time.monotonic()
        self._late: asyncio.Task[SharedUse] | None = None
        keys.share_limits()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Exchange periodically during a block, once before it and once after it."""
        await self.exchange()
        stopping = asyncio.Event()
        task = asyncio.create_task(self._run(stopping), name="share the limits of keys")
        try:
            yield
        finally:
            stopping.set()
            await task
            if self._noted and not self._is_alone:
                await self._try(self._shared.leave, self._server)

    async def _run(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), EXCHANGE_SECONDS)
            await self.exchange()
            if time.monotonic() - self._cleaned_at > CLEAN_SECONDS and not self._is_alone:
                self._cleaned_at = time.monotonic()
                await self._try(self._shared.clean)

    async def exchange(self) -> None:
        """Exchange once; a failure is logged when it begins and when it ends."""
        limiters = self._keys.limiters()
        if not limiters and not self._noted:
            return
        buckets = {
            BucketId(name, what, common.limit): common
            for name, limiter in limiters.items()
            for what, common in limiter.common.items()
        }
        running = self._running(limiters)
        taken = {bucket: amount for bucket, common in buckets.items() if (amount := common.send())}
        try:
            found = await self._bounded(taken, running)
        except Exception as error:  # whatever it is, requests are served, and the next exchange may succeed
            self._count_alone(buckets, error)
            return
        self._noted = {name: number for name, number in running.items() if number}
        for bucket, common in buckets.items():
            common.learn(found.full_in.get(bucket, 0.0))
        for name, limiter in self._keys.limiters().items():
            limiter.num_elsewhere = found.elsewhere.get(name, 0)
        self._metrics.count_limit_exchange("success")
        if self._is_alone:
            self._is_alone = False
            logger.warning("the limits of keys hold for all servers together again")

    def _running(self, limiters: Mapping[str, KeyLimiter]) -> dict[str, int]:
        """The numbers to note, with those that have become zero."""
        now = {
            name: limiter.num_running
            for name, limiter in limiters.items()
            if limiter.limits.max_concurrency is not None and limiter.num_running
        }
        return {**dict.fromkeys(self._noted, 0), **now}

    async def _bounded(self, taken: Mapping[BucketId, float], running: Mapping[str, int]) -> SharedUse:
        """One exchange in a thread.

        Raises:
            PromptStoreError: If the catalog cannot be reached.
            TimeoutError: If it takes too long; the thread goes on, and no other exchange begins before it ends.
        """
        if self._late is not None and not self._late.done():
            raise TimeoutError("the last exchange has not ended")
        self._late = None

        async def ask() -> SharedUse:
            found: SharedUse = await self._call(self._shared.exchange, self._server, taken, running)
            return found

        asking = asyncio.create_task(ask(), name="exchange the use of keys")
        done, _ = await asyncio.wait({asking}, timeout=MAX_EXCHANGE_SECONDS)
        if not done:
            asking.add_done_callback(_ignore)
            self._late = asking
            raise TimeoutError(f"the catalog took more than {MAX_EXCHANGE_SECONDS:g} s")
        return asking.result()

    def _count_alone(self, buckets: Mapping[BucketId, CommonBucket], error: Exception) -> None:
        for common in buckets.values():
            common.forget()
        for limiter in self._keys.limiters().values():
            limiter.num_elsewhere = 0
        self._metrics.count_limit_exchange("failure")
        if not self._is_alone:
            self._is_alone = True
            is_known = isinstance(error, (PromptStoreError, TimeoutError))
            text = "the limits of keys hold for this server alone for now: %s"
            logger.warning(text, error, exc_info=None if is_known else error)

    async def _try(self, function: Callable[..., None], *args: object) -> None:
        try:
            await self._call(function, *args)
        except Exception as error:  # they are deleted later
            logger.warning("rows of the limits of keys were not deleted: %s", error)


def _ignore(task: asyncio.Task[SharedUse]) -> None:
    """Take the result of an exchange that came too late, so that its error is not logged as unnoticed."""
    if not task.cancelled():
        task.exception()
