"""Files by the sha256 of their content, in a local directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from prompt_store.errors import Fault, InvalidPromptError, PromptTooLargeError
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, StoredFile

FILENAMES = (CONFIG_FILE, WEIGHTS_FILE)


class BlobDirectory:
    """``blobs/ab/abcdef...``, each file named by its digest; ``staging/`` holds what is still being written.

    A blob appears by a rename after its bytes are on the disk, so a reader sees all of it or nothing.

    Args:
        path: Created where it does not exist. What a killed process left in staging is removed.
    """

    def __init__(self, path: Path) -> None:
        self._blobs = path / "blobs"
        self._staging = path / "staging"
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in (self._blobs, self._staging):
            folder.mkdir(parents=True, exist_ok=True)

    def stage(self, max_bytes: int) -> Upload:
        """Begin an upload whose files have at most ``max_bytes`` each."""
        return Upload(Path(tempfile.mkdtemp(dir=self._staging)), max_bytes)

    def path(self, digest: str) -> Path:
        """Where the blob of this digest is, if it is."""
        return self._blobs / digest[:2] / digest

    def add(self, staged: Path, digest: str) -> None:
        """Move a staged file, whose bytes are on the disk already, to its place."""
        target = self.path(digest)
        if target.exists():
            return
        target.parent.mkdir(exist_ok=True)
        staged.rename(target)
        _sync_folder(target.parent)
        _sync_folder(self._blobs)

    def delete(self, digest: str) -> None:
        """Remove a blob; nothing happens if it is gone."""
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """The digests of all blobs."""
        for folder in self._blobs.iterdir():
            for file in folder.iterdir():
                yield file.name


class StagedFile:
    """One file of an upload while it is written.

    Attributes:
        path: Where it is.
        size: Bytes so far.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.size = 0
        self._max_bytes = max_bytes
        self._sha256 = hashlib.sha256()
        self._file = path.open("xb")

    @property
    def stored(self) -> StoredFile:
        """Name, digest and size."""
        return StoredFile(self.path.name, self._sha256.hexdigest(), self.size)

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            PromptTooLargeError: If the file becomes larger than it may be.
        """
        self.size += len(data)
        if self.size > self._max_bytes:
            raise PromptTooLargeError(f"{self.path.name} is larger than the {self._max_bytes} bytes that are taken")
        self._sha256.update(data)
        self._file.write(data)

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Close without waiting for the disk."""
        self._file.close()

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.discard()


class Upload:
    """The files of one upload, in a folder of their own that is removed at the end.

    Attributes:
        files: What has been opened, by filename.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self.files: dict[str, StagedFile] = {}

    def open(self, filename: str) -> StagedFile:
        """Begin a file.

        Raises:
            InvalidPromptError: If the name is not one of the two that are taken, or was opened before.
        """
        if filename not in FILENAMES:
            message = f"{filename[:128]!r} is not taken; a soft prompt is {' and '.join(FILENAMES)}, and nothing else"
            raise InvalidPromptError([Fault("unexpected_file", message, filename[:128])])
        if filename in self.files:
            raise InvalidPromptError([Fault("duplicate_file", f"{filename} is there twice", filename)])
        self.files[filename] = StagedFile(self._folder / filename, self._max_bytes)
        return self.files[filename]

    def read(self, filename: str) -> bytes:
        """The bytes of a file, once it is closed.

        Raises:
            InvalidPromptError: If it was not uploaded.
        """
        if filename not in self.files:
            raise InvalidPromptError([Fault("missing_file", f"{filename} is missing", filename)])
        return self.files[filename].path.read_bytes()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            file.discard()
        shutil.rmtree(self._folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk: the folder's own entry has to be synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
