"""Local copies of remote blobs: a directory with a byte budget and LRU eviction."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from prompt_store.blobs.blobs import Pins, TierCounters, TierStats, sha256_of
from prompt_store.blobs.single_flight import SingleFlight
from prompt_store.errors import PromptStoreError


class BlobCache:
    """``blobs/<digest>``, and ``incoming/`` for files being written. Thread-safe; one process at a time.

    Pinned copies count against the budget but are never dropped, even if they alone exceed it. A copy larger than the
    budget stays until its last pin is removed or, if it was never pinned, until the next copy arrives. Only the path
    of a pinned digest is guaranteed to exist: pin first, then fetch.

    Nothing is synced to the disk, because every copy can be downloaded again. Copies found at the start are therefore
    not trusted: the digest of each is computed at its first use. The modification times of the files keep the order
    of use over a restart.

    Args:
        path: Created if it does not exist. Partial files of a killed process are removed.
        budget_bytes: Maximum size of all copies.

    Raises:
        PromptStoreError: If another process uses the directory.
    """

    def __init__(self, path: Path, budget_bytes: int) -> None:
        self._blobs = path / "blobs"
        self._incoming = path / "incoming"
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        """Least recently used first."""
        self._resident_bytes = 0
        self._pins = Pins()
        self._removed_at_unpin: set[str] = set()
        """Dropped while pinned."""
        self._verifying: SingleFlight[_Copy, bool] = SingleFlight()
        self._counters = TierCounters("disk", budget_bytes)
        path.mkdir(parents=True, exist_ok=True)
        self._lock_file = (path / "lock").open("wb")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise PromptStoreError(
                f"the cache {path} is in use by another process; use a separate cache per server"
            ) from None
        try:
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(exist_ok=True)
            self._blobs.mkdir(exist_ok=True)
            self._find_copies()
        except BaseException:
            self._lock_file.close()
            raise

    def get(self, digest: str, size: int, *, again: bool = False) -> Path | None:
        """The local copy, marked as most recently used; None if there is none, or if it was damaged and dropped.

        Args:
            digest: Hex sha256 of the bytes.
            size: Their number.
            again: The caller got None before and tries again: a second miss is not counted.
        """
        path = self._blobs / digest
        if self._is_intact(digest, size):
            self._counters.count("hits")
            return path
        if not again:
            self._counters.count("misses")
        return None

    def has(self, digest: str) -> bool:
        """Whether there is a copy; this is no use of it, and the copy may be damaged."""
        with self._lock:
            return digest in self._copies

    def new_file(self) -> Path:
        """An empty file for ``admit``; the caller writes it, and removes it if the transfer fails."""
        descriptor, name = tempfile.mkstemp(dir=self._incoming)
        os.close(descriptor)
        return Path(name)

    def admit(self, file: Path, digest: str, size: int, *, is_verified: bool) -> Path:
        """Move a file on the same file system into the cache; other copies are dropped to stay within the budget.

        Args:
            file: It is moved.
            digest: Hex sha256 of its bytes.
            size: Their number.
            is_verified: Whether the digest was computed; otherwise the first use computes it.

        Raises:
            OSError: If it cannot be moved; then nothing has changed.
        """
        path = self._blobs / digest
        with self._lock:
            file.rename(path)
            self._forget(digest)
            self._removed_at_unpin.discard(digest)
            self._copies[digest] = _Copy(size, is_verified)
            self._resident_bytes += size
            self._keep_budget(but=digest)
        return path

    def pin(self, digest: str) -> None:
        """Keep the copy, present or future, until each ``pin`` is matched by an ``unpin``."""
        with self._lock:
            self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Undo one ``pin``; ValueError if there is none."""
        with self._lock:
            if self._pins.remove(digest):
                if digest in self._removed_at_unpin:
                    self._remove(digest)
                self._keep_budget()

    def drop(self, digest: str) -> None:
        """Remove the copy, by the last ``unpin`` if it is pinned."""
        with self._lock:
            if digest not in self._pins:
                self._remove(digest)
            elif digest in self._copies:
                self._removed_at_unpin.add(digest)

    def stats(self) -> TierStats:
        """The statistics of the disk tier."""
        with self._lock:
            return self._counters.stats(len(self._copies), self._resident_bytes)

    def check_integrity(self) -> None:
        """Compare the records with the directory.

        Raises:
            AssertionError: If they disagree, or the budget is exceeded: a bug of this module.
        """
        with self._lock:
            sizes = {digest: copy.size for digest, copy in self._copies.items()}
            if {file.name for file in self._blobs.iterdir()} != set(sizes):
                raise AssertionError("a copy is missing or unknown")
            if self._resident_bytes != sum(sizes.values()):
                raise AssertionError(f"{self._resident_bytes} bytes are counted, not {sum(sizes.values())}")
            loose = sum(1 for digest in sizes if digest not in self._pins)
            if self._resident_bytes > self._budget_bytes and loose > 1:
                raise AssertionError(f"{loose} copies without a pin are kept over the budget")
            if not self._removed_at_unpin <= {digest for digest in sizes if digest in self._pins}:
                raise AssertionError("a copy waits for its last unpin, but is missing or not pinned")

    def close(self) -> None:
        """Release the lock of the directory."""
        self._lock_file.close()

    # Inside

    def _find_copies(self) -> None:
        for file in sorted(self._blobs.iterdir(), key=lambda file: file.stat().st_mtime_ns):
            size = file.stat().st_size
            self._copies[file.name] = _Copy(size, is_verified=False)
            self._resident_bytes += size
        self._keep_budget()

    def _is_intact(self, digest: str, size: int) -> bool:
        """Look a copy up and mark it as used; a damaged or missing one is dropped."""
        path = self._blobs / digest
        with self._lock:
            copy = self._copies.get(digest)
            if copy is None:
                return False
            self._copies.move_to_end(digest)
        try:
            is_right = copy.size == path.stat().st_size == size
            os.utime(path)
        except FileNotFoundError:
            is_right = False
        if is_right and not copy.is_verified:
            is_right = self._verifying.do(copy, lambda: self._verify(path, digest, copy))
        if not is_right:
            self._drop_damaged(digest, copy)
        return is_right

    def _verify(self, path: Path, digest: str, copy: _Copy) -> bool:
        started = time.perf_counter()
        try:
            copy.is_verified = sha256_of(path) == digest
        except FileNotFoundError:  # dropped meanwhile
            return False
        self._counters.count_load(time.perf_counter() - started)
        return copy.is_verified

    def _drop_damaged(self, digest: str, copy: _Copy) -> None:
        # Even if it is pinned: wrong bytes are of no use. Readers with the file open keep it.
        with self._lock:
            if self._copies.get(digest) is copy:
                self._remove(digest)
                self._counters.count("corrupt")

    def _keep_budget(self, but: str | None = None) -> None:
        """Drop the least recently used copies without a pin, except ``but``, until the rest fits."""
        for digest in list(self._copies) if self._resident_bytes > self._budget_bytes else ():
            if self._resident_bytes <= self._budget_bytes:
                return
            if digest not in self._pins and digest != but:
                self._remove(digest)
                self._counters.count("evictions")

    def _remove(self, digest: str) -> None:
        (self._blobs / digest).unlink(missing_ok=True)
        self._forget(digest)

    def _forget(self, digest: str) -> None:
        self._removed_at_unpin.discard(digest)
        copy = self._copies.pop(digest, None)
        if copy is not None:
            self._resident_bytes -= copy.size


@dataclass(slots=True, eq=False)
class _Copy:
    size: int
    is_verified: bool
