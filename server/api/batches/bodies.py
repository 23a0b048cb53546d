"""Request and response bodies of files and batches, in OpenAI's format."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.api.batches.storage import BatchRecord, FileRecord
from server.api.request_body import RequestBody

MAX_METADATA = 16
MAX_KEY_CHARS, MAX_VALUE_CHARS = 64, 512

ObjectType = Annotated[str, Field(description="Type of the object.")]
Time = Annotated[int | None, Field(description="Unix time in seconds at which the batch reached this status.")]


class FileBody(BaseModel):
    """A file."""

    id: str = Field(description="Id of the file.")
    object: ObjectType = "file"
    bytes: int = Field(description="Size in bytes.")
    created_at: int = Field(description="Unix time in seconds.")
    filename: str = Field(description="Name of the file as it was uploaded.")
    purpose: str = Field(description="`batch`: requests; `batch_output`: answers or errors of a batch.")
    status: Annotated[str, Field(description="Always `processed`.")] = "processed"

    @classmethod
    def of(cls, record: FileRecord) -> FileBody:
        """Convert a record."""
        return cls(
            id=record.id,
            bytes=record.size,
            created_at=record.created_at,
            filename=record.filename,
            purpose=record.purpose,
        )


class FileList(BaseModel):
    """A page of files, newest first."""

    object: ObjectType = "list"
    data: list[FileBody] = Field(description="The files, newest first.")
    has_more: bool = Field(description="Whether there is another page.")
    first_id: str | None = Field(description="Id of the first file.")
    last_id: str | None = Field(description="Value of `after` that fetches the next page.")


class FileDeleted(BaseModel):
    """A deleted file."""

    id: str = Field(description="Id of the file.")
    object: ObjectType = "file"
    deleted: Annotated[bool, Field(description="Always true.")] = True


MetadataKey = Annotated[str, Field(max_length=MAX_KEY_CHARS)]
MetadataValue = Annotated[str, Field(max_length=MAX_VALUE_CHARS)]


class NewBatch(RequestBody):
    """``POST /v1/batches``."""

    input_file_id: str = Field(max_length=100, description="Id of a file of requests, in JSON Lines.")
    endpoint: Literal["/v1/chat/completions", "/v1/classify", "/v1/completions"] = Field(
        description="Path of all requests in the file."
    )
    completion_window: Literal["24h"] = Field(description="Always `24h`.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        None, max_length=MAX_METADATA, description="Texts by name, returned with the batch."
    )


class BatchFault(BaseModel):
    """Why a batch failed."""

    code: str = Field(description="Code of the error.")
    message: str = Field(description="For people.")
    param: str | None = Field(description="Always null.")
    line: int | None = Field(description="Line of the input file, from 1.")


class BatchFaults(BaseModel):
    """Why a batch failed: the first faults."""

    object: ObjectType = "list"
    data: list[BatchFault] = Field(description="The faults.")


class RequestCounts(BaseModel):
    """Numbers of requests."""

    total: int = Field(description="Requests in the file.")
    completed: int = Field(description="Requests with an answer.")
    failed: int = Field(description="Requests with an error.")


class BatchBody(BaseModel):
    """A batch."""

    id: str = Field(description="Id of the batch.")
    object: ObjectType = "batch"
    endpoint: str = Field(description="Path of all requests.")
    errors: BatchFaults | None = Field(description="Why it failed.")
    input_file_id: str = Field(description="Id of the file of requests.")
    completion_window: Annotated[str, Field(description="Always `24h`.")] = "24h"
    status: str = Field(
        description="validating, in_progress, finalizing, completed, failed, expired, cancelling or cancelled."
    )
    output_file_id: str | None = Field(description="Id of the file of answers, when the batch is over.")
    error_file_id: str | None = Field(description="Id of the file of errors, when the batch is over.")
    created_at: int = Field(description="Unix time in seconds.")
    in_progress_at: Time
    expires_at: int = Field(description="Unix time in seconds at which the batch ends, finished or not.")
    finalizing_at: Time
    completed_at: Time
    failed_at: Time
    expired_at: Time
    cancelling_at: Time
    cancelled_at: Time
    request_counts: RequestCounts = Field(description="Progress of the batch.")
    metadata: dict[str, str] | None = Field(description="Texts of the client.")

    @classmethod
    def of(cls, record: BatchRecord) -> BatchBody:
        """Convert a record."""
        faults = [BatchFault(code=code, message=text, param=None, line=line) for code, text, line in record.errors]
        times = record.times
        return cls(
            id=record.id,
            endpoint=record.endpoint,
            errors=BatchFaults(data=faults) if faults else None,
            input_file_id=record.input_file_id,
            status=record.status,
            output_file_id=record.output_file_id,
            error_file_id=record.error_file_id,
            created_at=record.created_at,
            expires_at=record.expires_at,
            request_counts=RequestCounts(total=record.total, completed=record.completed, failed=record.failed),
            metadata=record.metadata or None,
            in_progress_at=times.get("in_progress_at"),
            finalizing_at=times.get("finalizing_at"),
            completed_at=times.get("completed_at"),
            failed_at=times.get("failed_at"),
            expired_at=times.get("expired_at"),
            cancelling_at=times.get("cancelling_at"),
            cancelled_at=times.get("cancelled_at"),
        )


class BatchList(BaseModel):
    """A page of batches, newest first."""

    object: ObjectType = "list"
    data: list[BatchBody] = Field(description="The batches, newest first.")
    has_more: bool = Field(description="Whether there is another page.")
    first_id: str | None = Field(description="Id of the first batch.")
    last_id: str | None = Field(description="Value of `after` that fetches the next page.")
