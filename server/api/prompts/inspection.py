"""``/v1/prompts/{id}/inspect``: nearest tokens and norms of a soft prompt, changed modules of an adapter."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import AfterValidator, BaseModel, Field

from prompt_store.types import PromptKind, PromptVersion, check_name
from server.api.inference.logprobs import shown_token
from server.api.keys.callers import CallerDep, Scope
from server.api.operations import Operation, Quota
from server.api.prompts.bodies import ObjectType, PromptName
from server.api.prompts.routes import PromptId, ref_of
from server.api.services import ServicesDep, Tokenizer, require_ready
from server.api.soft_prompts.engine_source import adapter_source, check_task, soft_prompt_source
from server.engine.messages import AdapterInspection
from server.engine.types import Inspection, NormRange

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"], dependencies=[Depends(require_ready)])

MAX_NEAREST = 20


class NearToken(BaseModel):
    """One token of the vocabulary."""

    token_id: int = Field(description="Token id.")
    text: str = Field(description="Text of the token.")
    similarity: float = Field(description="Cosine of the angle to the token's input embedding, -1 to 1.")


class VirtualTokenBody(BaseModel):
    """One virtual token."""

    index: int = Field(description="Index of the virtual token, from 0.")
    norm: float = Field(description="Euclidean norm.")
    nearest: list[NearToken] = Field(description="Nearest tokens, best first.")


class VocabularyBody(BaseModel):
    """The input embeddings of the model, scaled as its layers receive them."""

    norm_mean: float = Field(description="Mean of the Euclidean norms.")
    norm_std: float = Field(description="Standard deviation of the Euclidean norms.")


class NormsBody(BaseModel):
    """Euclidean norms over the virtual tokens and heads of a layer."""

    mean: float = Field(description="Mean of the norms.")
    min: float = Field(description="The smallest norm.")
    max: float = Field(description="The largest norm.")

    @classmethod
    def of(cls, norms: NormRange) -> NormsBody:
        """Convert the engine's numbers."""
        return cls(mean=norms.mean, min=norms.min, max=norms.max)


class LayerBody(BaseModel):
    """One layer of a key/value prefix."""

    index: int = Field(description="Index of the layer, from 0.")
    keys: NormsBody = Field(description="Norms of the keys.")
    values: NormsBody = Field(description="Norms of the values.")


class ModuleBody(BaseModel):
    """What an adapter changes in one module."""

    name: str = Field(description="Name of the module in the base model.")
    rank: int = Field(description="Rank of the change; 0 for an IA3.")
    scale: float = Field(description="Factor of the product of its matrices; 1 for an IA3.")
    frobenius_norm: float = Field(description="Frobenius norm of the change of the module's weight.")
    spectral_norm: float = Field(description="Largest singular value of that change.")
    share: float = Field(description="`frobenius_norm` divided by the Frobenius norm of the module's weight.")


