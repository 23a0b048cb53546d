"""OpenAI's routes of files and batches."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Path, Query
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from server.api.batches.bodies import BatchBody, BatchList, FileBody, FileDeleted, FileList, NewBatch
from server.api.batches.runner import BatchRunner
from server.api.batches.storage import BatchRecord, FileRecord
from server.api.http.disconnect import CLIENT_CLOSED_REQUEST
from server.api.http.multipart import bounded
from server.api.keys.callers import CallerDep, Scope
from server.api.operations import Operation, Quota
from server.api.request_body import require_json
from server.api.services import ServicesDep
from server.errors import InvalidRequestError, MediaTypeError, PayloadTooLargeError

router = APIRouter(prefix="/v1", tags=["batches"])

MAX_FILE_BYTES = 200 * 1024 * 1024
_SLACK_BYTES = 64 * 1024
"""Size of an upload besides its file."""

WINDOW_SECONDS = 24 * 3600

Record = TypeVar("Record", FileRecord, BatchRecord)

FileId = Annotated[str, Path(alias="file_id", max_length=100, description="Id of the file.", examples=["file-0"])]
BatchId = Annotated[str, Path(alias="batch_id", max_length=100, description="Id of the batch.", examples=["batch-0"])]
Limit = Annotated[int, Query(ge=1, le=10_000, description="Maximum number of entries.")]
After = Annotated[str | None, Query(max_length=100, description="Id of the last entry of the page before.")]
Purpose = Annotated[str | None, Query(max_length=100, description="Only files with this purpose.")]


async def _runner(request: Request) -> BatchRunner:
    runner = request.app.state.batches
    if not isinstance(runner, BatchRunner):
        raise TypeError("the application was not made by create_app")
    return runner


RunnerDep = Annotated[BatchRunner, Depends(_runner)]


@router.post(
    "/files",
    response_model=FileBody,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file", "purpose"],
                        "properties": {
                            "file": {"type": "string", "format": "binary", "description": "JSON Lines of requests."},
                            "purpose": {"type": "string", "description": "Always `batch`."},
                        },
                    }
                }
            },
        }
    },
)
@Operation(scopes={Scope.GENERATE}, errors=(400, 413, 415), is_upload=True, quota=Quota.REQUESTS)
async def create_file(request: Request, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> Response:
    """Upload a file of requests for a batch."""
    limit = MAX_FILE_BYTES + _SLACK_BYTES
    if int(request.headers.get("content-length", 0)) > limit:
        raise PayloadTooLargeError(f"file: larger than the limit of {MAX_FILE_BYTES} bytes", param="file")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise MediaTypeError("the body must be multipart/form-data, with the fields 'file' and 'purpose'")
    parser = MultiPartParser(request.headers, _chunks(request.stream(), limit), max_files=1, max_fields=8)
    try:
        form = await parser.parse()
    except _DisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except _TooLargeError as error:
        raise PayloadTooLargeError(f"file: larger than the limit of {MAX_FILE_BYTES} bytes", param="file") from error
    except (MultiPartException, FormParserError, KeyError) as error:
        raise InvalidRequestError(f"the body is not valid multipart: {error}") from error
    try:
        file = form.get("file")
        if form.get("purpose") != "batch":
            raise InvalidRequestError("purpose: must be batch", param="purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequestError("file: the file is missing", param="file")
        record = await services.store.call(
            runner.storage.add_file,
            file.file,
            tenant=caller.tenant,
            filename=file.filename or "file.jsonl",
            purpose="batch",
            limit=MAX_FILE_BYTES,
        )
    finally:
        await form.close()
    return Response(FileBody.of(record).model_dump_json(), media_type="application/json")


@router.get("/files")
@Operation(scopes={Scope.GENERATE}, errors=(400,))
async def list_files(
    services: ServicesDep,
    caller: CallerDep,
    runner: RunnerDep,
    limit: Limit = 10_000,
    after: After = None,
    purpose: Purpose = None,
) -> FileList:
    """List the files, newest first."""
    found = await services.store.call(runner.storage.files, caller.tenant)
    mine = [record for record in found if purpose in (None, record.purpose)]
    page, has_more = _page(mine, limit, after)
    data = [FileBody.of(record) for record in page]
    first, last = _ends(page)
    return FileList(data=data, has_more=has_more, first_id=first, last_id=last)


@router.get("/files/{file_id}")
@Operation(scopes={Scope.GENERATE}, errors=(404,))
async def get_file(file_id: FileId, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> FileBody:
    """Get the record of a file."""
    return FileBody.of(await services.store.call(runner.storage.file, file_id, caller.tenant))


@router.get(
    "/files/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}}}},
)
@Operation(scopes={Scope.GENERATE}, errors=(404,))
async def get_content(file_id: FileId, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> Response:
    """Download a file."""
    path = await services.store.call(runner.storage.content, file_id, caller.tenant)
    return FileResponse(path, media_type="application/jsonl")


@router.delete("/files/{file_id}")
@Operation(scopes={Scope.GENERATE}, errors=(400, 404))
async def delete_file(file_id: FileId, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> FileDeleted:
    """Delete a file; the input of a batch only when the batch is over."""
    await services.store.call(runner.storage.delete_file, file_id, caller.tenant)
    return FileDeleted(id=file_id, deleted=True)


@router.post("/batches", dependencies=[Depends(require_json)])
@Operation(
    scopes={Scope.GENERATE},
    errors=(404,),
    quota=Quota.REQUESTS,
    example={"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"},
)
async def create_batch(body: NewBatch, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> BatchBody:
    """Answer all requests of a file, in the service tier `batch`."""
    await services.store.call(runner.storage.file, body.input_file_id, caller.tenant)
    now = int(time.time())
    record = BatchRecord(
        id=f"batch-{secrets.token_hex(16)}",
        tenant=caller.tenant,
        key=caller.name,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        status="validating",
        created_at=now,
        expires_at=now + WINDOW_SECONDS,
        metadata=body.metadata or {},
    )
    await runner.add(record)
    return BatchBody.of(record)


@router.get("/batches")
@Operation(scopes={Scope.GENERATE}, errors=(400,))
async def list_batches(
    services: ServicesDep, caller: CallerDep, runner: RunnerDep, limit: Limit = 20, after: After = None
) -> BatchList:
    """List the batches, newest first."""
    found = await services.store.call(runner.storage.batches, caller.tenant)
    page, has_more = _page(found, limit, after)
    data = [BatchBody.of(runner.current(record)) for record in page]
    first, last = _ends(page)
    return BatchList(data=data, has_more=has_more, first_id=first, last_id=last)


@router.get("/batches/{batch_id}")
@Operation(scopes={Scope.GENERATE}, errors=(404,))
async def get_batch(batch_id: BatchId, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> BatchBody:
    """Get a batch, with its progress."""
    record = await services.store.call(runner.storage.batch, batch_id, caller.tenant)
    return BatchBody.of(runner.current(record))


@router.post("/batches/{batch_id}/cancel")
@Operation(scopes={Scope.GENERATE}, errors=(404,))
async def cancel_batch(batch_id: BatchId, services: ServicesDep, caller: CallerDep, runner: RunnerDep) -> BatchBody:
    """End a batch early; the answers so far become its output."""
    record = await services.store.call(runner.storage.batch, batch_id, caller.tenant)
    return BatchBody.of(await runner.cancel(record))


class _TooLargeError(MultiPartException):
    """The upload is too large. The parser closes its files on errors of this base class only."""


class _DisconnectedError(MultiPartException):
    """The client has disconnected."""


async def _chunks(stream: AsyncIterator[bytes], limit: int) -> AsyncGenerator[bytes, None]:
    """The bytes of an upload, at most ``limit``, with errors that the parser knows."""
    try:
        async for chunk in bounded(stream, limit):
            yield chunk
    except PayloadTooLargeError as error:
        raise _TooLargeError(error.message) from error
    except ClientDisconnect as error:
        raise _DisconnectedError("the client has disconnected") from error


def _page(records: Sequence[Record], limit: int, after: str | None) -> tuple[Sequence[Record], bool]:
    """The records after the one with the id ``after``, at most ``limit``; and whether there are more."""
    first = 0
    if after is not None:
        places = [place for place, record in enumerate(records) if record.id == after]
        if not places:
            raise InvalidRequestError(f"after: there is no {after[:100]!r}", param="after")
        first = places[0] + 1
    return records[first : first + limit], len(records) > first + limit


def _ends(page: Sequence[FileRecord] | Sequence[BatchRecord]) -> tuple[str | None, str | None]:
    """The ids of the first and the last record."""
    return (page[0].id, page[-1].id) if page else (None, None)
