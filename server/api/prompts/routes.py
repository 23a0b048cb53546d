"""The routes of soft prompts: upload, read, move aliases, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from prompt_store.checking import check_upload
from prompt_store.errors import PromptStoreError
from prompt_store.types import (
    CONFIG_FILE,
    DEFAULT_ALIAS,
    SHARED,
    WEIGHTS_FILE,
    PromptRef,
    PromptSummary,
    PromptVersion,
    check_name,
)
from server.api.http.disconnect import CLIENT_CLOSED_REQUEST
from server.api.http.multipart import UploadParser, bounded, discard_rest, gathered
from server.api.keys.callers import Caller, CallerDep, Scope
from server.api.operations import Operation, Quota
from server.api.prompts.bodies import (
    AliasBody,
    AliasReply,
    Deleted,
    DeletedVersions,
    HistoryBody,
    HistoryList,
    PromptBody,
    PromptList,
    RestoreBody,
    Restored,
    RollbackBody,
    VersionBody,
    VersionList,
    WarmBody,
    WarmReply,
)
from server.api.prompts.probing import probe
from server.api.prompts.upload_form import UploadForm
from server.api.services import Services, ServicesDep, require_json, require_json_or_nothing, require_ready
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.errors import InvalidRequestError, NotFoundError, PayloadTooLargeError, PermissionDeniedError, ServerError

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"])

_UPLOAD_SLACK_BYTES = 8 * 1024 * 1024
"""Size of an upload besides its weights: the configuration, text fields and boundaries."""

_FILE_CONTENT: dict[str, Any] = {
    "application/json": {"schema": {"type": "object"}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}


PromptId = Annotated[
    str,
    Path(alias="id", description="The soft prompt's name.", examples=["sentiment"]),
    AfterValidator(lambda text: check_name(text, "name")),
]
Alias = Annotated[
    str,
    Path(description="An alias; a bare name means `latest`.", examples=["latest"]),
    AfterValidator(lambda text: check_name(text, "alias")),
]
VersionNumber = Annotated[int, Path(ge=1, lt=2**63, description="A version number, from 1.", examples=[1])]
Filename = Annotated[
    str,
    Path(description=f"`{CONFIG_FILE}` or `{WEIGHTS_FILE}`.", examples=[CONFIG_FILE]),
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Maximum number of entries per page.")]
Before = Annotated[int | None, Query(ge=1, lt=2**63, description="Return entries below this number.")]
After = Annotated[
    str | None,
    Query(description="Return entries after this name."),
    AfterValidator(lambda name: name and check_name(name, "name")),
]
Tag = Annotated[
    str | None,
    Query(description="Return only entries with this tag."),
    AfterValidator(lambda tag: tag and check_name(tag, "tag")),
]

Force = Annotated[bool, Query(description="Delete it even if aliases point at it, or it has several versions.")]


class _LeasedWeights(FileResponse):
    """A weights file sent from disk, leased meanwhile, because it may be too large for memory."""

    def __init__(self, store: AsyncPromptStore, ref: PromptRef, caller: Caller, *, sha256: str) -> None:
        super().__init__("", headers=_file_headers(WEIGHTS_FILE, sha256), media_type="application/octet-stream")
        self._store = store
        self._ref = ref
        self._access = caller.access

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Send the file, or the requested range."""

        async def send_or_raise(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise HTTPException(message["status"], "the requested range is outside the file")
            await send(message)

        async with self._store.lease(self._ref, self._access) as leased:
            self.path = leased.weights_path
            await super().__call__(scope, receive, send_or_raise)


def ref_of(name: str, version: int | None, alias: str | None) -> PromptRef:
    """The version or alias that a request names; default: the alias latest.

    Raises:
        InvalidRequestError: If it names both.
    """
    if version is not None and alias is not None:
        raise InvalidRequestError("version: give a version or an alias, not both", param="version")
    if version is not None:
        return PromptRef(name, version=version, alias=None)
    return PromptRef(name, alias=alias or DEFAULT_ALIAS)


def _version_body(services: Services, version: PromptVersion) -> VersionBody:
    return VersionBody.of(version, pinned=services.warmer.is_pinned(version))


def _prompt_body(services: Services, summary: PromptSummary) -> PromptBody:
    return PromptBody.of(summary, pinned=services.warmer.pinned_versions(summary.name))


def _file_headers(filename: str, sha256: str) -> dict[str, str]:
    return {"etag": f'"{sha256}"', "content-disposition": f'attachment; filename="{filename}"'}


@router.post(
    "",
    status_code=201,
    response_model=VersionBody,
    responses={200: {"model": VersionBody, "description": "A version with the same files exists already"}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": UploadForm.schema_with_files()}},
        }
    },
)
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(409, 503), quota=Quota.REQUESTS, is_upload=True)
async def upload_prompt(request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """Upload the two files of a PEFT directory as the next version of a soft prompt."""
    services.require_ready()  # because the model tries the soft prompt
    base = services.base_spec
    limit = services.settings.store.max_upload_bytes + _UPLOAD_SLACK_BYTES
    if int(request.headers.get("content-length", 0)) > limit:
        raise PayloadTooLargeError(f"the upload exceeds the limit of {limit} bytes")
    store = services.store
    with store.upload() as upload:  # makes and removes a directory; its files are written in threads
        parser = UploadParser(request.headers.get("content-type", ""), upload.open, UploadForm.model_fields)
        stream = request.stream()
        try:
            async for data in gathered(bounded(stream, limit)):
                await store.call(parser.feed, data)
            form = UploadForm.parse(parser.texts())
            if form.shared and not caller.access.changes(SHARED):
                raise PermissionDeniedError("shared: requires an API key with the scope admin", scopes=["admin"])
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except (ServerError, PromptStoreError):
            await discard_rest(stream)
            raise
        checked = await store.call(
            check_upload,
            upload,
            base,
            require_same_base=not (services.settings.store.allow_other_base or form.allow_other_base),
            allow_float64=services.settings.store.allow_float64,
            task_type=form.task_type,
        )
        await probe(services, checked, upload.path(WEIGHTS_FILE), caller)
        try:
            version, created = await store.publish(
                upload,
                name=form.id,
                base=base,
                checked=checked,
                alias=form.alias,
                description=form.description,
                tags=form.tags,
                metadata=form.metadata,
                lineage=form.lineage,
                actor=caller.name,
                owner=SHARED if form.shared else caller.tenant,
                reserved_names=(services.base_name,),
            )
        except ValueError as error:  # the format was checked already: it is the name of the base model
            raise InvalidRequestError(f"id: {error}", param="id") from error
    services.warmer.promoted(form.id, form.alias)
    body = _version_body(services, version).model_dump(mode="json")
    return JSONResponse(body, 201 if created else 200)


@router.get("")
@Operation(scopes={Scope.PROMPTS_READ})
async def list_prompts(
    services: ServicesDep,
    caller: CallerDep,
    limit: Limit = 20,
    after: After = None,
    tag: Tag = None,
) -> PromptList:
    """A page of soft prompts, by name."""
    summaries, has_more = await services.store.list_prompts(limit=limit, after=after, tag=tag, access=caller.access)
    data = [_prompt_body(services, summary) for summary in summaries]
    return PromptList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{id}")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def get_prompt(name: PromptId, services: ServicesDep, caller: CallerDep) -> PromptBody:
    """Get a soft prompt."""
    return _prompt_body(services, await services.store.get_prompt(name, caller.access))


@router.delete("/{id}")
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503))
async def delete_prompt(
    name: PromptId, services: ServicesDep, caller: CallerDep, force: Force = False
) -> DeletedVersions:
    """Delete a soft prompt with all versions and aliases; more than one version only with `force=true`.

    Running requests finish with their version. The deletion can be undone for a time.
    """
    store = services.store
    deletion = await store.delete_prompt(name, force=force, actor=caller.name, access=caller.access)
    await services.warmer.forget(name)
    return DeletedVersions.of(name, deletion, object_="prompt", until=store.restorable_until(deletion))


