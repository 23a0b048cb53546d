"""The routes of soft prompts: upload, read, move aliases, delete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from prompt_store.changes import HistoryAction
from prompt_store.errors import PromptStoreError
from prompt_store.rollouts import NO_ROLLOUT
from prompt_store.types import (
    CONFIG_FILE,
    DEFAULT_ALIAS,
    SHARED,
    WEIGHTS_FILE,
    Access,
    PromptKind,
    PromptRef,
    PromptSummary,
    PromptVersion,
    check_name,
)
from prompt_store.use import Use
from server.api.http.disconnect import CLIENT_CLOSED_REQUEST
from server.api.http.multipart import UploadParser, bounded, discard_rest, gathered
from server.api.keys.callers import CallerDep, Scope
from server.api.operations import Operation, Quota
from server.api.prompts.acting import ActingDep, ReasonQuery
from server.api.prompts.bodies import (
    AliasBody,
    AliasReply,
    Deleted,
    DeletedVersions,
    HistoryBody,
    HistoryList,
    PromptBody,
    PromptList,
    PromptUsage,
    RestoreBody,
    Restored,
    RollbackBody,
    RolloutBody,
    SearchQuery,
    VersionBody,
    VersionList,
    WarmBody,
    WarmReply,
)
from server.api.prompts.dry_run import DryRun, dry_run
from server.api.prompts.publishing import check, publish
from server.api.prompts.upload_form import ReadForm, UploadForm
from server.api.prompts.uploaded import UploadedVersion, uploaded
from server.api.request_body import require_json, require_json_or_nothing
from server.api.services import Services, ServicesDep, require_ready
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.residency import Residency, residency_of
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
Kind = Annotated[
    PromptKind | None, Query(description="Return only names with a version of this kind.", examples=["adapter"])
]

IncludeResidency = Annotated[
    Literal["residency"] | None, Query(description="`residency` adds where it lies on this server.")
]
Force = Annotated[bool, Query(description="Delete it even if aliases point at it, or it has several versions.")]


class _LeasedWeights(FileResponse):
    """A weights file sent from disk, leased meanwhile, because it may be too large for memory."""

    def __init__(self, store: AsyncPromptStore, ref: PromptRef, access: Access, *, sha256: str) -> None:
        super().__init__("", headers=_file_headers(WEIGHTS_FILE, sha256), media_type="application/octet-stream")
        self._store = store
        self._ref = ref
        self._access = access

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


async def _version_bodies(
    services: Services, versions: Sequence[PromptVersion], include: str | None
) -> list[VersionBody]:
    lie = await residency_of(services.engine, services.store, versions) if include else [None] * len(versions)
    return [
        VersionBody.of(version, pinned=services.warmer.is_pinned(version), residency=residency)
        for version, residency in zip(versions, lie, strict=True)
    ]


def _prompt_body(
    services: Services, summary: PromptSummary, use: Use | None = None, residency: Residency | None = None
) -> PromptBody:
    pinned = services.warmer.pinned_versions(summary.name)
    usage = None if use is None else PromptUsage.of(use, services.usage.p95_seconds(summary.name))
    return PromptBody.of(summary, pinned=pinned, usage=usage, residency=residency)


def _file_headers(filename: str, sha256: str) -> dict[str, str]:
    return {"etag": f'"{sha256}"', "content-disposition": f'attachment; filename="{filename}"'}


@router.post(
    "",
    status_code=201,
    response_model=UploadedVersion,
    responses={
        200: {
            "model": UploadedVersion | DryRun,
            "description": "A version with the same files exists already; it was edited. Or what would be stored, "
            "with `dry_run`",
        }
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": UploadForm.schema_with_files()}},
        }
    },
)
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(409, 503), quota=Quota.REQUESTS, is_upload=True)
async def upload_prompt(request: Request, services: ServicesDep, acting: ActingDep) -> Response:
    """Upload the two files of a PEFT directory as the next version of a soft prompt or an adapter."""
    services.require_ready()  # because the model tries the files
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
            read = ReadForm.read(parser.texts())
            if read.form is not None and read.form.shared and not acting.caller.access.changes(SHARED):
                raise PermissionDeniedError("shared: requires an API key with the scope admin", scopes=["admin"])
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except (ServerError, PromptStoreError):
            await discard_rest(stream)
            raise
        form, checked = await check(services, upload, read)
        if form.dry_run:
            found = await dry_run(services, upload, checked, form, acting.caller)
            return JSONResponse(found.model_dump(mode="json"))
        version, created = await publish(services, upload, checked, form, acting)
    body = await uploaded(services, acting, version, form, is_new=created)
    return JSONResponse(body.model_dump(mode="json"), 201 if created else 200)


@router.get("")
@Operation(scopes={Scope.PROMPTS_READ})
async def list_prompts(
    services: ServicesDep,
    acting: ActingDep,
    wanted: Annotated[SearchQuery, Depends()],
    limit: Limit = 20,
    after: After = None,
    tag: Tag = None,
    kind: Kind = None,
    unused_for: Annotated[
        int | None,
        Query(ge=1, le=2**36, description="Return only those not published or used for this number of seconds."),
    ] = None,
    include: Annotated[
        tuple[Literal["usage", "residency"], ...],
        Query(
            description="`usage` adds the use of each, `residency` where its latest version lies; may be repeated."
        ),
    ] = (),
) -> PromptList:
    """A page of soft prompts and adapters, by name or in another order."""
    since = None if unused_for is None else (int(time.time()) - unused_for) * 1_000_000
    store = services.store
    if wanted.is_plain:
        summaries, has_more = await store.list_prompts(
            limit=limit, after=after, tag=tag, kind=kind, access=acting.access, unused_since=since
        )
    else:
        search = wanted.search(limit=limit, after=after, tag=tag, kind=kind, unused_since=since)
        try:
            summaries, has_more = await store.call(store.registry.search, search, acting.access)
        except ValueError as error:
            raise InvalidRequestError(str(error), param="after") from error
    await acting.has_listed(summary.latest.owner for summary in summaries)
    uses: dict[str, Use] = {}
    if "usage" in include:
        names = [summary.name for summary in summaries]
        found = await services.store.call(services.store.registry.usage_of, names, acting.access)
        uses = {name: use + services.usage.pending_of(name) for name, use in found.items()}
    lie: dict[str, Residency] = {}
    if "residency" in include:
        latest = [summary.latest for summary in summaries]
        found_residency = await residency_of(services.engine, services.store, latest)
        lie = {version.name: where for version, where in zip(latest, found_residency, strict=True)}
    data = [_prompt_body(services, summary, uses.get(summary.name), lie.get(summary.name)) for summary in summaries]
    return PromptList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{id}")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def get_prompt(name: PromptId, services: ServicesDep, acting: ActingDep) -> PromptBody:
    """Get a soft prompt."""
    summary = await services.store.get_prompt(name, acting.access)
    await acting.has_read(name, summary.latest.owner, "prompt")
    return _prompt_body(services, summary)


@router.delete("/{id}")
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503))
async def delete_prompt(
    name: PromptId, services: ServicesDep, acting: ActingDep, force: Force = False, reason: ReasonQuery = None
) -> DeletedVersions:
    """Delete a soft prompt with all versions and aliases; more than one version only with `force=true`.

    Running requests finish with their version. The deletion can be undone for a time.
    """
    store = services.store
    deletion = await store.delete_prompt(name, force=force, actor=acting.actor(reason), access=acting.access)
    acting.changed(HistoryAction.DELETE_PROMPT, name)
    await services.warmer.forget(name)
    return DeletedVersions.of(name, deletion, object_="prompt", until=store.restorable_until(deletion))


@router.post("/{id}/restore", dependencies=[Depends(require_json_or_nothing)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503), example={"version": 1})
async def restore_prompt(
    name: PromptId, services: ServicesDep, acting: ActingDep, body: RestoreBody | None = None
) -> Restored:
    """Bring back a deleted version, or all that the last deletion has deleted, with the aliases.

    An alias that exists again is not moved.
    """
    version = None if body is None else body.version
    restoration = await services.store.restore(name, version, actor=acting.actor(), access=acting.access)
    acting.changed(HistoryAction.RESTORE, name, version=version)
    for alias in restoration.aliases:
        services.warmer.promoted(name, alias)
    return Restored.of(name, restoration)


@router.get("/{id}/versions")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def list_versions(
    name: PromptId,
    services: ServicesDep,
    acting: ActingDep,
    limit: Limit = 100,
    before: Before = None,
    include: IncludeResidency = None,
) -> VersionList:
    """List the versions of a soft prompt, newest first."""
    versions, has_more = await services.store.list_versions(name, limit=limit, before=before, access=acting.access)
    if versions:
        await acting.has_read(name, versions[0].owner, "versions")
    data = await _version_bodies(services, versions, include)
    return VersionList(data=data, has_more=has_more, last_id=data[-1].version if data else None)


@router.get("/{id}/history")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def list_history(
    name: PromptId, services: ServicesDep, acting: ActingDep, limit: Limit = 100, before: Before = None
) -> HistoryList:
    """List the changes of a soft prompt, newest first. The history remains after deletion."""
    entries, has_more = await services.store.list_history(name, limit=limit, before=before, access=acting.access)
    data = [HistoryBody.of(entry) for entry in entries]
    return HistoryList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{id}/versions/{version}")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def get_version(
    name: PromptId,
    version: VersionNumber,
    services: ServicesDep,
    acting: ActingDep,
    include: IncludeResidency = None,
) -> VersionBody:
    """Get a version."""
    found = await services.store.resolve(PromptRef(name, version=version, alias=None), acting.access)
    await acting.has_read(name, found.owner, "version", version=version)
    (body,) = await _version_bodies(services, [found], include)
    return body


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
    name: PromptId, version: VersionNumber, filename: Filename, services: ServicesDep, acting: ActingDep
) -> Response:
    """Download a file of a version, exactly as it was uploaded."""
    store, ref = services.store, PromptRef(name, version=version, alias=None)
    found = await store.resolve(ref, acting.access)
    file = found.file(filename)
    if file is None:
        raise NotFoundError(f"a version has only {CONFIG_FILE} and {WEIGHTS_FILE}, not {filename[:100]!r}")
    await acting.has_read(name, found.owner, filename, version=version)
    if filename == WEIGHTS_FILE:
        return _LeasedWeights(store, ref, acting.access, sha256=file.sha256)
    data = await store.read_file(name, version, filename, acting.access)
    return Response(data, headers=_file_headers(filename, file.sha256), media_type="application/json")


@router.delete("/{id}/versions/{version}")
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503))
async def delete_version(
    name: PromptId,
    version: VersionNumber,
    services: ServicesDep,
    acting: ActingDep,
    force: Force = False,
    reason: ReasonQuery = None,
) -> DeletedVersions:
    """Delete a version; one that an alias points at only with `force=true`, which deletes the alias too.

    Running requests finish with it. The deletion can be undone for a time.
    """
    store = services.store
    actor = acting.actor(reason)
    deletion = await store.delete_version(name, version, force=force, actor=actor, access=acting.access)
    acting.changed(HistoryAction.DELETE_VERSION, name, version=version)
    await services.warmer.forget(name, version)
    return DeletedVersions.of(
        f"{name}@{version}", deletion, object_="prompt.version", until=store.restorable_until(deletion)
    )


@router.put("/{id}/aliases/{alias}", dependencies=[Depends(require_json)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503), example={"version": 1})
async def set_alias(
    name: PromptId, alias: Alias, body: AliasBody, services: ServicesDep, acting: ActingDep
) -> AliasReply:
    """Point an alias at a version, and start, change or end its rollout, in one step."""
    await services.store.set_alias(
        name,
        alias,
        body.version,
        expected_version=body.expected_version,
        expected_rollout=body.expected,
        actor=acting.actor(body.reason),
        access=acting.access,
        rollout=body.rollout,
    )
    rolls_out = body.rollout != NO_ROLLOUT
    action = HistoryAction.ROLLOUT if rolls_out else HistoryAction.PROMOTE
    acting.changed(action, name, version=body.version, alias=alias)
    services.warmer.promoted(name, alias)
    rollout = RolloutBody.of(body.rollout) if rolls_out else None
    return AliasReply(id=name, alias=alias, version=body.version, rollout=rollout)


@router.post("/{id}/aliases/{alias}/rollback", dependencies=[Depends(require_json)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 409, 503), example={})
async def rollback(
    name: PromptId, alias: Alias, body: RollbackBody, services: ServicesDep, acting: ActingDep
) -> AliasReply:
    """End the canaries of an alias, or else point it back at the version before its last promotion.

    Repeat it to go further back.
    """
    version = await services.store.rollback(
        name,
        alias,
        expected_version=body.expected_version,
        expected_rollout=body.expected,
        actor=acting.actor(body.reason),
        access=acting.access,
    )
    acting.changed(HistoryAction.ROLLBACK, name, version=version, alias=alias)
    services.warmer.promoted(name, alias)
    return AliasReply(id=name, alias=alias, version=version, rollout=None)


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
        warmed = await services.warmer.warm_for_caller(ref, task_id=body.task_id, pin=bool(body.pin))
    return WarmReply(
        id=name,
        version=warmed.version.version,
        task_ids=None if warmed.task_ids is None else list(warmed.task_ids),
        pinned=services.warmer.is_pinned(warmed.version),
        seconds=warmed.seconds,
    )


@router.delete("/{id}/aliases/{alias}")
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 503))
async def delete_alias(
    name: PromptId, alias: Alias, services: ServicesDep, acting: ActingDep, reason: ReasonQuery = None
) -> Deleted:
    """Delete an alias; the version remains."""
    await services.store.delete_alias(name, alias, actor=acting.actor(reason), access=acting.access)
    acting.changed(HistoryAction.DELETE_ALIAS, name, alias=alias)
    return Deleted(id=f"{name}@{alias}", object="prompt.alias")
