"""Files and batches of each tenant, in a directory of this server.

::

    files/ID/meta.json  files/ID/content
    batches/ID/batch.json  batches/ID/output.jsonl  batches/ID/errors.jsonl

The two last files grow while the batch runs, one line for each answered request, and become files of their own at its
end. What is in them after a crash is answered; everything else is sent again.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from prompt_store.durable import write_file
from server.errors import InvalidRequestError, NotFoundError, PayloadTooLargeError

MAX_FILES = 1000
"""Files of one tenant, and batches of one tenant."""

MAX_TENANT_BYTES = 2 * 1024**3
"""Size of all files of one tenant."""

_ID = re.compile(r"(file|batch)-[0-9a-f]{32}")
_CHUNK_BYTES = 1024 * 1024


Record = TypeVar("Record", bound=msgspec.Struct)


class FileRecord(msgspec.Struct, kw_only=True):
    """One file.

    Attributes:
        id: ``file-...``.
        tenant: Who may read it.
        filename: As it was uploaded.
        purpose: ``batch`` or ``batch_output``.
        size: Size in bytes.
        created_at: Unix time in seconds.
    """

    id: str
    tenant: str
    filename: str
    purpose: str
    size: int
    created_at: int


class BatchRecord(msgspec.Struct, kw_only=True):
    """One batch, as it is kept on the disk.

    Attributes:
        id: ``batch-...``.
        tenant: Who may read it.
        key: Name of the API key that created it; its requests are those of this key. None without keys.
        endpoint: Path of all its requests.
        input_file_id: The file with the requests.
        status: OpenAI's status.
        created_at: Unix time in seconds, as all other times.
        expires_at: When it ends, finished or not.
        metadata: Texts of the client.
        total: Number of requests.
        completed: Requests with an answer.
        failed: Requests with an error.
        errors: Why it failed: (code, message, line number) of each fault.
        output_file_id: The file with the answers.
        error_file_id: The file with the errors.
        times: When it reached each status, by OpenAI's field name.
    """

    id: str
    tenant: str
    key: str | None
    endpoint: str
    input_file_id: str
    status: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: list[tuple[str, str, int | None]] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: dict[str, int] = {}

    @property
    def is_over(self) -> bool:
        """Whether its status is final."""
        return self.status in ("completed", "failed", "expired", "cancelled")


class BatchStorage:
    """The files and batches of a server. Its methods block.

    Args:
        directory: Created when it is first written to.
    """

    def __init__(self, directory: Path) -> None:
        self._files = directory / "files"
        self._batches = directory / "batches"

    # Files

    def add_file(self, source: BinaryIO, *, tenant: str, filename: str, purpose: str, limit: int) -> FileRecord:
        """Store a file.

        Raises:
            PayloadTooLargeError: If it is larger than ``limit`` bytes, or all files of the tenant are too large.
            InvalidRequestError: If the tenant has too many files.
        """
        others = self.files(tenant)
        if len(others) >= MAX_FILES:
            raise InvalidRequestError(f"file: there are {len(others)} files already; delete some", param="file")
        room = MAX_TENANT_BYTES - sum(other.size for other in others)
        record = FileRecord(
            id=f"file-{secrets.token_hex(16)}",
            tenant=tenant,
            filename=filename[:255],
            purpose=purpose,
            size=0,
            created_at=int(time.time()),
        )
        folder = self._files / record.id
        folder.mkdir(parents=True)
        try:
            with (folder / "content").open("xb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    record.size += len(chunk)
                    if record.size > limit:
                        raise PayloadTooLargeError(f"file: larger than the limit of {limit} bytes", param="file")
                    if record.size > room:
                        raise PayloadTooLargeError(
                            f"file: all files together would be over {MAX_TENANT_BYTES} bytes; delete some",
                            param="file",
                        )
                    target.write(chunk)
            write_file(folder / "meta.json", msgspec.json.encode(record))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return record

    def file(self, file_id: str, tenant: str) -> FileRecord:
        """A file; NotFoundError if there is none, or it is another tenant's."""
        record = _read(self._files, file_id, "meta.json", FileRecord)
        if record is None or record.tenant != tenant:
            raise NotFoundError(f"the file {file_id[:100]!r} does not exist")
        return record

    def files(self, tenant: str) -> list[FileRecord]:
        """The files of a tenant, newest first."""
        found = (_read(self._files, path.name, "meta.json", FileRecord) for path in _folders(self._files))
        mine = [record for record in found if record is not None and record.tenant == tenant]
        return sorted(mine, key=lambda record: (record.created_at, record.id), reverse=True)

    def content(self, file_id: str, tenant: str) -> Path:
        """The path of a file's content; NotFoundError as for ``file``."""
        return self._files / self.file(file_id, tenant).id / "content"

    def delete_file(self, file_id: str, tenant: str) -> None:
        """Delete a file.

        Raises:
            NotFoundError: As for ``file``.
            InvalidRequestError: If a batch that is not over reads it.
        """
        self.file(file_id, tenant)
        if any(batch.input_file_id == file_id and not batch.is_over for batch in self.batches(tenant)):
            raise InvalidRequestError(f"the file {file_id} is the input of a batch that is not over; cancel it first")
        shutil.rmtree(self._files / file_id)

    # Batches

    def add_batch(self, record: BatchRecord) -> None:
        """Store a new batch; InvalidRequestError if the tenant has too many."""
        if len(self.batches(record.tenant)) >= MAX_FILES:
            oldest = next((one for one in reversed(self.batches(record.tenant)) if one.is_over), None)
            if oldest is None:
                raise InvalidRequestError(f"there are {MAX_FILES} batches already, none of them over")
            shutil.rmtree(self._batches / oldest.id)
        (self._batches / record.id).mkdir(parents=True)
        self.save(record)

    def save(self, record: BatchRecord) -> None:
        """Write the state of a batch."""
        write_file(self._batches / record.id / "batch.json", msgspec.json.encode(record))

    def batch(self, batch_id: str, tenant: str) -> BatchRecord:
        """A batch; NotFoundError if there is none, or it is another tenant's."""
        record = _read(self._batches, batch_id, "batch.json", BatchRecord)
        if record is None or record.tenant != tenant:
            raise NotFoundError(f"the batch {batch_id[:100]!r} does not exist")
        return record

    def batches(self, tenant: str | None) -> list[BatchRecord]:
        """The batches of a tenant, or of all, newest first."""
        found = (_read(self._batches, path.name, "batch.json", BatchRecord) for path in _folders(self._batches))
        mine = [record for record in found if record is not None and tenant in (None, record.tenant)]
        return sorted(mine, key=lambda record: (record.created_at, record.id), reverse=True)

    def answered(self, record: BatchRecord) -> set[str]:
        """The ``custom_id`` of each request of a batch that has an answer or an error; sets the counts.

        A line that was cut off by a crash is removed.
        """
        answers = set(_complete_lines(self._growing(record, "output")))
        errors = set(_complete_lines(self._growing(record, "errors")))
        record.completed, record.failed = len(answers), len(errors)
        return answers | errors

    def append(self, record: BatchRecord, line: dict[str, Any], *, is_error: bool) -> None:
        """Record the answer, or the error, of one request."""
        with self._growing(record, "errors" if is_error else "output").open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if is_error:
            record.failed += 1
        else:
            record.completed += 1

    def publish_results(self, record: BatchRecord) -> None:
        """Make files of the answers and errors of a batch that is over."""
        for kind in ("output", "errors"):
            path = self._growing(record, kind)
            if not path.exists() or not path.stat().st_size:
                continue
            result = FileRecord(
                id=f"file-{secrets.token_hex(16)}",
                tenant=record.tenant,
                filename=f"{record.id}_{kind}.jsonl",
                purpose="batch_output",
                size=path.stat().st_size,
                created_at=int(time.time()),
            )
            folder = self._files / result.id
            folder.mkdir(parents=True)
            shutil.copyfile(path, folder / "content")  # kept until the batch is saved: a crash repeats this
            write_file(folder / "meta.json", msgspec.json.encode(result))
            if kind == "output":
                record.output_file_id = result.id
            else:
                record.error_file_id = result.id

    def forget_growing(self, record: BatchRecord) -> None:
        """Remove the growing files of a batch whose results are files."""
        for kind in ("output", "errors"):
            self._growing(record, kind).unlink(missing_ok=True)

    def _growing(self, record: BatchRecord, kind: str) -> Path:
        return self._batches / record.id / f"{kind}.jsonl"


def _folders(parent: Path) -> Iterable[Path]:
    return list(parent.iterdir()) if parent.is_dir() else []


def _read(parent: Path, name: str, file: str, kind: type[Record]) -> Record | None:
    """A record; None if there is none: it was never made, is being made, or was deleted."""
    if _ID.fullmatch(name) is None:
        return None
    try:
        return msgspec.json.decode((parent / name / file).read_bytes(), type=kind)
    except FileNotFoundError:
        return None


def _complete_lines(path: Path) -> Iterator[str]:
    """The ``custom_id`` of each complete line; what follows the last line end is removed."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            yield json.loads(line)["custom_id"]
        file.truncate(end)
