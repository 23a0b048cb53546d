"""The routes of soft prompts: upload, look up, point aliases, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator, BaseModel, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from prompt_store.errors import PromptStoreError
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, PromptRef, PromptSummary, PromptVersion, check_name
from server.api.deps import ServicesDep, require_json
from server.api.multipart import UploadParser, discard_rest, gathered
from server.api.protocol import RequestBody
from server.api.store_threads import StoreThreads
from server.errors import InvalidRequestError, NotFoundError, PayloadTooLargeError, ServerError

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"])

_UPLOAD_SLACK_BYTES = 8 * 1024 * 1024
"""What an upload may hold besides its files: text fields and boundaries."""


def _name(text: str) -> str:
    return check_name(text, "name")


def _alias(text: str) -> str:
    return check_name(text, "alias")


PromptId = Annotated[str, Path(alias="id"), AfterValidator(_name)]
Alias = Annotated[str, AfterValidator(_alias)]
VersionNumber = Annotated[int, Path(ge=1, lt=2**63)]


class FileBody(BaseModel):
    """One stored file; ``size`` is in bytes."""

    filename: str
    sha256: str
    size: int


class VersionBody(BaseModel):
    """One immutable version of a soft prompt."""

    object: str = "prompt.version"
    id: str = Field(description="The soft prompt's name.")
    version: int
    digest: str = Field(description="sha256 over the version's files.")
    peft_type: str
    task_type: str
    num_virtual_tokens: int
    num_tasks: int | None = Field(description="Tasks of a multitask prompt; null for all others.")
    num_labels: int | None = Field(description="Labels of the classification head that comes with it, if any.")
    dtype: str
    base_model_name_or_path: str | None
    files: list[FileBody]
    size: int = Field(description="Bytes of all files.")
    created_at: int = Field(description="Unix seconds.")
    description: str
    tags: list[str]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, version: PromptVersion) -> VersionBody:
        """The catalog's record as the API shows it."""
        return cls(
            id=version.name,
            version=version.version,
            digest=version.digest,
            peft_type=version.peft_type.value,
            task_type=version.task_type,
            num_virtual_tokens=version.num_virtual_tokens,
            num_tasks=version.num_tasks,
            num_labels=version.num_labels,
            dtype=version.dtype,
            base_model_name_or_path=version.base_model_name_or_path,
            files=[FileBody(filename=file.filename, sha256=file.sha256, size=file.size) for file in version.files],
            size=version.size,
            created_at=int(version.created_at.timestamp()),
            description=version.description,
            tags=list(version.tags),
            metadata=dict(version.metadata),
        )


class PromptBody(BaseModel):
    """A soft prompt: its aliases and the version that its bare name means."""

    object: str = "prompt"
    id: str
    aliases: dict[str, int]
    num_versions: int
    latest: VersionBody

    @classmethod
    def of(cls, summary: PromptSummary) -> PromptBody:
        """The catalog's summary as the API shows it."""
        return cls(
            id=summary.name,
            aliases=dict(summary.aliases),
            num_versions=summary.num_versions,
            latest=VersionBody.of(summary.latest),
        )


class PromptList(BaseModel):
    """A page of soft prompts by name; ``last_id`` is the next page's ``after``."""

    object: str = "list"
    data: list[PromptBody]
    has_more: bool
    last_id: str | None


class VersionList(BaseModel):
    """All versions of one soft prompt."""

    object: str = "list"
    data: list[VersionBody]


class AliasBody(RequestBody):
    """Where an alias is to point."""

    version: int = Field(ge=1, lt=2**63)
    expected_version: int | None = Field(None, ge=1, lt=2**63, description="409 unless the alias points there now.")


class AliasReply(BaseModel):
    """Where an alias points."""

    object: str = "prompt.alias"
    id: str
    alias: str
    version: int


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str
    deleted: bool = True


