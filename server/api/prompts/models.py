"""``/v1/models``: the base model and the soft prompts, as models that a client can name."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel, Field

from prompt_store.types import PromptVersion
from server.api.generation.sampling_defaults import default_fields
from server.api.inference.pair import versions_of
from server.api.inference.target import resolve
from server.api.keys.callers import CallerDep, Scope
from server.api.operations import Operation
from server.api.prompts.bodies import ObjectType
from server.api.services import Services, ServicesDep, require_ready

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require_ready)])

_PAGE = 200

ModelId = Annotated[
    str,
    Path(
        description="A model name as in `model` of a request; slashes and colons are allowed.",
        examples=["sentiment@latest"],
    ),
]


class ModelCard(BaseModel):
    """A model that requests may name."""

    id: str = Field(description="The name to send as `model`.")
    object: ObjectType = "model"
    created: int = Field(description="When it was published, or the server started; Unix time in seconds.")
    owned_by: Annotated[str, Field(description="Always `prelude`.")] = "prelude"
    root: str = Field(description="The base model.")
    parent: Annotated[str | None, Field(description="The base model of a soft prompt; null for the base itself.")] = (
        None
    )
    max_model_len: int = Field(description="Maximum length of a sequence, virtual tokens included.")
    max_num_seqs: int = Field(description="Maximum number of sequences that run at once, over all models.")
    max_waiting: int = Field(description="Maximum number of waiting sequences, in addition to `max_num_seqs`.")
    default_sampling_params: dict[str, float | int | list[str]] = Field(
        description="Default values of request fields, set by the checkpoint."
    )


class ModelList(BaseModel):
    """All models, by their bare names."""

    object: ObjectType = "list"
    data: list[ModelCard] = Field(description="The base model, and the soft prompts by name.")


@router.get("")
@Operation(scopes={Scope.GENERATE, Scope.PROMPTS_READ})
async def list_models(services: ServicesDep, caller: CallerDep) -> ModelList:
    """List the base model and all soft prompts."""
    cards = [_base_card(services)]
    after: str | None = None
    has_more = True
    while has_more:
        summaries, has_more = await services.store.list_prompts(limit=_PAGE, after=after, access=caller.access)
        cards += [_prompt_card(services, summary.name, summary.latest) for summary in summaries]
        after = summaries[-1].name if summaries else None
    return ModelList(data=cards)


@router.get("/{model_id:path}")
@Operation(scopes={Scope.GENERATE, Scope.PROMPTS_READ}, errors=(404, 503))
async def get_model(model_id: ModelId, services: ServicesDep, caller: CallerDep) -> ModelCard:
    """Get a model by any name that requests may use."""
    target = resolve(model_id, None, base_name=services.base_name, access=caller.access)
    versions = await versions_of(services, target)
    return _prompt_card(services, model_id, versions[0]) if versions else _base_card(services)


def _base_card(services: Services) -> ModelCard:
    return _card(services, services.base_name, created=services.created, parent=None)


def _prompt_card(services: Services, model_id: str, version: PromptVersion) -> ModelCard:
    return _card(services, model_id, created=int(version.created_at.timestamp()), parent=services.base_name)


def _card(services: Services, model_id: str, *, created: int, parent: str | None) -> ModelCard:
    settings = services.settings
    return ModelCard(
        id=model_id,
        created=created,
        root=services.base_name,
        parent=parent,
        max_model_len=services.engine.model.max_model_len,
        max_num_seqs=settings.engine.max_num_seqs,
        max_waiting=settings.http.max_waiting,
        default_sampling_params=default_fields(services.engine.model.generation_defaults),
    )
