"""Garbage collection of blobs: which ones are held, and the removal of those without a name or a hold."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prompt_store.blobs.blobs import BlobStore
from prompt_store.catalog.catalog import Catalog
from prompt_store.errors import StoreUnavailableError

logger = logging.getLogger(__name__)

COLLECT_GRACE_SECONDS = 3600.0
"""How long a blob without a name is kept if other replicas may be uploading or reading it."""

RETENTION_SECONDS = 7 * 86400.0
"""How long a deleted version can be restored."""

_MAX_INTERVAL_SECONDS = 3600.0

_BATCH = 100


class Collector:
    """Removes unreferenced blobs after their grace period, unless this process holds them. Thread-safe.

    A deleted version keeps its blobs until it can no longer be restored. If this process alone uses the catalog, the
    grace period is zero. Replicas that share a catalog cannot see the holds of the others, so a blob stays for some
    time after it has lost its last name. A thread collects periodically.

    Args:
        catalog: Knows which blobs have names.
        blobs: The bytes.
        grace_seconds: How long blobs without a name are kept; None for the default.
        retention_seconds: How long a deleted version can be restored.
    """

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        grace_seconds: float | None = None,
        retention_seconds: float = RETENTION_SECONDS,
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        shared_grace = COLLECT_GRACE_SECONDS if catalog.is_shared else 0.0
        self.grace_seconds = shared_grace if grace_seconds is None else grace_seconds
        self.retention_seconds = retention_seconds
        self._lock = threading.Lock()
        """Guards the two below; held for a short time only."""
        self._held: Counter[str] = Counter()
        self._garbage_held: set[str] = set()
        """Blobs that were not collected because they are held."""
        self._collecting = threading.Lock()
        self._has_failed = False
        """Whether the last collection failed, so that garbage may be left."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if self.interval_seconds is not None:
            self._thread = threading.Thread(target=self._collect_periodically, name="collector", daemon=True)
            self._thread.start()

    @property
    def interval_seconds(self) -> float | None:
        """Time between two collections by the thread; None if there is none, because nothing has to wait."""
        waits = [self.retention_seconds] if self.retention_seconds > 0 else []
        if self._catalog.is_shared:
            waits.append(self.grace_seconds)
        return min(_MAX_INTERVAL_SECONDS, max(1.0, min(waits) / 4)) if waits else None

    @property
    def restorable_since(self) -> int:
        """The time before which deletions are final, in microseconds since 1970."""
        return int((time.time() - self.retention_seconds) * 1e6)

    def restorable_until(self, deleted_at: int) -> float | None:
        """Unix time in seconds until which a deletion (microseconds) can be undone; None if it is final."""
        return deleted_at / 1e6 + self.retention_seconds if self.retention_seconds > 0 else None

    def close(self) -> None:
        """Stop the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def hold(self, digests: Sequence[str]) -> None:
        """Protect blobs from collection by this process until each ``hold`` is matched by a ``release``."""
        with self._lock:
            self._held.update(digests)

    def release(self, digests: Sequence[str]) -> None:
        """End one hold. The last one also collects blobs that have lost their last name meanwhile."""
        with self._lock:
            self._held.subtract(digests)
            ended = {digest for digest in digests if self._held[digest] <= 0}
            for digest in ended:
                del self._held[digest]
            is_garbage = not ended.isdisjoint(self._garbage_held)
            self._garbage_held -= ended
        # A new collection is needed only if one has skipped these blobs.
        if is_garbage:
            self.collect_if_alone()

    @contextmanager
    def holding(self, digests: Sequence[str]) -> Iterator[None]:
        """A hold as a context manager."""
        self.hold(digests)
        try:
            yield
        finally:
            self.release(digests)

    def collect(self) -> int:
        """Give up versions that can no longer be restored, and collect; returns the number of removed blobs.

        Raises:
            StoreUnavailableError: If catalog or blobs cannot be reached; the rest is collected later.
        """
        total = 0
        with self._collecting:
            self._catalog.forget_deleted(self.restorable_since)
            while True:
                with self._lock:
                    limit = _BATCH + len(self._held)
                before = int((time.time() - self.grace_seconds) * 1e6)
                with self._catalog.garbage(before, limit, self._is_held) as digests:
                    for digest in digests:
                        self._blobs.delete(digest)
                total += len(digests)
                if len(digests) < _BATCH or self._stopping.is_set():
                    return total

    def collect_if_alone(self) -> None:
        """Collect new garbage unless replicas share the catalog. A failure is only logged."""
        if not self._catalog.is_shared:
            self.try_to_collect()

    def retry_if_failed(self) -> None:
        """Collect again if the last collection failed because catalog or blobs were unavailable."""
        if self._has_failed:
            self.collect_if_alone()

    def _is_held(self, digest: str) -> bool:
        with self._lock:
            if digest not in self._held:
                return False
            self._garbage_held.add(digest)
            return True

    def try_to_collect(self) -> None:
        """Collect now; a failure is only logged, and the rest is collected later."""
        self._has_failed = True
        try:
            self.collect()
            self._has_failed = False
        except (StoreUnavailableError, OSError) as error:
            logger.warning("unreferenced blobs could not be collected: %s", error)
        except Exception:
            logger.exception("unreferenced blobs could not be collected")

    def _collect_periodically(self) -> None:
        while not self._stopping.wait(self.interval_seconds):
            self.try_to_collect()
