"""Corrections of versions (``PATCH``), and changes of the owner of a soft prompt."""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, Field, model_validator

from prompt_store.changes import HistoryAction, VersionEdit
from prompt_store.files.strict_json import check_depth
from prompt_store.formats import PromptFormat
from prompt_store.types import SHARED, check_name
from server.api.keys.callers import Scope
from server.api.operations import Operation
from server.api.prompts.acting import ActingDep
from server.api.prompts.bodies import PromptBody, Reason, VersionBody
from server.api.prompts.routes import PromptId, VersionNumber
from server.api.prompts.upload_form import MAX_JSON_DEPTH, MAX_TAGS, check_description, check_format
from server.api.prompts.uploaded import EditedVersion, edit
from server.api.request_body import RequestBody, require_json
from server.api.services import ServicesDep

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"])

_MAX_LABELS = 10_000
_Tag = Annotated[str, AfterValidator(lambda tag: check_name(tag, "tag"))]
_Label = Annotated[str, Field(min_length=1, max_length=1024)]


def check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object unchanged; ValueError if it is nested too deeply or has infinite numbers."""
    check_depth(value, MAX_JSON_DEPTH)
    json.dumps(value, allow_nan=False)
    return value


def _check_format(value: str | dict[str, Any]) -> str | dict[str, Any]:
    check_format(value)
    return value


class VersionPatch(RequestBody):
    """New values of what is known about a version. A field that is absent or null stays as it is."""

    description: Annotated[str, AfterValidator(check_description)] | None = Field(None, description="Free text.")
    tags: Annotated[list[_Tag], Field(max_length=MAX_TAGS)] | None = Field(
        None, description="All tags; an empty list removes them."
    )
    labels: Annotated[list[_Label], Field(max_length=_MAX_LABELS)] | None = Field(
        None, description="Names of the labels of the head, in order; stored as `labels` of the metadata."
    )
    metadata: Annotated[dict[str, Any], AfterValidator(check_metadata)] | None = Field(
        None, description="Keys to set in the metadata; null removes a key, other keys stay."
    )
    format: Annotated[str | dict[str, Any], AfterValidator(_check_format)] | None = Field(
        None, description="How the version wants to be asked, as in an upload: `raw`, `chat`, or an object."
    )
    reason: Reason | None = Field(None, description="Reason of the change, for the history.")

    @property
    def edit(self) -> VersionEdit:
        """The new values, for the store."""
        return VersionEdit(
            description=self.description,
            tags=None if self.tags is None else tuple(self.tags),
            labels=None if self.labels is None else tuple(self.labels),
            metadata=self.metadata,
            format=None if self.format is None else PromptFormat.parse(self.format),
        )


class PromptPatch(RequestBody):
    """The new owner of a soft prompt: a tenant, or all of them."""

    owner: Annotated[str, AfterValidator(lambda text: check_name(text, "tenant"))] | None = Field(
        None, description="The tenant that gets the soft prompt; not with `shared`."
    )
    shared: bool | None = Field(None, description="true: share it with all tenants.")
    reason: Reason | None = Field(None, description="Reason of the change, for the history.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.owner is None) == (self.shared is None) or self.shared is False:
            raise ValueError("give owner (a tenant), or shared (true)")
        return self


@router.patch("/{id}/versions/{version}", dependencies=[Depends(require_json)])
@Operation(scopes={Scope.PROMPTS_WRITE}, errors=(404, 503), example={"tags": ["reviewed"]})
async def edit_version(
    name: PromptId, version: VersionNumber, body: VersionPatch, services: ServicesDep, acting: ActingDep
) -> EditedVersion:
    """Correct the description, tags, labels or metadata of a version. Its files never change."""
    edited, changed = await edit(services, acting, name, version, body.edit, body.reason)
    if changed:
        acting.changed(HistoryAction.EDIT, name, version=version)
    fields = VersionBody.of(edited, pinned=services.warmer.is_pinned(edited)).model_dump()
    return EditedVersion(**fields, changed=list(changed))


@router.patch("/{id}", dependencies=[Depends(require_json)])
@Operation(scopes={Scope.ADMIN}, errors=(404, 503), example={"shared": True})
async def change_owner(name: PromptId, body: PromptPatch, services: ServicesDep, acting: ActingDep) -> PromptBody:
    """Give a soft prompt, with its versions and its history, to a tenant or to all."""
    store, owner = services.store, SHARED if body.shared else body.owner or SHARED
    await store.call(store.registry.change_owner, name, owner, actor=acting.actor(body.reason), access=acting.access)
    acting.changed(HistoryAction.CHANGE_OWNER, name)
    return PromptBody.of(await store.get_prompt(name), pinned=services.warmer.pinned_versions(name))
