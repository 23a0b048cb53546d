"""The two forms of a backup: a directory, which is a store itself, or one tar file with the same content.

``catalog.sqlite3``, ``blobs/ab/abcdef...`` and ``backup.json``, which marks it as complete.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prompt_store import durable
from prompt_store.blobs.blobs import CHUNK_BYTES, checked_chunks
from prompt_store.errors import BlobNotFoundError, PromptStoreError
from prompt_store.open_store import CATALOG_FILE, catalog_url_of, lock_catalog

MANIFEST_FILE = "backup.json"

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_tar(path: Path) -> bool:
    """Whether a backup of this name is one tar file."""
    return path.suffix == ".tar"


class BackupWriter(ABC):
    """Receives blobs, and then the catalog that names them."""

    @abstractmethod
    def has(self, digest: str, size: int) -> bool:
        """Whether it holds a blob of this size already."""

    @abstractmethod
    def add(self, digest: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a blob; raises what reading ``chunks`` raises, and then it is not added."""

    @abstractmethod
    def finish(self, catalog: Path, manifest: Mapping[str, object], named: set[str]) -> None:
        """Complete the backup.

        Args:
            catalog: The SQLite file of the catalog; moved or copied.
            manifest: Facts about the backup.
            named: The digests of the blobs that the catalog names; others are removed.
        """


@contextmanager
def backup_writer(path: Path) -> Iterator[BackupWriter]:
    """Write a backup. A directory is updated: its blobs are not copied again.

    Raises:
        PromptStoreError: If a directory holds something else than a backup, or is in use.
        OSError: If it cannot be written.
    """
    if not is_tar(path):
        yield _DirectoryWriter(path)
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with tarfile.open(part, "w") as archive:
            yield _TarWriter(archive)
        durable.move_file(part, path)
    finally:
        part.unlink(missing_ok=True)


class _DirectoryWriter(BackupWriter):
    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and names.isdisjoint({MANIFEST_FILE, _STARTED}):
            raise PromptStoreError(f"{path} is not empty and not a backup: give a new directory")
        with lock_catalog(catalog_url_of(path, None)):  # raises if a server uses it
            pass
        (path / _STARTED).touch()
        (path / MANIFEST_FILE).unlink(missing_ok=True)  # until it is complete again

    def has(self, digest: str, size: int) -> bool:
        path = _blob_path(self._path, digest)
        return path.is_file() and path.stat().st_size == size

    def add(self, digest: str, size: int, chunks: Iterable[bytes]) -> None:
        path = _blob_path(self._path, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replace_file(path) as file:
            for chunk in chunks:
                file.write(chunk)

    def finish(self, catalog: Path, manifest: Mapping[str, object], named: set[str]) -> None:
        with durable.replace_file(self._path / CATALOG_FILE) as file, catalog.open("rb") as source:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        for blob in self._path.glob("blobs/*/*"):
            if blob.name not in named:
                blob.unlink()
        durable.write_file(self._path / MANIFEST_FILE, json.dumps(manifest, indent=2).encode())
        (self._path / _STARTED).unlink(missing_ok=True)


_STARTED = "backup.part"
"""Marks a directory whose first backup has begun and is not complete."""


class _TarWriter(BackupWriter):
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._added: set[str] = set()

    def has(self, digest: str, size: int) -> bool:
        return digest in self._added

    def add(self, digest: str, size: int, chunks: Iterable[bytes]) -> None:
        with tempfile.TemporaryFile() as file:  # only a whole blob is added
            for chunk in chunks:
                file.write(chunk)
            file.seek(0)
            info = tarfile.TarInfo(f"blobs/{digest[:2]}/{digest}")
            info.size = size
            self._archive.addfile(info, file)
        self._added.add(digest)

    def finish(self, catalog: Path, manifest: Mapping[str, object], named: set[str]) -> None:
        self._archive.add(catalog, CATALOG_FILE)
        data = json.dumps(manifest, indent=2).encode()
        info = tarfile.TarInfo(MANIFEST_FILE)
        info.size = len(data)
        self._archive.addfile(info, io.BytesIO(data))


class BackupReader(ABC):
    """A complete backup."""

    @abstractmethod
    def copy_catalog(self, target: Path) -> None:
        """Write the SQLite file of the catalog to ``target``."""

    @abstractmethod
    def chunks(self, digest: str, size: int) -> Iterator[bytes]:
        """The bytes of a blob.

        Raises:
            BlobNotFoundError: If it is missing.
            CorruptBlobError: After the last chunk, if they do not match the digest.
        """


@contextmanager
def backup_reader(path: Path) -> Iterator[BackupReader]:
    """Read a backup.

    Raises:
        PromptStoreError: If it is not a complete backup.
    """
    if path.is_dir():
        if not (path / MANIFEST_FILE).is_file():
            raise PromptStoreError(f"{path} is not a complete backup: it has no {MANIFEST_FILE}")
        yield _DirectoryReader(path)
        return
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except (OSError, tarfile.TarError) as error:
        raise PromptStoreError(f"{path} is not a backup: {error}") from error
    with archive:
        try:
            members = {member.name: member for member in archive if member.isreg()}
        except tarfile.TarError as error:
            raise PromptStoreError(f"{path} is damaged: {error}") from error
        if not members.keys() >= {MANIFEST_FILE, CATALOG_FILE}:
            raise PromptStoreError(f"{path} is not a complete backup: it has no {MANIFEST_FILE} or no {CATALOG_FILE}")
        yield _TarReader(archive, members)


class _DirectoryReader(BackupReader):
    def __init__(self, path: Path) -> None:
        self._path = path

    def copy_catalog(self, target: Path) -> None:
        shutil.copyfile(self._path / CATALOG_FILE, target)

    def chunks(self, digest: str, size: int) -> Iterator[bytes]:
        try:
            file = _blob_path(self._path, digest).open("rb")
        except FileNotFoundError as error:
            raise BlobNotFoundError(f"blob {digest} is missing from the backup") from error
        with file:
            yield from checked_chunks(iter(lambda: file.read(CHUNK_BYTES), b""), digest, size)


class _TarReader(BackupReader):
    def __init__(self, archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> None:
        self._archive = archive
        self._members = members

    def copy_catalog(self, target: Path) -> None:
        with target.open("wb") as file:
            for chunk in self._read(CATALOG_FILE):
                file.write(chunk)

    def chunks(self, digest: str, size: int) -> Iterator[bytes]:
        name = f"blobs/{digest[:2]}/{digest}"
        if name not in self._members:
            raise BlobNotFoundError(f"blob {digest} is missing from the backup")
        yield from checked_chunks(self._read(name), digest, size)

    def _read(self, name: str) -> Iterator[bytes]:
        file = self._archive.extractfile(self._members[name])
        if file is None:
            raise PromptStoreError(f"{name} in the backup is not a file")
        with file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")


def _blob_path(folder: Path, digest: str) -> Path:
    if _DIGEST.fullmatch(digest) is None:
        raise PromptStoreError(f"the catalog names a blob {digest[:80]!r}, which is not a digest")
    return folder / "blobs" / digest[:2] / digest
