"""Open a prompt store from the locations of its parts."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from prompt_store.blobs.blobs import BlobDirectory, BlobStore
from prompt_store.blobs.collector import RETENTION_SECONDS
from prompt_store.blobs.object_store import ObjectBlobs
from prompt_store.blobs.staging import Staging
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database, read_url
from prompt_store.errors import PromptStoreError, StoreUnavailableError
from prompt_store.store import PromptStore

DEFAULT_CACHE_BYTES = 10 * 1024**3

CATALOG_FILE = "catalog.sqlite3"

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """Something to close."""

    def close(self) -> None:
        """Release it."""


def open_store(
    location: str | Path,
    *,
    catalog_url: str | None = None,
    cache_path: Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    max_upload_bytes: int = 1024 * 1024 * 1024,
    collect_grace_seconds: float | None = None,
    retention_seconds: float = RETENTION_SECONDS,
) -> PromptStore:
    """Open a prompt store, and create it if it does not exist.

    Args:
        location: A directory, or the URL of an object store (``s3://BUCKET/PREFIX``, ``gs://``, ``az://``).
        catalog_url: ``postgresql://...``, which replicas may share, or ``sqlite:///PATH``, for one process; None for
            an SQLite file in the directory.
        cache_path: The directory for local copies of blobs of an object store, and for uploads in progress.
        cache_bytes: Maximum size of the local copies.
        max_upload_bytes: Maximum size of a file.
        collect_grace_seconds: How long blobs without a name are kept; None for the default.
        retention_seconds: How long a deleted version can be restored; 0: never.

    Raises:
        PromptStoreError: If another process uses the catalog or the cache, a newer release has written the catalog,
            its directory cannot be written, or the arguments contradict each other.
        StoreUnavailableError: If catalog or object store cannot be reached.
    """
    is_remote = "://" in str(location)
    if is_remote:
        catalog_url_of(location, catalog_url)
    if is_remote and cache_path is None:
        raise PromptStoreError(f"the store {location} needs a directory for local copies")
    folder = Path(cache_path) if is_remote and cache_path is not None else Path(location)
    with _disk_errors(folder), ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PromptStoreError(f"the directory {folder} cannot be created: {error.strerror}") from error
        url = catalog_url_of(folder, catalog_url)
        lock = stack.enter_context(lock_catalog(url))
        catalog = Catalog(Database(url))
        stack.callback(catalog.close)
        staging = Staging(folder)
        stack.callback(staging.close)
        blobs: BlobStore = ObjectBlobs(str(location), folder, cache_bytes) if is_remote else BlobDirectory(folder)
        stack.callback(blobs.close)
        store = PromptStore(
            catalog,
            blobs,
            staging,
            max_upload_bytes=max_upload_bytes,
            collect_grace_seconds=collect_grace_seconds,
            retention_seconds=retention_seconds,
            close=lock.close,
        )
        stack.pop_all()  # from now on the store closes them
        _warn_of_a_lost_catalog(store, blobs, url)
        return store


def catalog_url_of(location: str | Path, catalog_url: str | None) -> str:
    """The URL of the catalog of a store; an SQLite file in the directory if none is given.

    Raises:
        PromptStoreError: If the location is an object store, which needs a URL.
    """
    if catalog_url is not None:
        return catalog_url
    if "://" in str(location):
        raise PromptStoreError(
            f"the store {location} needs --catalog: give postgresql://... (replicas can share it) or sqlite:///PATH"
        )
    return sa.URL.create("sqlite", database=str(Path(location) / CATALOG_FILE)).render_as_string()


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite catalog; None for other databases."""
    parsed = read_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _warn_of_a_lost_catalog(store: PromptStore, blobs: BlobStore, url: str) -> None:
    """Warn if there are blobs beside an empty catalog, which most likely was lost or never copied."""
    with suppress(StoreUnavailableError, OSError):
        if store.totals().num_blobs == 0 and next(blobs.digests(), None) is not None:
            logger.warning(
                "the catalog %s is empty, but files of soft prompts are stored beside it: was it lost, or copied "
                "without its write-ahead log? Restore a backup with `prelude store restore`; `prelude store verify` "
                "lists the files",
                read_url(url).render_as_string(hide_password=True),
            )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Report an unusable directory as an error for the operator."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise PromptStoreError(f"the store in {folder} cannot be used: {where}: {error.strerror or error}") from error


def lock_catalog(url: str) -> closing[Closable]:
    """Lock an SQLite catalog until the result is closed, so that its process need not poll for changes of others.

    Raises:
        PromptStoreError: If another process has locked it.
    """
    path = sqlite_path(url)
    if path is None:
        return closing(ExitStack())  # other databases are shared
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(path.name + ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise PromptStoreError(f"the catalog {path} is in use by another process") from None
    return closing(file)
