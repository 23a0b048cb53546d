"""The files of a version: the weights, the digest, and errors of their disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_store.errors import CorruptBlobError, StoreUnavailableError
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, PromptKind, PromptVersion, StoredFile


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


def files_in_use(version: PromptVersion) -> list[StoredFile]:
    """The files that serving reads: the weights, and the configuration of an adapter, which has its scales.

    Raises:
        CorruptBlobError: If the version lacks one.
    """
    if version.kind is PromptKind.SOFT_PROMPT:
        return [weights_of(version)]
    config = version.file(CONFIG_FILE)
    if config is None:
        raise CorruptBlobError(f"{version.name}@{version.version} has no configuration")
    return [weights_of(version), config]


def version_digest(files: tuple[StoredFile, ...]) -> str:
    """sha256 over ``NAME LENGTH SHA256`` lines in order of name; equal for equal files."""
    lines = [f"{file.filename} {file.size} {file.sha256}\n" for file in sorted(files, key=lambda file: file.filename)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