@router.post("/{id}/restore", dependencies=[Depends(require_json_or_nothing)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503), example={"version": 1})
async def restore_prompt(
    name: PromptId, services: ServicesDep, caller: CallerDep, body: RestoreBody | None = None
) -> Restored:
    """Bring back a deleted version, or all that the last deletion has deleted, with the aliases.

    An alias that exists again is not moved.
    """
    version = None if body is None else body.version
    restoration = await services.store.restore(name, version, actor=caller.name, access=caller.access)
    for alias in restoration.aliases:
        services.warmer.promoted(name, alias)
    return Restored.of(name, restoration)


@router.get("/{id}/versions")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def list_versions(
    name: PromptId, services: ServicesDep, caller: CallerDep, limit: Limit = 100, before: Before = None
) -> VersionList:
    """List the versions of a soft prompt, newest first."""
    versions, has_more = await services.store.list_versions(name, limit=limit, before=before, access=caller.access)
    data = [_version_body(services, version) for version in versions]
    return VersionList(data=data, has_more=has_more, last_id=data[-1].version if data else None)


@router.get("/{id}/history")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def list_history(
    name: PromptId, services: ServicesDep, caller: CallerDep, limit: Limit = 100, before: Before = None
) -> HistoryList:
    """List the changes of a soft prompt, newest first. The history remains after deletion."""
    entries, has_more = await services.store.list_history(name, limit=limit, before=before, access=caller.access)
    data = [HistoryBody.of(entry) for entry in entries]
    return HistoryList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{id}/versions/{version}")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def get_version(
    name: PromptId, version: VersionNumber, services: ServicesDep, caller: CallerDep
) -> VersionBody:
    """Get a version."""
    ref = PromptRef(name, version=version, alias=None)
    return _version_body(services, await services.store.resolve(ref, caller.access))


