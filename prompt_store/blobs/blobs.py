"""The interface of blob stores, which keep files under the sha256 of their content, and the local directory."""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prompt_store import durable
from prompt_store.blobs.single_flight import SingleFlight
from prompt_store.errors import BlobNotFoundError, CorruptBlobError, StoreUnavailableError
from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1024 * 1024
"""Size of one read of a file."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters and size of one tier.

    Attributes:
        tier: Where the bytes are.
        hits: Fetches that this tier served.
        misses: Fetches of blobs that it did not have.
        evictions: Blobs dropped to stay within the budget.
        corrupt: Copies found that do not match their digest.
        resident: Number of stored blobs; None if only the object store knows it.
        resident_bytes: Their size in bytes; None in the same case.
        budget_bytes: Their maximum size; None if it is not bounded.
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
    """Counters for the ``TierStats`` of one tier. Thread-safe.

    Args:
        tier: Where the bytes are.
        budget_bytes: Their maximum size; None if it is not bounded.
    """

    def __init__(self, tier: Literal["disk", "object_store"], budget_bytes: int | None = None) -> None:
        self._tier = tier
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._load_seconds = Histogram.empty(LOAD_SECONDS_BOUNDS)

    def count(self, what: Literal["hits", "misses", "evictions", "corrupt"]) -> None:
        """Increment a counter."""
        with self._lock:
            self._counts[what] += 1

    def count_load(self, seconds: float) -> None:
        """Count a load and its duration."""
        with self._lock:
            self._load_seconds.observe(LOAD_SECONDS_BOUNDS, seconds)

    def stats(self, resident: int | None = None, resident_bytes: int | None = None) -> TierStats:
        """The counters, with the number and size of the stored blobs."""
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
    """Immutable files under the sha256 of their content. Thread-safe; no call waits for the transfer of another."""

    @abstractmethod
    def put(self, staged: Path, digest: str, size: int) -> None:
        """Store a file; it is durable when this returns.

        An intact blob is not written again. A damaged one is replaced, so uploading again repairs it.

        Args:
            staged: The complete file. It is moved, or uploaded and removed.
            digest: Hex sha256 of its bytes.
            size: Its size in bytes.

        Raises:
            StoreUnavailableError: If it could not be stored; the staged file is left.
        """

    @abstractmethod
    def fetch(self, digest: str, size: int) -> Path:
        """A local file with exactly these bytes; it exists as long as the blob is pinned.

        Args:
            digest: Hex sha256 of the bytes.
            size: Their number.

        Raises:
            BlobNotFoundError: If there is no such blob.
            CorruptBlobError: If the stored bytes do not match. They have been quarantined.
            StoreUnavailableError: If this cannot be determined now.
        """

    @abstractmethod
    def has_local(self, digest: str) -> bool:
        """Whether its bytes are on the local disk; they are not read, so they may be damaged."""

    @abstractmethod
    def pin(self, digest: str) -> None:
        """Keep the local copy, present or future, until each ``pin`` is matched by an ``unpin``."""

    @abstractmethod
    def unpin(self, digest: str) -> None:
        """Undo one ``pin``; ValueError if there is none."""

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Remove a blob, if it exists. A pinned local copy is removed by the last ``unpin``.

        Raises:
            StoreUnavailableError: If it could not be removed.
        """

    @abstractmethod
    def digests(self) -> Iterator[str]:
        """The digests of all stored blobs; StoreUnavailableError if they cannot be listed."""

    @abstractmethod
    def chunks(self, digest: str, size: int) -> Iterator[bytes]:
        """The bytes of a blob as they are stored. Unlike ``fetch``, this changes, caches and counts nothing.

        Raises:
            BlobNotFoundError: If there is no such blob.
            CorruptBlobError: After the last chunk, if they do not match.
            StoreUnavailableError: If this cannot be determined now.
        """

    @abstractmethod
    def stats(self) -> list[TierStats]:
        """Statistics of each tier, the nearest one first."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources; no method may be called afterwards."""


