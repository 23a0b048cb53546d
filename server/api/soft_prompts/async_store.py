"""Asynchronous access to the prompt store, whose calls block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from prompt_store.blobs.staging import Upload
from prompt_store.catalog.watch import CatalogStatus
from prompt_store.changes import Deletion
from prompt_store.jobs.jobs import Evaluations, TrainingRuns
from prompt_store.limits.shared_limits import SharedLimits
from prompt_store.registry import Registry
from prompt_store.store import PromptStore
from prompt_store.types import Access, LeasedPrompt, PromptRef
from server.api.soft_prompts.recent_versions import RecentVersions

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def _in_thread(
    method: Callable[Concatenate[PromptStore, P], T],
) -> Callable[Concatenate[AsyncPromptStore, P], Coroutine[Any, Any, T]]:
    """A method of the store as a coroutine that runs it in the pool; the types and errors are the method's."""

    @wraps(method)
    async def call(self: AsyncPromptStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        bound: Callable[P, T] = getattr(self._store, method.__name__)
        return await self.call(bound, *args, **kwargs)

    return call


class AsyncPromptStore:
    """The methods of ``PromptStore`` as coroutines, run in a small pool of threads.

    A call that has begun is awaited even if its caller is cancelled, so no call outlives its request.

    Attributes:
        recent: The versions leased last.
    """

    def __init__(self, store: PromptStore, num_threads: int = 8) -> None:
        self._store = store
        self.recent = RecentVersions()
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="prompt-store")

    publish = _in_thread(PromptStore.publish)
    resolve = _in_thread(PromptStore.resolve)
    read_file = _in_thread(PromptStore.read_file)
    get_prompt = _in_thread(PromptStore.get_prompt)
    list_prompts = _in_thread(PromptStore.list_prompts)
    list_versions = _in_thread(PromptStore.list_versions)
    list_history = _in_thread(PromptStore.list_history)
    set_alias = _in_thread(PromptStore.set_alias)
    rollback = _in_thread(PromptStore.rollback)
    delete_alias = _in_thread(PromptStore.delete_alias)
    delete_version = _in_thread(PromptStore.delete_version)
    delete_prompt = _in_thread(PromptStore.delete_prompt)
    are_local = _in_thread(PromptStore.are_local)
    restore = _in_thread(PromptStore.restore)
    prune = _in_thread(PromptStore.prune)

    @property
    def registry(self) -> Registry:
        """Corrections, history and use of all names; its methods block, so run them through ``call``."""
        return self._store.registry

    @property
    def evaluations(self) -> Evaluations:
        """Kept evaluations; run its methods through ``call``."""
        return self._store.jobs.evaluations

    @property
    def runs(self) -> TrainingRuns:
        """Kept training runs; run its methods through ``call``."""
        return self._store.jobs.runs

    @property
    def shared_limits(self) -> SharedLimits | None:
        """What all servers have used of the limits of keys, if they share the catalog; its methods block, too."""
        return self._store.shared_limits

    @property
    def status(self) -> CatalogStatus:
        """Whether the catalog can be reached; does not block."""
        return self._store.status

    def restorable_until(self, deletion: Deletion) -> float | None:
        """Unix time in seconds until which a deletion can be undone, or None; does not block."""
        return self._store.restorable_until(deletion)

    def subscribe(self, callback: Callable[[set[str] | None], None]) -> None:
        """Register a callback for changed names, as ``PromptStore.subscribe`` does."""
        self._store.subscribe(callback)

    def upload(self) -> Upload:
        """A context manager with a temporary directory for an upload; write its files through ``call``."""
        return self._store.upload()

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that reads or writes files in the pool."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def lease(self, ref: PromptRef, access: Access | None) -> AbstractAsyncContextManager[LeasedPrompt]:
        """Resolve ``ref`` to one version whose files remain readable until the block ends.

        Args:
            ref: What to lease.
            access: What the caller may see; None is the server itself, which sees everything.

        Raises:
            PromptNotFoundError: If there is no such name, version or alias.
        """
        return self._leasing(self._store.lease, ref, access)

    def lease_for_request(
        self, ref: PromptRef, access: Access | None, key: str | None
    ) -> AbstractAsyncContextManager[LeasedPrompt]:
        """The same for the version that answers one request, which ``PromptStore.lease_for_request`` draws."""
        return self._leasing(self._store.lease_for_request, ref, access, key)

    @asynccontextmanager
    async def _leasing(
        self, lease: Callable[P, LeasedPrompt], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[LeasedPrompt]:
        """A lease as a block. The release is not awaited, so a cancellation cannot interrupt it."""
        pending = self._executor.submit(lease, *args, **kwargs)
        try:
            leased = await asyncio.shield(asyncio.wrap_future(pending))
        except asyncio.CancelledError:
            pending.add_done_callback(self._release_unclaimed)
            raise
        try:
            self.recent.note(leased.version)
            yield leased
        finally:
            self._executor.submit(self._release, leased)

    def _release_unclaimed(self, pending: Future[LeasedPrompt]) -> None:
        if not pending.cancelled() and pending.exception() is None:
            self._release(pending.result())

    def _release(self, leased: LeasedPrompt) -> None:
        try:
            self._store.release(leased)
        except Exception:
            logger.exception("the lease of %s@%d could not be released", leased.version.name, leased.version.version)

    def close(self, *, close_store: bool) -> None:
        """Wait for running calls, releases included; then close the store if ``close_store``."""
        self._executor.shutdown(wait=True)
        if close_store:
            self._store.close()
