"""The files of a version: the weights, the digest, and errors of their disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_store.errors import CorruptBlobError, StoreUnavailableError
from prompt_store.types import WEIGHTS_FILE, PromptVersion, StoredFile


@contextmanager
def disk_errors() -> Iterator[None]:
    """Report a full or missing disk as unavailable: nothing was lost, and a retry may succeed."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(f"the store's disk is not available: {error}") from error


def weights_of(version: PromptVersion) -> StoredFile:
    """The weights of a version; CorruptBlobError if it has none."""
    file = version.file(WEIGHTS_FILE)
    if file is None:
        raise CorruptBlobError(f"{version.name}@{version.version} has no weights")
    return file


def version_digest(files: tuple[StoredFile, ...]) -> str:
    """sha256 over ``NAME LENGTH SHA256`` lines in order of name; equal for equal files."""
    lines = [f"{file.filename} {file.size} {file.sha256}\n" for file in sorted(files, key=lambda file: file.filename)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
