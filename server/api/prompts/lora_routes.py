"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter`` in vLLM's format, for its sidecars.

They exist only with ``--adapter-dir``. An adapter becomes a version, as an uploaded one does.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, Field
from starlette.responses import PlainTextResponse

from prompt_store.changes import HistoryAction
from prompt_store.errors import AliasNotFoundError, PromptNotFoundError
from prompt_store.types import Access, PromptKind, PromptRef, PromptVersion, check_name
from server.api.keys.callers import Scope
from server.api.operations import Operation, Quota
from server.api.prompts.acting import ActingDep
from server.api.prompts.adapter_directory import FIELD, AdapterDirectory
from server.api.prompts.publishing import check_files, publish
from server.api.prompts.upload_form import UploadForm
from server.api.request_body import RequestBody, require_json
from server.api.services import Services, ServicesDep, require_ready
from server.errors import InvalidRequestError, NotFoundError

router = APIRouter(prefix="/v1", tags=["adapters"], dependencies=[Depends(require_ready), Depends(require_json)])

_PAGE = 200

LoraName = Annotated[
    str,
    AfterValidator(lambda text: check_name(text, "name")),
    Field(description="Name of the adapter, to send as `model`.", examples=["triage"]),
]


class LoadBody(RequestBody):
    """The adapter to load."""

    lora_name: LoraName
    lora_path: str = Field(
        description="A PEFT directory below `--adapter-dir`: absolute, or relative to it.", examples=["triage"]
    )
    load_inplace: bool = Field(
        False, description="Publish another version if the name exists with other files; requests then use it."
    )


class UnloadBody(RequestBody):
    """The adapter to unload."""

    lora_name: LoraName


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
@Operation(
    scopes={Scope.PROMPTS_WRITE},
    errors=(404, 409, 429, 503),
    quota=Quota.REQUESTS,
    example={"lora_name": "triage", "lora_path": "triage"},
)
async def load_lora_adapter(body: LoadBody, services: ServicesDep, acting: ActingDep) -> PlainTextResponse:
    """Publish an adapter from the server's `--adapter-dir`; 404 without this flag."""
    directory = _directory(services)
    store, form = services.store, UploadForm.parse({"id": [body.lora_name]})
    done = PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")
    with store.upload() as upload:
        await store.call(directory.copy, body.lora_path, upload)
        checked = await check_files(services, upload, form)
        if checked.content.peft_type.kind is not PromptKind.ADAPTER:
            raise InvalidRequestError(
                f"{FIELD}: the files are a soft prompt, not an adapter; upload them by POST /v1/prompts", param=FIELD
            )
        known = await _known(services, body.lora_name, acting.access)
        if known is not None and known.digest == checked.digest:
            return done
        if known is not None and not body.load_inplace:
            raise InvalidRequestError(
                f"lora_name: the LoRA adapter '{body.lora_name}' has already been loaded, from other files. Set "
                "load_inplace to true to publish these as its next version.",
                param="lora_name",
            )
        await publish(services, upload, checked, form, acting)
    return done


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
@Operation(
    scopes={Scope.PROMPTS_WRITE},
    errors=(404, 409, 503),
    quota=Quota.REQUESTS,
    example={"lora_name": "triage"},
)
async def unload_lora_adapter(body: UnloadBody, services: ServicesDep, acting: ActingDep) -> PlainTextResponse:
    """Delete all versions of an adapter; they can be restored for a time. 404 without `--adapter-dir`."""
    _directory(services)
    name, store = body.lora_name, services.store
    before: int | None = None
    has_more = True
    while has_more:
        try:
            versions, has_more = await store.list_versions(name, _PAGE, before, acting.access)
        except PromptNotFoundError as error:
            raise NotFoundError(
                f"lora_name: the LoRA adapter '{name}' cannot be found.", param="lora_name"
            ) from error
        if any(version.kind is not PromptKind.ADAPTER for version in versions):
            raise InvalidRequestError(
                f"lora_name: {name!r} has versions that are soft prompts; delete versions by "
                f"DELETE /v1/prompts/{name}/versions/VERSION",
                param="lora_name",
            )
        before = versions[-1].version if versions else None
    await store.delete_prompt(name, force=True, actor=acting.actor(), access=acting.access)
    acting.changed(HistoryAction.DELETE_PROMPT, name)
    await services.warmer.forget(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _directory(services: Services) -> AdapterDirectory:
    path = services.settings.store.adapter_dir
    if path is None:
        raise NotFoundError("adapters cannot be loaded by path: the server was started without --adapter-dir")
    return AdapterDirectory(path)


async def _known(services: Services, name: str, access: Access) -> PromptVersion | None:
    """The version that requests for a name get; without an alias latest, the highest one. None if there is none."""
    try:
        return await services.store.resolve(PromptRef(name), access)
    except AliasNotFoundError:
        return (await services.store.get_prompt(name, access)).latest
    except PromptNotFoundError:
        return None
