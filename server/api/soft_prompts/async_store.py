"""Asynchronous calls to the prompt store, which blocks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import ParamSpec, TypeVar

from prompt_store.store import PromptStore
from prompt_store.types import Access, LeasedPrompt, PromptRef

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class StoreThreads:
    """A small pool of threads for the store's calls.

    Attributes:
        store: The store itself; its methods are handed to ``call``.
    """

    def __init__(self, store: PromptStore, num_threads: int = 8) -> None:
        self.store = store
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="prompt-store")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` in the pool. A running call is awaited even if the caller is cancelled.

        Raises:
            PromptStoreError: Whatever the function raises.
        """
        future = asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    @asynccontextmanager
    async def lease(self, ref: PromptRef, access: Access | None) -> AsyncIterator[LeasedPrompt]:
        """Resolve ``ref`` to one version that stays readable until the block ends.

        The release is handed to the pool and not awaited, so that no cancellation can come between.

        Args:
            ref: What to lease.
            access: For whom; None is the server itself, which sees everything.

        Raises:
            PromptNotFoundError: If there is no such name, version or alias.
        """
        pending = self._executor.submit(self.store.lease, ref, access)
        try:
            leased = await asyncio.shield(asyncio.wrap_future(pending))
        except asyncio.CancelledError:
            pending.add_done_callback(self._release_unclaimed)
            raise
        try:
            yield leased
        finally:
            self._executor.submit(self._release, leased)

    def _release_unclaimed(self, pending: Future[LeasedPrompt]) -> None:
        if not pending.cancelled() and pending.exception() is None:
            self._release(pending.result())

    def _release(self, leased: LeasedPrompt) -> None:
        try:
            self.store.release(leased)
        except Exception:
            logger.exception("the lease of %s@%d could not be released", leased.version.name, leased.version.version)

    def close(self, *, close_store: bool) -> None:
        """Wait for the calls under way, releases included; then close the store, if it is ours to close."""
        self._executor.shutdown(wait=True)
        if close_store:
            self.store.close()
