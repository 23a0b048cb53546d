"""Blobs in an object store (S3, Google Cloud Storage, Azure), with a local cache."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prompt_store.blobs.blob_cache import BlobCache
from prompt_store.blobs.blobs import CHUNK_BYTES, BlobStore, TierCounters, TierStats, checked_chunks
from prompt_store.blobs.single_flight import SingleFlight
from prompt_store.errors import BlobNotFoundError, CorruptBlobError, PromptStoreError, StoreUnavailableError

try:
    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import LocalStore, from_url

    has_obstore = True
except ImportError:  # the extra "objects"
    has_obstore = False

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)


class ObjectBlobs(BlobStore):
    """``<prefix>/blobs/ab/abcdef...`` in an object store, and copies of the blobs in use in a ``BlobCache``.

    Cached blobs are served while the object store is unreachable. The sha256 of every download is checked; a damaged
    object is copied to ``<prefix>/quarantine/<digest>-<time>`` and removed, and never served.

    Credentials, region and endpoint come from the environment variables of obstore: ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT``, ``AWS_ALLOW_HTTP``, or the
    instance's own role; ``GOOGLE_APPLICATION_CREDENTIALS`` or ``GOOGLE_SERVICE_ACCOUNT``;
    ``AZURE_STORAGE_ACCOUNT_NAME`` and ``AZURE_STORAGE_ACCOUNT_KEY``; ``<CLOUD>_PROXY_URL`` for any.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``; also ``file:///folder`` and
            ``memory:///``, for tests.
        cache: The directory of the local copies; one process at a time.
        budget_bytes: Maximum size of the local copies.
        connect_timeout: Timeout of a connection in seconds.
        stall_timeout: Maximum seconds without a received byte; one part of an upload, 5 MiB, has to be sent in that
            time.
        request_timeout: Timeout of one request in seconds, including the transfer of its body.
        max_retries: Number of retries after a failure of the network or the server.

    Raises:
        PromptStoreError: If obstore is not installed, the URL is not one of these, the configuration is not complete,
            or another process uses the cache.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        budget_bytes: int,
        *,
        connect_timeout: float = 3.0,
        stall_timeout: float = 30.0,
        request_timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        if not has_obstore:
            raise PromptStoreError(f"{url} needs obstore: pip install 'prelude-server[objects]'")
        client_options = {
            "connect_timeout": timedelta(seconds=connect_timeout),
            "read_timeout": timedelta(seconds=stall_timeout),
            "timeout": timedelta(seconds=request_timeout),
        }
        retry_config = {
            "max_retries": max_retries,
            "retry_timeout": timedelta(seconds=max_retries * stall_timeout),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        }
        self._store = _open(url, client_options, retry_config)
        # A local folder keeps no attributes.
        self._keeps_attributes = not isinstance(self._store, LocalStore)
        self._cache = BlobCache(cache, budget_bytes)
        self._counters = TierCounters("object_store")
        self._downloads: SingleFlight[tuple[str, int], Path] = SingleFlight()
        self._lock = threading.Lock()
        self._damaged: set[str] = set()
        """Found damaged and not put since: their attributes are not trusted."""

    def put(self, staged: Path, digest: str, size: int) -> None:
        """Upload a file, and keep it as the local copy.

        An object of the right size with its digest as the attribute ``sha256`` counts as intact: attribute and bytes
        were written together. Any other object is written again.

        Raises:
            ValueError: If the file does not have the given size.
            StoreUnavailableError: If it could not be uploaded; the staged file is left.
        """
        if staged.stat().st_size != size:
            raise ValueError(f"{staged.name} has {staged.stat().st_size} bytes, not {size}")
        with self._lock:
            is_damaged = digest in self._damaged
        if is_damaged or not self._is_stored(digest, size):
            attributes = {_DIGEST: digest} if self._keeps_attributes else None
            try:
                with self._translated_errors(f"storing blob {digest}"):
                    obstore.put(
                        self._store, _key(digest), staged, attributes=attributes, max_concurrency=_MAX_PARTS_AT_ONCE
                    )
                    stored = obstore.head(self._store, _key(digest))["size"]
            except BlobNotFoundError as error:
                raise StoreUnavailableError(f"the object store does not store data correctly: {error}") from error
            if stored != size:
                raise StoreUnavailableError(f"the object store stored {stored} of the {size} bytes of blob {digest}")
            with self._lock:
                self._damaged.discard(digest)
        try:
            self._cache.admit(staged, digest, size, is_verified=False)
        except OSError as error:  # the cache may be on another file system; the first use downloads it then
            logger.debug("blob %s is not cached at its upload: %s", digest, error)
            staged.unlink()

    def fetch(self, digest: str, size: int) -> Path:
        """The local copy, downloaded if there is none. Raises what ``BlobStore.fetch`` does."""
        path = self._cache.get(digest, size)
        if path is None:
            path = self._downloads.do((digest, size), lambda: self._load(digest, size))
        return path

    def digests(self) -> Iterator[str]:
        """The digests of all objects. Raises StoreUnavailableError."""
        with self._translated_errors("listing blobs"):
            for page in obstore.list(self._store, "blobs"):
                for item in page:
                    yield item["path"].rpartition("/")[2]

    def chunks(self, digest: str, size: int) -> Iterator[bytes]:
        """The bytes of an object, without the cache. Raises what ``BlobStore.chunks`` does."""
        with self._translated_errors(f"reading blob {digest}"):
            result: GetResult = obstore.get(self._store, _key(digest))
            yield from checked_chunks(map(bytes, result.stream(min_chunk_size=CHUNK_BYTES)), digest, size)

    def has_local(self, digest: str) -> bool:
        """Whether the cache has a copy."""
        return self._cache.has(digest)

    def pin(self, digest: str) -> None:
        """Keep the local copy, present or future, until each ``pin`` is matched by an ``unpin``."""
        self._cache.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one ``pin``; ValueError if there is none."""
        self._cache.unpin(digest)

    def delete(self, digest: str) -> None:
        """Remove the object and the local copy; a pinned copy is removed by the last ``unpin``.

        Raises:
            StoreUnavailableError: If the object could not be removed; the local copy is left too.
        """
        with self._translated_errors(f"deleting blob {digest}"):
            self._delete_object(_key(digest))
        self._cache.drop(digest)

    def stats(self) -> list[TierStats]:
        """The statistics of the cache and of the object store."""
        return [self._cache.stats(), self._counters.stats()]

    def close(self) -> None:
        """Release the lock of the cache."""
        self._cache.close()

    # Inside

    def _is_stored(self, digest: str, size: int) -> bool:
        try:
            with self._translated_errors(f"looking for blob {digest}"):
                found = obstore.get(self._store, _key(digest), options={"head": True})
                return found.meta["size"] == size and found.attributes.get(_DIGEST) == digest
        except BlobNotFoundError:
            return False

    def _load(self, digest: str, size: int) -> Path:
        path = self._cache.get(digest, size, again=True)
        if path is not None:  # another thread has just downloaded it
            return path
        file = self._cache.new_file()
        try:
            # Twice: only an object that is damaged in the store is quarantined, not one damaged in transfer.
            for _ in range(2):
                started = time.perf_counter()
                e_tag, is_intact = self._download(file, digest, size)
                if is_intact:
                    self._counters.count_load(time.perf_counter() - started)
                    self._counters.count("hits")
                    return self._cache.admit(file, digest, size, is_verified=True)
        except BlobNotFoundError:
            self._counters.count("misses")
            raise
        finally:
            file.unlink(missing_ok=True)
        self._counters.count("corrupt")
        with self._lock:
            self._damaged.add(digest)
        self._quarantine_blob(digest, e_tag)
        raise CorruptBlobError(f"blob {digest} in the object store does not match its digest")

    def _download(self, file: Path, digest: str, size: int) -> tuple[str | None, bool]:
        """(entity tag of the object, whether the file now holds the blob). Writes at most ``size`` bytes."""
        with self._translated_errors(f"downloading blob {digest}"):
            result: GetResult = obstore.get(self._store, _key(digest))
            e_tag = result.meta["e_tag"]
            if result.meta["size"] != size:
                return e_tag, False
            chunks = iter(result.stream(min_chunk_size=CHUNK_BYTES))
        sha256 = hashlib.sha256()
        received = 0
        with file.open("wb") as output:
            while True:
                # Only errors of the network mean that the store is unavailable; a full disk does not.
                with self._translated_errors(f"downloading blob {digest}"):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                received += len(chunk)
                if received > size:
                    return e_tag, False
                sha256.update(chunk)
                output.write(chunk)
        return e_tag, received == size and sha256.hexdigest() == digest

    def _quarantine_blob(self, digest: str, e_tag: str | None) -> None:
        key, aside = _key(digest), f"quarantine/{digest}-{time.time_ns()}"
        try:
            with self._translated_errors(f"putting blob {digest} aside"):
                obstore.copy(self._store, key, aside)
                # Another replica may have repaired it since. The rest of this race is repaired by one more upload.
                if obstore.head(self._store, key)["e_tag"] == e_tag:
                    self._delete_object(key)
        except PromptStoreError as error:
            logger.error("blob %s is damaged in the object store and could not be moved: %s", digest, error)
        else:
            logger.error("blob %s was damaged in the object store and was moved to %s", digest, aside)

    def _delete_object(self, key: str) -> None:
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError as error:
            if _is_bucket_missing(error):
                raise

    @contextmanager
    def _translated_errors(self, doing: str) -> Iterator[None]:
        """Translate errors of obstore: a missing object, and all others, which mean that the store is unavailable.

        Only the first line of a message is kept; obstore appends a long dump.
        """
        try:
            yield
        except FileNotFoundError as error:
            if not _is_bucket_missing(error):
                raise BlobNotFoundError(f"{doing}: there is no such object") from error
            raise StoreUnavailableError(f"{doing}: there is no such bucket") from error
        except (BaseError, OSError, NotImplementedError) as error:
            raise StoreUnavailableError(f"{doing}: {str(error).partition(chr(10))[0][:500]}") from error


_SCHEMES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE", "file": None, "memory": None}
"""The supported schemes, with the prefix of their environment variables."""

_CLIENT_SETTINGS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", "root_certificate")

_DIGEST = "sha256"
"""The attribute of an object that holds its digest."""

_MAX_PARTS_AT_ONCE = 4


def _open(url: str, client_options: Mapping[str, object], retry_config: Mapping[str, object]) -> ObjectStore:
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        raise PromptStoreError(f"{url} is not an object store: the supported schemes are {', '.join(_SCHEMES)}")
    options: dict[str, Any] = {}
    if scheme == "file":
        options = {"mkdir": True}
    elif prefix := _SCHEMES[scheme]:
        # Obstore reads these from the environment only if it gets no client options at all.
        given = {name: os.environ.get(f"{prefix}_{name.upper()}") for name in _CLIENT_SETTINGS}
        taken = {name: value for name, value in given.items() if value is not None}
        options = {"client_options": {**client_options, **taken}, "retry_config": retry_config}
    try:
        return from_url(url, **options)
    except (BaseError, ValueError, OSError) as error:
        raise PromptStoreError(f"{url} cannot be opened: {str(error).partition(chr(10))[0][:500]}") from error


def _key(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _is_bucket_missing(error: FileNotFoundError) -> bool:
    """Whether a "not found" concerns the bucket, by the codes of S3, Azure and Google in the response body."""
    text = str(error)
    return any(code in text for code in ("NoSuchBucket", "ContainerNotFound", "bucket does not exist"))
