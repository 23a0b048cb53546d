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
    """``blobs/<digest>``, and ``incoming/`` for what is still being written. Thread-safe; one process at a time.

    Pinned copies count against the budget but are never dropped, even when they alone are over it. A copy that is
    larger than all of it stays until its last pin is gone or, never pinned, until the next one comes in. Only a
    pinned digest's path is sure to be there later: pin first, then fetch.

    Nothing is synced to the disk, for it can all be had again. What is found at start is therefore in doubt, and its
    digest is computed at its first use. Files' modification times keep the order of use over a restart.

    Args:
        path: Created where it does not exist. What a killed process left half-written is removed.
        budget_bytes: What the copies may take.

    Raises:
        PromptStoreError: If another process has the directory.
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
        self._doomed: set[str] = set()
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
        """The local copy, now the most recently used; None if there is none, or it was found damaged and dropped.

        Args:
            digest: Hex sha256 of the bytes.
            size: How many they are.
            again: The caller was told None before and looks once more: a second miss is not counted.
        """
        path = self._blobs / digest
        if self._is_whole(digest, size):
            self._counters.count("hits")
            return path
        if not again:
            self._counters.count("misses")
        return None

    def new_file(self) -> Path:
        """An empty file to write what comes in to, for ``admit``; the caller removes it if it comes to nothing."""
        descriptor, name = tempfile.mkstemp(dir=self._incoming)
        os.close(descriptor)
        return Path(name)

    def admit(self, file: Path, digest: str, size: int, *, is_verified: bool) -> Path:
        """Take a file, on the same file system, as the copy; the budget is kept by dropping others.

        Args:
            file: It is moved.
            digest: Hex sha256 of its bytes.
            size: How many they are.
            is_verified: Whether they were seen to have that digest; otherwise the first use computes it.

        Raises:
            OSError: If it can not be moved; then nothing has changed.
        """
        path = self._blobs / digest
        with self._lock:
            file.rename(path)
            self._forget(digest)
            self._doomed.discard(digest)
            self._copies[digest] = _Copy(size, is_verified)
            self._resident_bytes += size
            self._keep_budget(but=digest)
        return path

    def pin(self, digest: str) -> None:
        """Keep the copy, once it is there, until ``unpin`` was called as often as this."""
        with self._lock:
            self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Take back one ``pin``; ValueError if there is none."""
        with self._lock:
            if self._pins.remove(digest):
                if digest in self._doomed:
                    self._remove(digest)
                self._keep_budget()

    def drop(self, digest: str) -> None:
        """Remove the copy, at the last ``unpin`` if it is pinned."""
        with self._lock:
            if digest not in self._pins:
                self._remove(digest)
            elif digest in self._copies:
                self._doomed.add(digest)

    def stats(self) -> TierStats:
        """The disk tier's."""
        with self._lock:
            return self._counters.stats(len(self._copies), self._resident_bytes)

    def check_integrity(self) -> None:
        """Hold the books against the directory.

        Raises:
            AssertionError: If they disagree, or the budget is not kept; a fault of this module.
        """
        with self._lock:
            sizes = {digest: copy.size for digest, copy in self._copies.items()}
            if {file.name for file in self._blobs.iterdir()} != set(sizes):
                raise AssertionError("a copy is lost, or there without being known")
            if self._resident_bytes != sum(sizes.values()):
                raise AssertionError(f"{self._resident_bytes} bytes are counted of {sum(sizes.values())}")
            loose = sum(1 for digest in sizes if digest not in self._pins)
            if self._resident_bytes > self._budget_bytes and loose > 1:
                raise AssertionError(f"{loose} copies that nobody pins are kept over the budget")
            if not self._doomed <= {digest for digest in sizes if digest in self._pins}:
                raise AssertionError("a copy is to go with its last pin, but has none, or is gone")

    def close(self) -> None:
        """Let other processes have the directory."""
        self._lock_file.close()

    # Inside

    def _find_copies(self) -> None:
        for file in sorted(self._blobs.iterdir(), key=lambda file: file.stat().st_mtime_ns):
            size = file.stat().st_size
            self._copies[file.name] = _Copy(size, is_verified=False)
            self._resident_bytes += size
        self._keep_budget()

    def _is_whole(self, digest: str, size: int) -> bool:
        """Look up and mark as used; what turns out to be damaged or gone is dropped."""
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
        # Even where it is pinned: nobody is helped by wrong bytes. Those who have the file open keep it.
        with self._lock:
            if self._copies.get(digest) is copy:
                self._remove(digest)
                self._counters.count("corrupt")

    def _keep_budget(self, but: str | None = None) -> None:
        """Drop the least recently used that are not pinned, except ``but``, until the rest fits."""
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
        self._doomed.discard(digest)
        copy = self._copies.pop(digest, None)
        if copy is not None:
            self._resident_bytes -= copy.size


@dataclass(slots=True, eq=False)
class _Copy:
    size: int
    is_verified: bool
