"""Leases: versions in use, whose files stay readable even if they are deleted."""

from __future__ import annotations

import itertools
import threading

from prompt_store.blobs.blobs import BlobStore
from prompt_store.blobs.collector import Collector
from prompt_store.blobs.stored_files import disk_errors, files_in_use
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, LeasedPrompt, PromptVersion


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
            CorruptBlobError: If a file is missing or damaged.
            StoreUnavailableError: If one cannot be fetched now.
        """
        used = files_in_use(version)
        digests = tuple(file.sha256 for file in version.files)
        self._collector.hold(digests)
        for file in used:
            self._blobs.pin(file.sha256)
        try:
            with disk_errors():
                paths = {file.filename: self._blobs.fetch(file.sha256, file.size) for file in used}
        except BaseException:
            self._release(version, digests)
            raise
        lease_id = next(self._ids)
        with self._lock:
            self._held[lease_id] = digests
        return LeasedPrompt(version, paths[WEIGHTS_FILE], lease_id, paths.get(CONFIG_FILE))

    def release(self, leased: LeasedPrompt) -> None:
        """End a lease; unreferenced files are removed with the last one. Releasing twice has no effect."""
        with self._lock:
            digests = self._held.pop(leased.lease_id, ())
        if digests:
            self._release(leased.version, digests)

    def _release(self, version: PromptVersion, digests: tuple[str, ...]) -> None:
        for file in files_in_use(version):
            self._blobs.unpin(file.sha256)
        self._collector.release(digests)
