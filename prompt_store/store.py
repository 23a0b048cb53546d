"""The prompt store: files and catalog together."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prompt_store.blobs import BlobDirectory
from prompt_store.catalog import Catalog, NewVersion
from prompt_store.errors import CorruptBlobError, Fault, InvalidPromptError, PromptStoreError
from prompt_store.staging import Staging, Upload
from prompt_store.types import (
    CONFIG_FILE,
    DEFAULT_ALIAS,
    WEIGHTS_FILE,
    BaseModelSpec,
    LeasedPrompt,
    PromptRef,
    PromptSummary,
    PromptVersion,
    StoredFile,
    check_name,
)
from prompt_store.validation import TENSOR, validate


class PromptStore:
    """Named, versioned soft prompts in one local directory. Thread-safe; one process at a time.

    One lock orders publications, leases and collection. So a collection never sees an upload's files without its
    version, nor a lease that is about to be taken; all of these are short, and reading files needs no lock.

    Args:
        path: Created where it does not exist.
        max_upload_bytes: Largest file that an upload may hold.

    Raises:
        PromptStoreError: If another process has the directory, or a newer release has written it.
    """

    def __init__(self, path: Path, max_upload_bytes: int = 512 * 1024 * 1024) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._lock_file = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise PromptStoreError(f"the store {path} is in use by another process") from None
        self._max_upload_bytes = max_upload_bytes
        try:
            self._catalog = Catalog(path / "catalog.sqlite3")
        except BaseException:
            self._lock_file.close()
            raise
        self._blobs = BlobDirectory(path)
        self._staging = Staging(path)
        self._lock = threading.Lock()
        self._leases: Counter[str] = Counter()
        """Leases by blob digest."""
        self._resolved: dict[PromptRef, PromptVersion] = {}
        """What references mean, until the next write: nobody else writes."""
        self._deleted_while_leased: set[str] = set()
        self.collect()  # blobs that a killed process wrote without coming to record them

    def close(self) -> None:
        """Close the catalog and let other processes have the directory."""
        self._staging.close()
        self._catalog.close()
        self._lock_file.close()

    # Publishing

    def upload(self) -> Upload:
        """A place to write an upload's files to, for ``publish``; a context manager that cleans up behind itself."""
        return self._staging.upload(self._max_upload_bytes)

    def publish(
        self,
        upload: Upload,
        *,
        name: str,
        base: BaseModelSpec,
        require_same_base: bool = False,
        alias: str | None = DEFAULT_ALIAS,
        description: str = "",
        tags: Collection[str] = (),
        metadata: Mapping[str, object] | None = None,
        reserved_names: Collection[str] = (),
    ) -> tuple[PromptVersion, bool]:
        """Validate an upload and make it a version, served from the next request on.

        The files are on the disk before the catalog names them, so a version never lacks its bytes.

        Args:
            upload: With both files written and closed.
            name: Whose version it becomes.
            base: The resident model, which it has to fit.
            require_same_base: Refuse a configuration that names another base.
            alias: What to point at it; None leaves the aliases alone.
            description: Free text.
            tags: Words to list by.
            metadata: A JSON object.
            reserved_names: Names that mean something else, such as the base model's.

        Returns:
            The version, and whether it is new. The same files under the same name are the version that is there;
            the alias is pointed at it all the same.

        Raises:
            ValueError: If name, alias or a tag is not well formed, or the name is reserved.
            InvalidPromptError: With every fault of the files.
        """
        check_name(name, "name")
        if name in reserved_names:
            raise ValueError(f"name {name!r} is taken by the base model")
        if alias is not None:
            check_name(alias, "alias")
        for tag in tags:
            check_name(tag, "tag")
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in upload.files]
        if missing:
            raise InvalidPromptError([Fault("missing_file", f"{file} is missing", file) for file in missing])
        soft_prompt = validate(
            upload.read(CONFIG_FILE), upload.read(WEIGHTS_FILE), base, require_same_base=require_same_base
        )
        files = tuple(upload.files[file].stored for file in (CONFIG_FILE, WEIGHTS_FILE))
        new = NewVersion(
            name=name,
            digest=_version_digest(files),
            peft_type=soft_prompt.peft_type,
            task_type=soft_prompt.task_type,
            num_virtual_tokens=soft_prompt.num_virtual_tokens,
            dtype=soft_prompt.tensors[TENSOR].dtype,
            base_model_name_or_path=soft_prompt.base_model_name_or_path,
            files=files,
            description=description,
            tags=tuple(tags),
            metadata=metadata or {},
        )
        with self._writing():
            for file in files:
                self._blobs.put(upload.path(file.filename), file.sha256, file.size)
            return self._catalog.publish(new, alias)

    # Using

    def resolve(self, ref: PromptRef) -> PromptVersion:
        """The version that a reference means now; PromptNotFoundError if there is none."""
        with self._lock:
            return self._resolve(ref)

    def lease(self, ref: PromptRef) -> LeasedPrompt:
        """Resolve, and keep the files until ``release``, whatever is promoted or deleted meanwhile.

        Raises:
            PromptNotFoundError: If there is no such version.
            CorruptBlobError: If its weights are not where they should be.
        """
        with self._lock:
            version = self._resolve(ref)
            path = self._blobs.path(_weights(version).sha256)
            if not path.exists():
                raise CorruptBlobError(f"the weights of {version.name}@{version.version} are missing from the store")
            self._leases.update(file.sha256 for file in version.files)
            return LeasedPrompt(version, path)

    def release(self, leased: LeasedPrompt) -> None:
        """End a lease; files that were deleted meanwhile go with the last one."""
        digests = [file.sha256 for file in leased.version.files]
        with self._lock:
            self._leases.subtract(digests)
            ended = [digest for digest in digests if self._leases[digest] == 0]
            for digest in ended:
                del self._leases[digest]
            # Only where something was deleted does the catalog have to be asked.
            if ended and self._deleted_while_leased.intersection(ended):
                self._collect()

    @contextmanager
    def leased(self, ref: PromptRef) -> Iterator[LeasedPrompt]:
        """A lease as a context manager; raises what ``lease`` does."""
        leased = self.lease(ref)
        try:
            yield leased
        finally:
            self.release(leased)

    # Looking

    def get_prompt(self, name: str) -> PromptSummary:
        """A name with its aliases and newest version; PromptNotFoundError if there is none."""
        return self._catalog.get_prompt(name)

    def list_prompts(
        self, limit: int = 100, after: str | None = None, tag: str | None = None
    ) -> tuple[list[PromptSummary], bool]:
        """Names in order, behind ``after``, those with ``tag``; and whether there are more."""
        return self._catalog.list_prompts(limit, after, tag)

    def list_versions(self, name: str) -> list[PromptVersion]:
        """All versions of a name, newest first; PromptNotFoundError if there is none."""
        return self._catalog.list_versions(name)

    def read_file(self, name: str, version: int, filename: str) -> bytes:
        """One file, byte for byte as it was uploaded.

        Raises:
            PromptNotFoundError: If there is no such version.
            CorruptBlobError: If the bytes are not those that were uploaded.
        """
        with self.leased(PromptRef(name, version=version, alias=None)) as leased:
            file = leased.version.file(filename)
            if file is None:
                raise InvalidPromptError([Fault("unexpected_file", f"a version has no file {filename[:128]!r}")])
            data = self._blobs.path(file.sha256).read_bytes()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CorruptBlobError(f"{filename} of {name}@{version} is not what was uploaded")
        return data

    def counts(self) -> tuple[int, int]:
        """(names, versions)."""
        return self._catalog.counts()

    # Changing

    def set_alias(self, name: str, alias: str, version: int, expected_version: int | None = None) -> None:
        """Point an alias at a version.

        Raises:
            ValueError: If the alias is not well formed.
            PromptNotFoundError: If there is no such version.
            PromptConflictError: If ``expected_version`` is given and the alias does not point there.
        """
        check_name(alias, "alias")
        with self._writing():
            self._catalog.set_alias(name, alias, version, expected_version)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias; PromptNotFoundError if there is none."""
        with self._writing():
            self._catalog.delete_alias(name, alias)

    def delete_version(self, name: str, version: int) -> None:
        """Delete a version; its files stay while leased. PromptNotFoundError if there is none."""
        with self._writing():
            self._catalog.delete_version(name, version)
            self._collect()

    def delete_prompt(self, name: str) -> None:
        """Delete a name with all its versions; files stay while leased. PromptNotFoundError if there is none."""
        with self._writing():
            self._catalog.delete_prompt(name)
            self._collect()

    def collect(self) -> int:
        """Remove blobs that no version names and no lease holds; returns how many."""
        with self._lock:
            return self._collect()

    # Inside

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            finally:
                self._resolved.clear()

    def _resolve(self, ref: PromptRef) -> PromptVersion:
        version = self._resolved.get(ref)
        if version is None:
            version = self._catalog.resolve(ref)
            if len(self._resolved) >= _MAX_RESOLVED:
                self._resolved.clear()
            self._resolved[ref] = version
        return version

    def _collect(self) -> int:
        named = self._catalog.blob_digests()
        unnamed = set(self._blobs.digests()) - named
        self._deleted_while_leased = {digest for digest in unnamed if digest in self._leases}
        garbage = unnamed - self._deleted_while_leased
        for digest in garbage:
            self._blobs.delete(digest)
        return len(garbage)


_MAX_RESOLVED = 10_000


def _weights(version: PromptVersion) -> StoredFile:
    file = version.file(WEIGHTS_FILE)
    if file is None:
        raise CorruptBlobError(f"{version.name}@{version.version} was recorded without weights")
    return file


def _version_digest(files: tuple[StoredFile, ...]) -> str:
    """sha256 over ``NAME LENGTH SHA256`` lines in order of name: the same files, the same digest."""
    lines = [f"{file.filename} {file.size} {file.sha256}\n" for file in sorted(files, key=lambda file: file.filename)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
