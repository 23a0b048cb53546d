"""Durable writes: after a crash, a file has its old content or its new content, never a part of it.

The bytes are synced before the rename, and the folder after it, so a write that returned survives a power failure.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces ``path`` when the block ends; an exception in the block leaves the old file.

    Yields:
        A temporary file in the same folder.

    Raises:
        OSError: If the file cannot be written, synced or renamed; the old file is left. Only if the folder cannot be
            synced, the last step, is the new file in place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
        move_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replace the content of a file; raises what ``replace_file`` does."""
    with replace_file(path) as file:
        file.write(data)


def move_file(source: Path, target: Path) -> None:
    """Sync a file, and move it to ``target`` on the same file system, where it replaces any other.

    Raises:
        OSError: If the file cannot be synced or renamed; ``source`` is left where it is. Only if the folder cannot be
            synced, the last step, is the file moved.
    """
    sync(source)
    source.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, to the disk.

    Raises:
        OSError: If the path cannot be opened or synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
