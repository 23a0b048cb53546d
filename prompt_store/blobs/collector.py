"""What is held of blobs, and the removal of those that nothing names or holds."""

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
"""How long a blob without a name is kept where others may be uploading or reading it."""

_BATCH = 100


class Collector:
    """Removes unreferenced blobs after their grace period, unless this process holds them. Thread-safe.

    Where this process alone uses the catalog their time is up at once. Replicas that share a catalog cannot see what
    the others hold, so there a blob stays for a while after it has lost its last name, and a thread looks for garbage
    now and then.

    Args:
        catalog: Knows what is named.
        blobs: Where the bytes are.
        grace_seconds: Another time for which blobs without a name are kept.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, grace_seconds: float | None = None) -> None:
        self._catalog = catalog
        self._blobs = blobs
        shared_grace = COLLECT_GRACE_SECONDS if catalog.is_shared else 0.0
        self.grace_seconds = shared_grace if grace_seconds is None else grace_seconds
        self._lock = threading.Lock()
        """Guards the two below; nothing slow is done under it."""
        self._held: Counter[str] = Counter()
        self._garbage_held: set[str] = set()
        """Blobs that were not collected because they are held."""
        self._collecting = threading.Lock()
        self._is_owed = False
        """Whether the last collection failed, so that something may be left."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if catalog.is_shared:
            self._thread = threading.Thread(target=self._collect_now_and_then, name="collector", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def hold(self, digests: Sequence[str]) -> None:
        """Keep blobs from being collected here until ``let_go`` was called as often."""
        with self._lock:
            self._held.update(digests)

    def let_go(self, digests: Sequence[str]) -> None:
        """End one hold; what has lost its last name meanwhile goes with the last one."""
        with self._lock:
            self._held.subtract(digests)
            ended = {digest for digest in digests if self._held[digest] <= 0}
            for digest in ended:
                del self._held[digest]
            is_garbage = not ended.isdisjoint(self._garbage_held)
            self._garbage_held -= ended
        # Only where a collection has met one of them does it have to be asked for again.
        if is_garbage:
            self.collect_if_alone()

    @contextmanager
    def holding(self, digests: Sequence[str]) -> Iterator[None]:
        """A hold as a context manager."""
        self.hold(digests)
        try:
            yield
        finally:
            self.let_go(digests)

    def collect(self) -> int:
        """Collect now; returns how many blobs went.

        Raises:
            StoreUnavailableError: If catalog or blobs cannot be reached; what is left is collected another time.
        """
        total = 0
        with self._collecting:
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
        """Collect what has just become garbage. A failure is only logged: whatever led here has succeeded."""
        if not self._catalog.is_shared:
            self.try_to_collect()

    def collect_if_owed(self) -> None:
        """Collect what could not be collected when it became garbage, for catalog or blobs were away."""
        if self._is_owed:
            self.collect_if_alone()

    def _is_held(self, digest: str) -> bool:
        with self._lock:
            if digest not in self._held:
                return False
            self._garbage_held.add(digest)
            return True

    def try_to_collect(self) -> None:
        """Collect now; a failure is only logged, and what is left is collected another time."""
        self._is_owed = True
        try:
            self.collect()
            self._is_owed = False
        except (StoreUnavailableError, OSError) as error:
            logger.warning("unreferenced blobs could not be collected: %s", error)
        except Exception:
            logger.exception("unreferenced blobs could not be collected")

    def _collect_now_and_then(self) -> None:
        while not self._stopping.wait(max(self.grace_seconds / 4, 1.0)):
            self.try_to_collect()
