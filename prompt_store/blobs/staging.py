"""Temporary files of uploads, before they become blobs."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from prompt_store.errors import Fault, InvalidPromptError, PromptTooLargeError, StoreUnavailableError
from prompt_store.files.adapter_config import MAX_CONFIG_BYTES
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, StoredFile

FILENAMES = (CONFIG_FILE, WEIGHTS_FILE)


class Staging:
    """``staging/<random>``, the folder of this process, with a folder for each upload.

    Replicas may share the directory. Each process locks a file in its folder as long as it runs, so a folder without
    a lock was left by a killed process. The next process that starts removes it.

    Args:
        path: The directory of the blobs, on the same file system, so that publishing is a rename. Created if it does
            not exist.
    """

    def __init__(self, path: Path) -> None:
        root = path / "staging"
        root.mkdir(parents=True, exist_ok=True)
        with _locked(path / "staging.lock"):
            for left in root.iterdir():
                _remove_if_abandoned(left)
            self._folder = Path(tempfile.mkdtemp(dir=root))
            self._lock_file = (self._folder / _LOCK).open("wb")
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)

    def upload(self, max_bytes: int) -> Upload:
        """Start an upload whose files have at most ``max_bytes`` each; a context manager that cleans up."""
        return Upload(Path(tempfile.mkdtemp(dir=self._folder)), max_bytes)

    def close(self) -> None:
        """Remove the folder of this process, with every upload in progress."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock_file.close()


class StagedFile:
    """One file of an upload while it is written.

    Attributes:
        path: Its path.
        size: Number of bytes so far.
        is_complete: Whether it was written to its end and closed.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.size = 0
        self.is_complete = False
        self._max_bytes = max_bytes
        self._sha256 = hashlib.sha256()
        self._file = path.open("xb")

    @property
    def stored(self) -> StoredFile:
        """Name, digest and size.

        Raises:
            InvalidPromptError: If it is incomplete and closed.
        """
        self.check_complete()
        return StoredFile(self.path.name, self._sha256.hexdigest(), self.size)

    def write(self, data: bytes) -> None:
        """Append bytes; after an error the file is closed and never becomes complete.

        Raises:
            PromptTooLargeError: If the file exceeds its size limit.
            StoreUnavailableError: If the disk is full or unavailable.
        """
        try:
            if self.size + len(data) > self._max_bytes:
                message = f"{self.path.name} is larger than the {self._max_bytes} bytes that are taken"
                raise PromptTooLargeError(message)
            self._file.write(data)
        except OSError as error:
            self.discard()
            raise StoreUnavailableError(f"{self.path.name} cannot be written: {error.strerror}") from error
        except BaseException:
            self.discard()
            raise
        self.size += len(data)
        self._sha256.update(data)

    def close(self) -> None:
        """Complete the file; StoreUnavailableError if the disk is full or unavailable. ``BlobStore.put`` syncs it."""
        if not self._file.closed:
            try:
                self._file.close()
            except OSError as error:
                self.discard()
                raise StoreUnavailableError(f"{self.path.name} cannot be written: {error.strerror}") from error
            self.is_complete = True

    def discard(self) -> None:
        """Close the file and ignore errors of the disk."""
        with suppress(OSError):
            self._file.close()

    def check_complete(self) -> None:
        """Raise InvalidPromptError if the file is incomplete and closed."""
        if not self.is_complete:
            name = self.path.name
            raise InvalidPromptError([Fault("incomplete_file", f"{name} is incomplete", name)])

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.discard()


class Upload:
    """The files of one upload, in a temporary folder.

    Attributes:
        files: Opened files by filename.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self.files: dict[str, StagedFile] = {}

    def open(self, filename: str) -> StagedFile:
        """Start a file.

        Raises:
            InvalidPromptError: If the name is not one of ``FILENAMES``, or was opened before.
            StoreUnavailableError: If the disk is full or unavailable.
        """
        if filename not in FILENAMES:
            message = f"{filename[:128]!r} is not taken; a soft prompt is {' and '.join(FILENAMES)}, and nothing else"
            raise InvalidPromptError([Fault("unexpected_file", message, filename[:128])])
        if filename in self.files:
            raise InvalidPromptError([Fault("duplicate_file", f"{filename} was sent twice", filename)])
        try:
            most = min(self._max_bytes, MAX_CONFIG_BYTES) if filename == CONFIG_FILE else self._max_bytes
            self.files[filename] = StagedFile(self._folder / filename, most)
        except OSError as error:
            raise StoreUnavailableError(f"{filename} cannot be written: {error.strerror}") from error
        return self.files[filename]

    def path(self, filename: str) -> Path:
        """The path of a complete file.

        Raises:
            InvalidPromptError: If it was not uploaded, or is not complete.
        """
        if filename not in self.files:
            raise InvalidPromptError([Fault("missing_file", f"{filename} is missing", filename)])
        file = self.files[filename]
        file.check_complete()
        return file.path

    def read(self, filename: str) -> bytes:
        """The bytes of a file; raises what ``path`` does."""
        return self.path(filename).read_bytes()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            file.discard()
        shutil.rmtree(self._folder, ignore_errors=True)


_LOCK = "lock"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock between processes, and hold it."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the folder of a killed process; also one without a lock, because no process creates one meanwhile."""
    lock_file: BinaryIO | None = None
    try:
        lock_file = (folder / _LOCK).open("rb")
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except (FileNotFoundError, NotADirectoryError):
        pass
    finally:
        if lock_file is not None:
            lock_file.close()
    shutil.rmtree(folder, ignore_errors=True)