@router.get(
    "/{id}/versions/{version}/files/{filename}",
    response_class=Response,
    responses={
        200: {"content": _FILE_CONTENT},
        206: {"description": "The requested range.", "content": _FILE_CONTENT},
    },
)
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 416, 503))
async def get_file(
    name: PromptId, version: VersionNumber, filename: Filename, services: ServicesDep, caller: CallerDep
) -> Response:
    """Download a file of a version, exactly as it was uploaded."""
    store, ref = services.store, PromptRef(name, version=version, alias=None)
    found = await store.resolve(ref, caller.access)
    file = found.file(filename)
    if file is None:
        raise NotFoundError(f"a version has only {CONFIG_FILE} and {WEIGHTS_FILE}, not {filename[:100]!r}")
    if filename == WEIGHTS_FILE:
        return _LeasedWeights(store, ref, caller, sha256=file.sha256)
    data = await store.read_file(name, version, filename, caller.access)
    return Response(data, headers=_file_headers(filename, file.sha256), media_type="application/json")


@router.delete("/{id}/versions/{version}")
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503))
async def delete_version(
    name: PromptId, version: VersionNumber, services: ServicesDep, caller: CallerDep, force: Force = False
) -> DeletedVersions:
    """Delete a version; one that an alias points at only with `force=true`, which deletes the alias too.

    Running requests finish with it. The deletion can be undone for a time.
    """
    store = services.store
    deletion = await store.delete_version(name, version, force=force, actor=caller.name, access=caller.access)
    await services.warmer.forget(name, version)
    return DeletedVersions.of(
        f"{name}@{version}", deletion, object_="prompt.version", until=store.restorable_until(deletion)
    )


@router.put("/{id}/aliases/{alias}", dependencies=[Depends(require_json)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503), example={"version": 1})
async def set_alias(
    name: PromptId, alias: Alias, body: AliasBody, services: ServicesDep, caller: CallerDep
) -> AliasReply:
    """Point an alias at a version."""
    await services.store.set_alias(
        name,
        alias,
        body.version,
        expected_version=body.expected_version,
        actor=caller.name,
        access=caller.access,
    )
    services.warmer.promoted(name, alias)
    return AliasReply(id=name, alias=alias, version=body.version)


@router.post("/{id}/aliases/{alias}/rollback", dependencies=[Depends(require_json)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503), example={})
async def rollback(
    name: PromptId, alias: Alias, body: RollbackBody, services: ServicesDep, caller: CallerDep
) -> AliasReply:
    """Point an alias back at the version before its last promotion; repeat to go further back."""
    version = await services.store.rollback(
        name,
        alias,
        expected_version=body.expected_version,
        actor=caller.name,
        access=caller.access,
    )
    services.warmer.promoted(name, alias)
    return AliasReply(id=name, alias=alias, version=version)


@router.post("/{id}/warm", dependencies=[Depends(require_ready), Depends(require_json_or_nothing)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 429, 503), quota=Quota.REQUESTS, example={"pin": False})
async def warm_prompt(
    name: PromptId, services: ServicesDep, caller: CallerDep, body: WarmBody | None = None
) -> WarmReply:
    """Load a soft prompt onto the device before its first request; optionally pin or unpin it."""
    body = body or WarmBody.model_validate({})
    ref = ref_of(name, body.version, body.alias)
    # It waits for files more than for its turn, so it tells nothing of how long a turn takes.
    with services.admission.permits(1, tenant=caller.tenant, waits=False):
        found = await services.store.resolve(ref, caller.access)
        if body.pin is not None and not caller.access.changes(found.owner):
            raise PermissionDeniedError(
                "pin: pinning a shared soft prompt requires the scope admin", scopes=["admin"]
            )
        if body.pin is False:
            version = await services.warmer.unpin(ref, task_id=body.task_id)
            pinned = services.warmer.is_pinned(version)
            return WarmReply(id=name, version=version.version, task_ids=None, pinned=pinned, seconds=0.0)
        warmed = await services.warmer.warm(ref, task_id=body.task_id, pin=bool(body.pin))
    return WarmReply(
        id=name,
        version=warmed.version.version,
        task_ids=None if warmed.task_ids is None else list(warmed.task_ids),
        pinned=services.warmer.is_pinned(warmed.version),
        seconds=warmed.seconds,
    )


@router.delete("/{id}/aliases/{alias}")
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 503))
async def delete_alias(name: PromptId, alias: Alias, services: ServicesDep, caller: CallerDep) -> Deleted:
    """Delete an alias; the version remains."""
    await services.store.delete_alias(name, alias, actor=caller.name, access=caller.access)
    return Deleted(id=f"{name}@{alias}", object="prompt.alias")