class InspectionBody(BaseModel):
    """A soft prompt of embeddings has ``tokens`` and ``vocabulary``, one of keys and values ``layers``.

    An adapter has ``modules``.
    """

    object: ObjectType = "prompt.inspection"
    id: PromptName
    version: int = Field(description="Version number.")
    kind: str = Field(description="`soft_prompt` or `adapter`.")
    peft_type: str = Field(description="PEFT method that trained it.")
    num_virtual_tokens: int = Field(description="Number of positions that it takes before the text.")
    task_id: int | None = Field(description="Task id of a multitask prompt.")
    tokens: list[VirtualTokenBody] | None = Field(
        description="The virtual tokens of a soft prompt made of embeddings, in order."
    )
    vocabulary: VocabularyBody | None = Field(
        description="The input embeddings of the model, for comparison; null for a key/value prefix."
    )
    layers: list[LayerBody] | None = Field(description="Norms per layer of a key/value prefix.")
    modules: list[ModuleBody] | None = Field(description="The changed modules of an adapter, in the model's order.")

    @classmethod
    def of(
        cls, version: PromptVersion, task_id: int | None, inspection: Inspection, tokenizer: Tokenizer
    ) -> InspectionBody:
        """Convert the engine's result, and add the texts of tokens."""
        texts = {
            token_id: shown_token(tokenizer.token_bytes(token_id))
            for token_id in {token_id for row in inspection.rows for token_id, _ in row.nearest}
        }
        is_key_values = version.peft_type.is_key_values
        tokens = [
            VirtualTokenBody(
                index=index,
                norm=row.norm,
                nearest=[
                    NearToken(token_id=token_id, text=texts[token_id], similarity=similarity)
                    for token_id, similarity in row.nearest
                ],
            )
            for index, row in enumerate(inspection.rows)
        ]
        layers = [
            LayerBody(index=index, keys=NormsBody.of(layer.keys), values=NormsBody.of(layer.values))
            for index, layer in enumerate(inspection.layers)
        ]
        vocabulary = None
        if inspection.vocabulary_norm_mean is not None and inspection.vocabulary_norm_std is not None:
            vocabulary = VocabularyBody(
                norm_mean=inspection.vocabulary_norm_mean, norm_std=inspection.vocabulary_norm_std
            )
        return cls(
            **_common(version),
            task_id=task_id,
            tokens=None if is_key_values else tokens,
            vocabulary=vocabulary,
            layers=layers if is_key_values else None,
            modules=None,
        )

    @classmethod
    def of_adapter(cls, version: PromptVersion, inspection: AdapterInspection) -> InspectionBody:
        """Convert the engine's result."""
        modules = [
            ModuleBody(
                name=module.name,
                rank=module.rank,
                scale=module.scale,
                frobenius_norm=module.frobenius_norm,
                spectral_norm=module.spectral_norm,
                share=module.share,
            )
            for module in inspection.modules
        ]
        return cls(**_common(version), task_id=None, tokens=None, vocabulary=None, layers=None, modules=modules)


def _common(version: PromptVersion) -> dict[str, Any]:
    return {
        "id": version.name,
        "version": version.version,
        "kind": version.kind.value,
        "peft_type": version.peft_type.value,
        "num_virtual_tokens": version.num_virtual_tokens,
    }


@router.get("/{id}/inspect")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 429, 503), quota=Quota.REQUESTS)
async def inspect_prompt(
    name: PromptId,
    services: ServicesDep,
    caller: CallerDep,
    version: Annotated[int | None, Query(ge=1, lt=2**63, description="A version number; not with `alias`.")] = None,
    alias: Annotated[
        str | None,
        Query(description="An alias; default: `latest`."),
        AfterValidator(lambda text: text and check_name(text, "alias")),
    ] = None,
    task_id: Annotated[
        int | None, Query(ge=0, lt=2**63, description="Task id; required for a multitask prompt.")
    ] = None,
    top_k: Annotated[
        int, Query(ge=1, le=MAX_NEAREST, description="Number of nearest tokens to show per virtual token.")
    ] = 5,
) -> InspectionBody:
    """Get the norms of a soft prompt and the tokens nearest to its rows, or the modules that an adapter changes.

    The version is the one of the alias latest by default.
    """
    with services.admission.permits(1, tenant=caller.tenant, waits=False):
        async with services.store.lease(ref_of(name, version, alias), caller.access) as leased:
            check_task(leased.version, task_id)
            if leased.version.kind is PromptKind.ADAPTER:
                measured = await services.engine.inspect_adapter(adapter_source(leased))
                return InspectionBody.of_adapter(leased.version, measured)
            source = soft_prompt_source(leased, task_id)
            found = await services.engine.inspect(source, num_nearest=top_k)
        # Thousands of tokens may have to be decoded.
        return await asyncio.to_thread(InspectionBody.of, leased.version, task_id, found, services.tokenizer)