class _LeasedWeights(FileResponse):
    """A weights file straight from the store's directory, leased while it is sent: it may be too large for memory."""

    def __init__(self, threads: StoreThreads, ref: PromptRef, *, sha256: str) -> None:
        super().__init__("", headers=_file_headers(WEIGHTS_FILE, sha256), media_type="application/octet-stream")
        self._threads = threads
        self._ref = ref

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or the part of it that was asked for."""
        async with self._threads.lease(self._ref) as leased:
            self.path = leased.weights_path
            await super().__call__(scope, receive, send)


def _file_headers(filename: str, sha256: str) -> dict[str, str]:
    return {"etag": f'"{sha256}"', "content-disposition": f'attachment; filename="{filename}"'}


@router.post(
    "",
    status_code=201,
    response_model=VersionBody,
    responses={200: {"model": VersionBody, "description": "The same bytes are a version already"}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["id", "files"],
                        "properties": {
                            "id": {"type": "string"},
                            "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                            "alias": {"type": "string"},
                            "description": {"type": "string"},
                            "tags": {"type": "array", "items": {"type": "string"}},
                            "metadata": {"type": "string", "description": "A JSON object"},
                        },
                    }
                }
            },
        }
    },
)
async def upload_prompt(request: Request, services: ServicesDep) -> Response:
    """Publish a PEFT directory's two files as the next version of a name; 200 where that version exists already."""
    base = services.base_spec
    limit = 2 * services.settings.store.max_upload_bytes + _UPLOAD_SLACK_BYTES
    if int(request.headers.get("content-length", 0)) > limit:
        raise PayloadTooLargeError(f"the upload is over the limit of {limit} bytes")
    threads, store = services.store, services.store.store
    with store.upload() as upload:  # makes and removes a directory; its files are written in the pool
        parser = UploadParser(request.headers.get("content-type", ""), upload.open)
        stream = request.stream()
        try:
            async for data in gathered(stream):
                await threads.call(parser.feed, data)
            fields = parser.fields()
        except ClientDisconnect:
            return Response(status_code=499)
        except (ServerError, PromptStoreError):
            await discard_rest(stream)
            raise
        try:
            version, created = await threads.call(
                store.publish,
                upload,
                name=fields.name,
                base=base,
                require_same_base=services.settings.store.require_same_base,
                alias=fields.alias,
                description=fields.description,
                tags=fields.tags,
                metadata=fields.metadata,
                reserved_names=(services.base_name,),
            )
        except ValueError as error:  # its form was checked already; it is the base's own name
            raise InvalidRequestError(f"id: {error}", param="id") from error
    body = VersionBody.of(version).model_dump(mode="json")
    return JSONResponse(body, 201 if created else 200)


@router.get("")
async def list_prompts(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, AfterValidator(lambda name: name and _name(name))] = None,
    tag: str | None = None,
) -> PromptList:
    """A page of soft prompts, by name."""
    store = services.store.store
    summaries, has_more = await services.store.call(store.list_prompts, limit=limit, after=after, tag=tag)
    data = [PromptBody.of(summary) for summary in summaries]
    return PromptList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{id}")
async def get_prompt(name: PromptId, services: ServicesDep) -> PromptBody:
    """One soft prompt."""
    return PromptBody.of(await services.store.call(services.store.store.get_prompt, name))


@router.delete("/{id}")
async def delete_prompt(name: PromptId, services: ServicesDep) -> Deleted:
    """Delete all versions and aliases of a name; requests under way keep theirs until they end."""
    await services.store.call(services.store.store.delete_prompt, name)
    return Deleted(id=name, object="prompt")


@router.get("/{id}/versions")
async def list_versions(name: PromptId, services: ServicesDep) -> VersionList:
    """All versions of a name."""
    versions = await services.store.call(services.store.store.list_versions, name)
    return VersionList(data=[VersionBody.of(version) for version in versions])


@router.get("/{id}/versions/{version}")
async def get_version(name: PromptId, version: VersionNumber, services: ServicesDep) -> VersionBody:
    """One version."""
    ref = PromptRef(name, version=version, alias=None)
    return VersionBody.of(await services.store.call(services.store.store.resolve, ref))


@router.get("/{id}/versions/{version}/files/{filename}", response_class=Response)
async def get_file(name: PromptId, version: VersionNumber, filename: str, services: ServicesDep) -> Response:
    """One file of a version, byte for byte as it was uploaded."""
    threads, ref = services.store, PromptRef(name, version=version, alias=None)
    found = await threads.call(threads.store.resolve, ref)
    file = found.file(filename)
    if file is None:
        raise NotFoundError(f"a version has {CONFIG_FILE} and {WEIGHTS_FILE}, and no file {filename[:100]!r}")
    if filename == WEIGHTS_FILE:
        return _LeasedWeights(threads, ref, sha256=file.sha256)
    data = await threads.call(threads.store.read_file, name, version, filename)
    return Response(data, headers=_file_headers(filename, file.sha256), media_type="application/json")


@router.delete("/{id}/versions/{version}")
async def delete_version(name: PromptId, version: VersionNumber, services: ServicesDep) -> Deleted:
    """Delete one version; requests under way keep it until they end."""
    await services.store.call(services.store.store.delete_version, name, version)
    return Deleted(id=f"{name}@{version}", object="prompt.version")


@router.put("/{id}/aliases/{alias}", dependencies=[Depends(require_json)])
async def set_alias(name: PromptId, alias: Alias, body: AliasBody, services: ServicesDep) -> AliasReply:
    """Point an alias at a version, for promoting and rolling back."""
    await services.store.call(
        services.store.store.set_alias, name, alias, body.version, expected_version=body.expected_version
    )
    return AliasReply(id=name, alias=alias, version=body.version)


@router.delete("/{id}/aliases/{alias}")
async def delete_alias(name: PromptId, alias: Alias, services: ServicesDep) -> Deleted:
    """Delete an alias; its version stays."""
    await services.store.call(services.store.store.delete_alias, name, alias)
    return Deleted(id=f"{name}@{alias}", object="prompt.alias")