class Pins:
    """Pin counts by digest. Not thread-safe: the owner locks."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __contains__(self, digest: str) -> bool:
        return digest in self._counts

    def add(self, digest: str) -> None:
        """Add one pin."""
        self._counts[digest] += 1

    def remove(self, digest: str) -> bool:
        """Remove one pin; returns whether it was the last. ValueError if there is none."""
        if digest not in self._counts:
            raise ValueError(f"blob {digest} is not pinned")
        self._counts[digest] -= 1
        if self._counts[digest]:
            return False
        del self._counts[digest]
        return True


class BlobDirectory(BlobStore):
    """``blobs/ab/abcdef...``, each file named by its digest; damaged files are moved to ``quarantine/``.

    A blob appears by a rename after its bytes are on the disk, so a reader sees all of it or nothing. Its digest is
    computed at the first use, and again only if the file was replaced or changed. A missing blob counts as lost only
    if the directory itself exists: a volume that is not mounted has lost nothing. Replicas may share the directory; a
    pin prevents deletion by this process only, so replicas have to agree on deletions.

    Args:
        path: Created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._blobs = path / "blobs"
        self._quarantine = path / "quarantine"
        for folder in (self._blobs, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        self._inode = self._blobs.stat().st_ino
        self._lock = threading.Lock()
        self._pins = Pins()
        self._removed_at_unpin: set[str] = set()
        """Deleted while pinned."""
        self._verified: OrderedDict[str, FileIdentity] = OrderedDict()
        """The identity of the file when its digest was last computed, by digest; the most recently used last."""
        self._verifying: SingleFlight[str, None] = SingleFlight()
        self._counters = TierCounters("disk")

    def path(self, digest: str) -> Path:
        """The path of a blob, whether it exists or not."""
        return self._blobs / digest[:2] / digest

    def digests(self) -> Iterator[str]:
        """The digests of all blobs."""
        for folder in self._blobs.iterdir():
            for file in folder.iterdir():
                yield file.name

    def chunks(self, digest: str, size: int) -> Iterator[bytes]:
        """The bytes of a blob's file. Raises what ``BlobStore.chunks`` does."""
        try:
            file = self.path(digest).open("rb")
        except FileNotFoundError as error:
            self._require_directory()
            raise BlobNotFoundError(f"blob {digest} is missing from {self._blobs}") from error
        except OSError as error:
            raise StoreUnavailableError(f"blob {digest} cannot be read: {error}") from error
        with file:
            yield from checked_chunks(iter(lambda: file.read(CHUNK_BYTES), b""), digest, size)

    def put(self, staged: Path, digest: str, size: int) -> None:
        """Move a file on the same file system to its place; OSError if the disk is full or fails."""
        target = self.path(digest)
        with self._lock:
            self._removed_at_unpin.discard(digest)
        if self._is_intact_and_synced(digest, size):
            staged.unlink()
        else:
            target.parent.mkdir(exist_ok=True)
            durable.move_file(staged, target)
        # Also for a blob that was there: the process that moved it may have been killed before it synced the folder.
        durable.sync(self._blobs)

    def fetch(self, digest: str, size: int) -> Path:
        """The blob's own file. Raises BlobNotFoundError, CorruptBlobError or StoreUnavailableError."""
        if not self._is_intact(digest, size):
            self._require_directory()
            self._counters.count("misses")
            raise BlobNotFoundError(f"blob {digest} is missing from {self._blobs}")
        self._counters.count("hits")
        return self.path(digest)

    def has_local(self, digest: str) -> bool:
        """Whether there is such a file."""
        return self.path(digest).exists()

    def pin(self, digest: str) -> None:
        """Protect the file from ``delete``."""
        with self._lock:
            self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Undo one ``pin``; ValueError if there is none."""
        with self._lock:
            if self._pins.remove(digest) and digest in self._removed_at_unpin:
                self._remove(digest)

    def delete(self, digest: str) -> None:
        """Remove the file, by the last ``unpin`` if it is pinned. Raises StoreUnavailableError."""
        self._require_directory()
        with self._lock:
            if digest in self._pins:
                self._removed_at_unpin.add(digest)
            else:
                self._remove(digest)

    def stats(self) -> list[TierStats]:
        """One tier. The number of files is left to the catalog, which knows it without listing them."""
        return [self._counters.stats()]

    def close(self) -> None:
        """Do nothing: no resource is held."""

    def _remove(self, digest: str) -> None:
        self._removed_at_unpin.discard(digest)
        self._verified.pop(digest, None)
        self.path(digest).unlink(missing_ok=True)

    def _require_directory(self) -> None:
        """Raise StoreUnavailableError unless the directory exists and is the same as at the start."""
        try:
            is_there = self._blobs.stat().st_ino == self._inode
        except OSError as error:
            raise StoreUnavailableError(f"the directory {self._blobs} is not available: {error}") from error
        if not is_there:
            raise StoreUnavailableError(
                f"the directory {self._blobs} is not the same directory as before: is it mounted?"
            )

    def _is_intact_and_synced(self, digest: str, size: int) -> bool:
        try:
            if self._is_intact(digest, size):
                durable.sync(self.path(digest))
                durable.sync(self.path(digest).parent)
                return True
        except (CorruptBlobError, FileNotFoundError):  # quarantined, or deleted meanwhile
            pass
        return False

    def _is_intact(self, digest: str, size: int) -> bool:
        """Whether the blob exists; CorruptBlobError, after quarantining it, if it does not match its digest."""
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
        self._quarantine_blob(path, identity)
        self._counters.count("corrupt")
        message = f"blob {digest} was not what was stored, with {identity.size} bytes for {size}; it was put aside"
        logger.error("%s in %s", message, self._quarantine)
        raise CorruptBlobError(message)

    def _quarantine_blob(self, path: Path, identity: FileIdentity) -> None:
        aside = self._quarantine / f"{path.name}-{time.time_ns()}"
        path.rename(aside)
        # An intact copy may have replaced it since the bytes were read.
        if FileIdentity.of(aside) != identity:
            aside.rename(path)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The properties of a file that change if it is replaced or written.

    Attributes:
        inode: Its number on the file system.
        mtime_ns: Time of the last write, in nanoseconds since 1970.
        size: Size in bytes.
    """

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Of the file at a path; FileNotFoundError if there is none."""
        status = path.stat()
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


def checked_chunks(chunks: Iterable[bytes], digest: str, size: int) -> Iterator[bytes]:
    """Pass chunks on; CorruptBlobError at the end if they are not a blob's bytes. At most ``size`` bytes pass."""
    sha256 = hashlib.sha256()
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if received > size:
            break
        sha256.update(chunk)
        yield chunk
    if received != size or sha256.hexdigest() != digest:
        raise CorruptBlobError(f"blob {digest} does not match its digest")


def sha256_of(path: Path) -> str:
    """Hex digest of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MAX_VERIFIED = 65_536
