"""Files by the sha256 of their content: what every place for them offers, and the local directory."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prompt_store.blobs.single_flight import SingleFlight
from prompt_store.errors import BlobNotFoundError, CorruptBlobError, StoreUnavailableError
from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1024 * 1024
"""How much of a file is read at once."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters and size of one tier.

    Attributes:
        tier: Where the bytes are.
        hits: Fetches that this tier answered.
        misses: Fetches of blobs that it did not have.
        evictions: Blobs dropped to keep the budget.
        corrupt: Copies found that were not what their digest says.
        resident: Number of stored blobs; None if only the object store knows it.
        resident_bytes: Their size in bytes; None in the same case.
        budget_bytes: What they may take; None if that is not bounded.
        load_seconds: Durations of loads, over ``LOAD_SECONDS_BOUNDS``.
    """

    tier: Literal["disk", "object_store"]
    hits: int
    misses: int
    evictions: int
    corrupt: int
    resident: int | None
    resident_bytes: int | None
    budget_bytes: int | None
    load_seconds: Histogram

    @property
    def loads(self) -> int:
        """Times that the bytes of a blob were read from this tier and their digest computed."""
        return self.load_seconds.count


class TierCounters:
    """Counts for one tier's ``TierStats``. Thread-safe.

    Args:
        tier: Where the bytes are.
        budget_bytes: What they may take; None if that is not bounded.
    """

    def __init__(self, tier: Literal["disk", "object_store"], budget_bytes: int | None = None) -> None:
        self._tier = tier
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._load_seconds = Histogram.empty(LOAD_SECONDS_BOUNDS)

    def count(self, what: Literal["hits", "misses", "evictions", "corrupt"]) -> None:
        """Count one more."""
        with self._lock:
            self._counts[what] += 1

    def count_load(self, seconds: float) -> None:
        """Count a load and its duration."""
        with self._lock:
            self._load_seconds.observe(LOAD_SECONDS_BOUNDS, seconds)

    def stats(self, resident: int | None = None, resident_bytes: int | None = None) -> TierStats:
        """The counts so far, with what is held now."""
        with self._lock:
            return TierStats(
                tier=self._tier,
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                evictions=self._counts["evictions"],
                corrupt=self._counts["corrupt"],
                resident=resident,
                resident_bytes=resident_bytes,
                budget_bytes=self._budget_bytes,
                load_seconds=copy.deepcopy(self._load_seconds),
            )


class BlobStore(ABC):
    """Immutable files by the sha256 of their content. Thread-safe, and no call waits for another blob's transfer."""

    @abstractmethod
    def put(self, staged: Path, digest: str, size: int) -> None:
        """Store a file; it is durable when this returns.

        If the blob is there already and whole, nothing is written. A copy that is damaged is replaced, so uploading
        again heals.

        Args:
            staged: The file, complete and on the disk. It is gone afterwards: moved, or uploaded and removed.
            digest: Hex sha256 of its bytes.
            size: Its bytes.

        Raises:
            StoreUnavailableError: If it could not be kept; the staged file is still there.
        """

    @abstractmethod
    def fetch(self, digest: str, size: int) -> Path:
        """A local file with exactly these bytes, there for as long as the blob is pinned.

        Args:
            digest: Hex sha256 of the bytes.
            size: How many they are.

        Raises:
            BlobNotFoundError: If there is no such blob.
            CorruptBlobError: If there is, but not with these bytes. It has been put aside.
            StoreUnavailableError: If this cannot be determined now.
        """

    @abstractmethod
    def pin(self, digest: str) -> None:
        """Keep the local copy, once it is there, until ``unpin`` was called as often as this."""

    @abstractmethod
    def unpin(self, digest: str) -> None:
        """Take back one ``pin``; ValueError if there is none."""

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Remove a blob; nothing happens if it is gone. A pinned local copy goes with the last ``unpin``.

        Raises:
            StoreUnavailableError: If it could not be removed.
        """

    @abstractmethod
    def stats(self) -> list[TierStats]:
        """Statistics of each tier, nearest first."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources; no method may be called afterwards."""


