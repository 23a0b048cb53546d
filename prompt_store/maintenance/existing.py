"""Open a store for reading, also while a server runs on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from prompt_store.blobs.blobs import BlobDirectory, BlobStore
from prompt_store.blobs.object_store import ObjectBlobs
from prompt_store.catalog.database import Database
from prompt_store.catalog.schema import blobs, prompts, version_files, versions
from prompt_store.errors import PromptStoreError
from prompt_store.open_store import catalog_url_of, sqlite_path

_CACHE_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class NamedBlob:
    """A blob that a version names.

    Attributes:
        digest: Hex sha256 of its bytes.
        size: Size in bytes.
        name: A version that names it, ``NAME@VERSION``.
    """

    digest: str
    size: int
    name: str


@contextmanager
def existing_store(location: str, catalog_url: str | None) -> Iterator[tuple[Database, BlobStore]]:
    """The catalog and the blobs of a store. Nothing is locked, migrated, collected or created.

    Args:
        location: A directory, or the URL of an object store.
        catalog_url: See ``open_store``.

    Raises:
        PromptStoreError: If there is no catalog, or another release has written it.
        StoreUnavailableError: If catalog or object store cannot be reached.
    """
    url = catalog_url_of(location, catalog_url)
    path = sqlite_path(url)
    if path is not None and not path.is_file():
        raise PromptStoreError(f"there is no catalog at {path}")
    if "://" not in location and not Path(location).is_dir():
        raise PromptStoreError(f"there is no directory {location}")
    with ExitStack() as stack:
        database = Database(url, is_migrated=False)
        stack.callback(database.close)
        opened: BlobStore
        if "://" in location:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prelude-")))
            opened = ObjectBlobs(location, cache, _CACHE_BYTES)
        else:
            opened = BlobDirectory(Path(location))
        stack.callback(opened.close)
        yield database, opened


def named_blobs(connection: sa.Connection) -> list[NamedBlob]:
    """Every blob that a version names, also a deleted one that can be restored, by digest."""
    query = (
        sa.select(blobs.c.sha256, blobs.c.size, prompts.c.name, versions.c.version)
        .select_from(version_files)
        .join(blobs, blobs.c.sha256 == version_files.c.sha256)
        .join(versions, versions.c.id == version_files.c.version_id)
        .join(prompts, prompts.c.id == versions.c.prompt_id)
        .order_by(blobs.c.sha256, versions.c.deleted_at.is_(None), versions.c.id)
    )
    rows = connection.execute(query)
    found = {row.sha256: NamedBlob(row.sha256, row.size, f"{row.name}@{row.version}") for row in rows}
    return list(found.values())
