"""Leases: versions in use, whose files stay readable even if they are deleted."""

from __future__ import annotations

import itertools
import threading

from prompt_store.blobs.blobs import BlobStore
from prompt_store.blobs.collector import Collector
from prompt_store.blobs.stored_files import disk_errors, weights_of
from prompt_store.types import LeasedPrompt, PromptVersion


class Leases:
    """The leases of this process. Thread-safe.

    Args:
        blobs: The bytes.
        collector: Collects no blob that is held.
    """

    def __init__(self, blobs: BlobStore, collector: Collector) -> None:
        self._blobs = blobs
        self._collector = collector
        self._lock = threading.Lock()
        self._held: dict[int, tuple[str, ...]] = {}
        self._ids = itertools.count(1)

    def add(self, version: PromptVersion) -> LeasedPrompt:
        """Hold the files of a version until ``release``.

        Raises:
            CorruptBlobError: If its weights are missing or damaged.
            StoreUnavailableError: If they cannot be fetched now.
        """
        weights = weights_of(version)
        digests = tuple(file.sha256 for file in version.files)
        self._collector.hold(digests)
        self._blobs.pin(weights.sha256)
        try:
            with disk_errors():
                path = self._blobs.fetch(weights.sha256, weights.size)
        except BaseException:
            self._blobs.unpin(weights.sha256)
            self._collector.release(digests)
            raise
        lease_id = next(self._ids)
        with self._lock:
            self._held[lease_id] = digests
        return LeasedPrompt(version, path, lease_id)

    def release(self, leased: LeasedPrompt) -> None:
        """End a lease; unreferenced files are removed with the last one. Releasing twice has no effect."""
        with self._lock:
            digests = self._held.pop(leased.lease_id, ())
        if digests:
            self._blobs.unpin(weights_of(leased.version).sha256)
            self._collector.release(digests)
