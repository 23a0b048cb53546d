"""Back up a store, and restore it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import sqlalchemy as sa

from prompt_store.blobs.blobs import BlobDirectory, BlobStore
from prompt_store.blobs.object_store import ObjectBlobs
from prompt_store.catalog.database import Database
from prompt_store.catalog.lookups import live
from prompt_store.catalog.schema import versions
from prompt_store.errors import BlobNotFoundError, CorruptBlobError, PromptStoreError
from prompt_store.maintenance.backup_format import BackupWriter, backup_reader, backup_writer
from prompt_store.maintenance.copying import copy_tables, require_empty, snapshot
from prompt_store.maintenance.existing import NamedBlob, existing_store, named_blobs
from prompt_store.open_store import catalog_url_of, lock_catalog

_ATTEMPTS = 3
"""Snapshots of the catalog before a missing blob counts as lost: it may have been collected during the copy."""

_CACHE_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup or a restoration holds.

    Attributes:
        prompts: Number of names with versions.
        versions: Number of their versions.
        blobs: Number of files, including those of deleted versions that can be restored.
        bytes: Their size.
        copied: Number of files that were copied now.
        damaged: Versions whose files are missing or damaged in the source, with the reason.
    """

    prompts: int
    versions: int
    blobs: int
    bytes: int
    copied: int
    damaged: tuple[str, ...]


def back_up(location: str, catalog_url: str | None, target: Path) -> BackupReport:
    """Write a backup of a store, also while servers run on it.

    The catalog is read first, as one snapshot, and then the blobs that it names. Blobs collected in between belong to
    versions that were given up meanwhile; then the catalog is read again.

    Args:
        location: See ``open_store``.
        catalog_url: See ``open_store``.
        target: A directory, new or with an earlier backup; or a file that ends in ``.tar``.

    Returns:
        The report. With damaged versions the backup is complete except for their files.

    Raises:
        PromptStoreError: If there is no store, or the target is something else.
        StoreUnavailableError: If catalog or blobs cannot be read now.
    """
    with (
        existing_store(location, catalog_url) as (database, blobs),
        backup_writer(target) as writer,
        tempfile.TemporaryDirectory(prefix="prelude-") as folder,
    ):
        copied = 0
        for attempt in range(_ATTEMPTS):
            catalog = Path(folder) / f"{attempt}.sqlite3"
            snapshot(database, catalog)
            named, counts = _content(catalog)
            added, damaged, is_missing = _copy_blobs(blobs, named, writer)
            copied += added
            if not is_missing:
                break
        report = BackupReport(*counts, len(named), sum(blob.size for blob in named), copied, damaged)
        manifest = {"created_at": int(time.time()), "store": location, **asdict(report)}
        writer.finish(catalog, manifest, {blob.digest for blob in named})
        return report


def restore(source: Path, location: str, catalog_url: str | None) -> BackupReport:
    """Fill an empty store from a backup. The catalog is written last, so an interrupted restoration can be repeated.

    Args:
        source: A directory or a tar file written by ``back_up``.
        location: See ``open_store``; created if it does not exist.
        catalog_url: See ``open_store``.

    Raises:
        PromptStoreError: If the source is not a complete backup or lacks files, or a server uses the store.
        PromptConflictError: If the store is not empty.
        StoreUnavailableError: If catalog or blobs cannot be written now.
    """
    url = catalog_url_of(location, catalog_url)
    with ExitStack() as stack:
        backup = stack.enter_context(backup_reader(source))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prelude-")))
        catalog = scratch / "catalog.sqlite3"
        backup.copy_catalog(catalog)
        origin = stack.enter_context(closing(Database(f"sqlite:///{catalog}")))  # migrates the copy
        named, counts = _content(catalog)
        if "://" not in location:
            Path(location).mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock_catalog(url))
        target = stack.enter_context(closing(Database(url)))
        with target.reading() as connection:
            require_empty(connection, target)
        blobs: BlobStore
        if "://" in location:
            blobs = ObjectBlobs(location, scratch / "cache", _CACHE_BYTES)
            staging = scratch
        else:
            blobs = BlobDirectory(Path(location))
            # On the same file system, because a blob is moved to its place.
            staging = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="restore-", dir=location)))
        stack.callback(blobs.close)
        for blob in named:
            staged = staging / blob.digest
            try:
                _write(staged, backup.chunks(blob.digest, blob.size))
            except CorruptBlobError as error:
                raise PromptStoreError(f"{source} cannot be restored: a file of {blob.name}: {error}") from error
            blobs.put(staged, blob.digest, blob.size)
        with origin.reading() as connection:
            copy_tables(connection, target)
    return BackupReport(*counts, len(named), sum(blob.size for blob in named), len(named), ())


def _copy_blobs(
    blobs: BlobStore, named: Iterable[NamedBlob], writer: BackupWriter
) -> tuple[int, tuple[str, ...], bool]:
    """Copy blobs; returns the number of copies, the damaged ones, and whether any of them is missing."""
    copied, damaged, is_missing = 0, [], False
    for blob in named:
        if writer.has(blob.digest, blob.size):
            continue
        try:
            writer.add(blob.digest, blob.size, blobs.chunks(blob.digest, blob.size))
            copied += 1
        except CorruptBlobError as error:
            damaged.append(f"{blob.name}: {error}")
            is_missing |= isinstance(error, BlobNotFoundError)
    return copied, tuple(damaged), is_missing


def _content(catalog: Path) -> tuple[list[NamedBlob], tuple[int, int]]:
    """The blobs that a catalog names, and the number of its names and of their versions."""
    with closing(Database(f"sqlite:///{catalog}")) as database, database.reading() as connection:
        counts = connection.execute(
            sa.select(sa.func.count(versions.c.prompt_id.distinct()), sa.func.count()).where(live)
        ).one()
        return named_blobs(connection), (counts[0], counts[1])


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
