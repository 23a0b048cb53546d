"""Files below ``--adapter-dir``, which a client names by a path.

Every part of the path is opened relative to the folder before it, and none of them may be a symbolic link. So nothing
outside the directory is opened, even if links are made while a path is being followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from prompt_store.blobs.staging import Upload
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE
from server.errors import InvalidRequestError, NotFoundError

FIELD = "lora_path"

MAX_PATH_CHARS = 4096

_PICKLE = "adapter_model.bin"
_READ_BYTES = 4 * 1024 * 1024
_MAX_SHOWN = 200


class AdapterDirectory:
    """The directory from which adapters may be loaded by path. Its methods block.

    Args:
        path: The directory; it may be a link itself, and need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def copy(self, lora_path: str, upload: Upload) -> None:
        """Copy the two files of a PEFT directory into an upload.

        Args:
            lora_path: The PEFT directory: a path below this directory, relative to it or absolute.
            upload: Gets the files.

        Raises:
            InvalidRequestError: If the path leads out of the directory, a part of it or a file is a link, or the
                adapter is only there as a pickle. Nothing of it was opened then.
            NotFoundError: If there is no such directory, or it lacks a file.
            PromptTooLargeError: If a file is larger than an upload may be.
        """
        shown = repr(lora_path[:_MAX_SHOWN])
        with self._open_folder(self._parts(lora_path, shown), shown) as folder:
            names = {name for name in (CONFIG_FILE, WEIGHTS_FILE, _PICKLE) if _exists(name, folder)}
            if _PICKLE in names and WEIGHTS_FILE not in names:
                raise InvalidRequestError(
                    f"{FIELD}: {shown} has {_PICKLE}, a pickle, which can run code and is never opened; convert it "
                    f"to {WEIGHTS_FILE}",
                    param=FIELD,
                )
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if name not in names:
                    raise NotFoundError(f"{FIELD}: {shown} has no {name}", param=FIELD)
            with ExitStack() as stack:
                # Both are opened before one is copied, so that a fault of the second costs nothing.
                sources = {name: stack.enter_context(_open_file(folder, name, shown)) for name in names - {_PICKLE}}
                for name, source in sorted(sources.items()):
                    with upload.open(name) as sink:
                        while data := source.read(_READ_BYTES):
                            sink.write(data)

    def _parts(self, lora_path: str, shown: str) -> tuple[str, ...]:
        """The parts of a path below the directory; looks at no file but the directory."""
        given = PurePosixPath(lora_path)
        if not 0 < len(lora_path) <= MAX_PATH_CHARS or "\0" in lora_path:
            raise InvalidRequestError(f"{FIELD}: must be a path of 1 to {MAX_PATH_CHARS} characters", param=FIELD)
        if given.is_absolute():
            for root in dict.fromkeys((self._path.absolute(), self._path.resolve())):
                if given.is_relative_to(root):
                    given = given.relative_to(root)
                    break
        if given.is_absolute() or ".." in given.parts:
            raise InvalidRequestError(f"{FIELD}: {shown} is not inside --adapter-dir of this server", param=FIELD)
        return given.parts

    @contextmanager
    def _open_folder(self, parts: tuple[str, ...], shown: str) -> Iterator[int]:
        """A descriptor of the folder."""
        descriptor: int | None = None
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            for part in parts:
                inner = _open(part, os.O_DIRECTORY, descriptor, shown)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{FIELD}: there is no directory {shown} in --adapter-dir", param=FIELD) from error
        finally:
            if descriptor is not None:
                os.close(descriptor)


@contextmanager
def _open_file(folder: int, name: str, shown: str) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    descriptor = _open(name, os.O_NONBLOCK, folder, shown)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidRequestError(f"{FIELD}: {name} in {shown} is not a regular file", param=FIELD)
        yield file


def _open(name: str, flags: int, folder: int, shown: str) -> int:
    """Open an entry of a folder that is not a link."""
    if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode):
        raise _is_link(name, shown)
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as error:
        # It became a link since: ELOOP for a file, ENOTDIR for a folder.
        if _is_now_link(name, folder):
            raise _is_link(name, shown) from error
        raise


def _exists(name: str, folder: int) -> bool:
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def _is_now_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode)
    except OSError:
        return False


def _is_link(name: str, shown: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{FIELD}: {name[:_MAX_SHOWN]!r} in {shown} is a symbolic link, which is not followed", param=FIELD
    )