class Pins:
    """How often each digest is pinned. Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __contains__(self, digest: str) -> bool:
        return digest in self._counts

    def add(self, digest: str) -> None:
        """Pin once more."""
        self._counts[digest] += 1

    def remove(self, digest: str) -> bool:
        """Take one pin back; returns whether it was the last. ValueError if there is none."""
        if digest not in self._counts:
            raise ValueError(f"blob {digest} is not pinned")
        self._counts[digest] -= 1
        if self._counts[digest]:
            return False
        del self._counts[digest]
        return True


class BlobDirectory(BlobStore):
    """``blobs/ab/abcdef...``, each file named by its digest; ``quarantine/`` holds the damaged ones.

    A blob appears by a rename after its bytes are on the disk, so a reader sees all of it or nothing. Its digest is
    computed at the first use, and again only when the file is another or has changed. A blob is only held to be lost
    where the directory itself is there: a volume that is not mounted has lost nothing. Replicas may share the
    directory; a pin keeps a blob from this process's deletion only, so what replicas share they must agree to delete.

    Args:
        path: Created where it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._blobs = path / "blobs"
        self._quarantine = path / "quarantine"
        for folder in (self._blobs, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        self._inode = self._blobs.stat().st_ino
        self._lock = threading.Lock()
        self._pins = Pins()
        self._doomed: set[str] = set()
        """Deleted while pinned."""
        self._verified: OrderedDict[str, FileIdentity] = OrderedDict()
        """The file that each digest was last computed of, the most recently used last."""
        self._verifying: SingleFlight[str, None] = SingleFlight()
        self._counters = TierCounters("disk")

    def path(self, digest: str) -> Path:
        """Where the blob of this digest is, if it is."""
        return self._blobs / digest[:2] / digest

    def digests(self) -> Iterator[str]:
        """The digests of all blobs."""
        for folder in self._blobs.iterdir():
            for file in folder.iterdir():
                yield file.name

    def put(self, staged: Path, digest: str, size: int) -> None:
        """Move a file on the same file system to its place; OSError if the disk does not take it."""
        target = self.path(digest)
        with self._lock:
            self._doomed.discard(digest)
        if self._is_whole_and_synced(digest, size):
            staged.unlink()
        else:
            _sync(staged)
            target.parent.mkdir(exist_ok=True)
            staged.rename(target)
        # Also for a blob that was there: whoever renamed it may have been killed before these.
        _sync(target.parent)
        _sync(self._blobs)

    def fetch(self, digest: str, size: int) -> Path:
        """The blob's own file. Raises BlobNotFoundError, CorruptBlobError or StoreUnavailableError."""
        if not self._is_whole(digest, size):
            self._require_directory()
            self._counters.count("misses")
            raise BlobNotFoundError(f"blob {digest} is missing from {self._blobs}")
        self._counters.count("hits")
        return self.path(digest)

    def pin(self, digest: str) -> None:
        """Keep the file from ``delete``."""
        with self._lock:
            self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Take back one ``pin``; ValueError if there is none."""
        with self._lock:
            if self._pins.remove(digest) and digest in self._doomed:
                self._remove(digest)

    def delete(self, digest: str) -> None:
        """Remove the file, at the last ``unpin`` if it is pinned. Raises StoreUnavailableError."""
        self._require_directory()
        with self._lock:
            if digest in self._pins:
                self._doomed.add(digest)
            else:
                self._remove(digest)

    def stats(self) -> list[TierStats]:
        """One tier, without the number of files, which the catalog knows without listing them."""
        return [self._counters.stats()]

    def close(self) -> None:
        """Nothing is held open."""

    def _remove(self, digest: str) -> None:
        self._doomed.discard(digest)
        self._verified.pop(digest, None)
        self.path(digest).unlink(missing_ok=True)

    def _require_directory(self) -> None:
        """Raise StoreUnavailableError unless the directory is there, and the same as at the start."""
        try:
            is_there = self._blobs.stat().st_ino == self._inode
        except OSError as error:
            raise StoreUnavailableError(f"the directory {self._blobs} is not available: {error}") from error
        if not is_there:
            raise StoreUnavailableError(
                f"the directory {self._blobs} is not the same directory as before: is it mounted?"
            )

    def _is_whole_and_synced(self, digest: str, size: int) -> bool:
        try:
            if self._is_whole(digest, size):
                _sync(self.path(digest))
                return True
        except (CorruptBlobError, FileNotFoundError):  # put aside, or deleted meanwhile
            pass
        return False

    def _is_whole(self, digest: str, size: int) -> bool:
        """Whether the blob is there; CorruptBlobError, after putting it aside, if it is not what it should be."""
        path = self.path(digest)
        try:
            identity = FileIdentity.of(path)
            if self._seen(digest) != identity or identity.size != size:
                self._verifying.do(digest, lambda: self._verify(digest, size))
        except FileNotFoundError:
            return False
        return True

    def _seen(self, digest: str) -> FileIdentity | None:
        with self._lock:
            if digest in self._verified:
                self._verified.move_to_end(digest)
            return self._verified.get(digest)

    def _verify(self, digest: str, size: int) -> None:
        path = self.path(digest)
        identity = FileIdentity.of(path)
        if identity.size == size:
            if self._seen(digest) == identity:
                return
            started = time.perf_counter()
            is_right = sha256_of(path) == digest
            self._counters.count_load(time.perf_counter() - started)
            if is_right:
                with self._lock:
                    self._verified[digest] = identity
                    if len(self._verified) > _MAX_VERIFIED:
                        self._verified.popitem(last=False)
                return
        self._put_aside(path, identity)
        self._counters.count("corrupt")
        message = f"blob {digest} was not what was stored, with {identity.size} bytes for {size}; it was put aside"
        logger.error("%s in %s", message, self._quarantine)
        raise CorruptBlobError(message)

    def _put_aside(self, path: Path, identity: FileIdentity) -> None:
        aside = self._quarantine / f"{path.name}-{time.time_ns()}"
        path.rename(aside)
        # A whole copy may have been put in its place since the bytes were read.
        if FileIdentity.of(aside) != identity:
            aside.rename(path)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What changes when a file is replaced or written to.

    Attributes:
        inode: Its number on the file system.
        mtime_ns: When it was last written to, in nanoseconds since 1970.
        size: Bytes.
    """

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Of the file that is at ``path`` now; FileNotFoundError if there is none."""
        status = path.stat()
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MAX_VERIFIED = 65_536


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
