"""Zip archives from strangers: members are read within limits, and never written to a path."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.client.importers.kinds import ImportFileError

MAX_MEMBERS = 100_000
MAX_MEMBER_BYTES = 16 * 1024**3
MAX_INFLATED_BYTES = 1024**3


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive.

    Raises:
        ImportFileError: If it is not a zip archive, or has too many members.
        OSError: If it cannot be read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ImportFileError(f"{path.name}: not a zip archive ({error})") from error
    with archive:
        if len(archive.namelist()) > MAX_MEMBERS:
            raise ImportFileError(f"{path.name}: an archive with more than {MAX_MEMBERS} members")
        yield archive


def read_member(archive: zipfile.ZipFile, name: str, *, stored: bool = False) -> bytes:
    """Read one member of an archive.

    Args:
        archive: The archive.
        name: The member.
        stored: Whether it must be uncompressed, as torch writes it.

    Raises:
        ImportFileError: If the archive has no such member, or it is damaged, encrypted, compressed against ``stored``
            or larger than the limits.
    """
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise ImportFileError(f"{_name_of(archive)}: it has no {name[:100]!r}") from error
    is_stored = info.compress_type == zipfile.ZIP_STORED
    if stored and not is_stored:
        raise ImportFileError(f"{_name_of(archive)}: {name[:100]!r} is compressed, which torch.save never does")
    limit = MAX_MEMBER_BYTES if is_stored else MAX_INFLATED_BYTES
    if info.file_size > limit:
        raise ImportFileError(f"{_name_of(archive)}: {name[:100]!r} has {info.file_size} bytes; the limit is {limit}")
    try:
        with archive.open(info) as member:
            data = member.read(info.file_size + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ImportFileError(f"{_name_of(archive)}: {name[:100]!r} cannot be read ({error})") from error
    if len(data) != info.file_size:
        raise ImportFileError(f"{_name_of(archive)}: {name[:100]!r} is damaged: its size is not the declared one")
    return data


def _name_of(archive: zipfile.ZipFile) -> str:
    return Path(archive.filename or "the archive").name
