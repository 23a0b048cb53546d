"""``/v1/prompts/{id}/diff``: two versions side by side, and whom a move of an alias would meet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query

from prompt_store.files.comparison import RowDifference, compare_rows
from prompt_store.types import CONFIG_FILE, DEFAULT_ALIAS, Access, LeasedPrompt, PromptKind, PromptRef, PromptVersion
from server.api.comparison.bodies import Compared, DiffReply, FieldChange, ShadowResults, TokenDifference
from server.api.keys.callers import Scope
from server.api.operations import Operation, Quota
from server.api.prompts.acting import ActingDep
from server.api.prompts.routes import PromptId
from server.api.services import Services, ServicesDep
from server.errors import InvalidRequestError

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"])

_Selector = Annotated[str | None, Query(max_length=300)]
_MAX_TOKENS = 4096


@router.get("/{id}/diff")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 429, 503), quota=Quota.REQUESTS)
async def diff_versions(
    name: PromptId,
    services: ServicesDep,
    acting: ActingDep,
    from_: Annotated[_Selector, Query(alias="from", description="A version or an alias; default: `latest`.")] = None,
    to: Annotated[_Selector, Query(description="A version or an alias of the same name; or give `against`.")] = None,
    against: Annotated[_Selector, Query(description="NAME@VERSION or NAME@ALIAS of another soft prompt.")] = None,
    max_tokens: Annotated[
        int, Query(ge=0, le=_MAX_TOKENS, description="Maximum number of virtual tokens to compare.")
    ] = 512,
) -> DiffReply:
    """Compare two versions: fields, scores, virtual tokens, and the requests that use them on this server."""
    if (to is None) == (against is None):
        raise InvalidRequestError("to: give either to or against", param="to")
    refs = (
        _ref(f"{name}@{from_ or DEFAULT_ALIAS}", "from"),
        _ref(f"{name}@{to}", "to") if against is None else _ref(against, "against"),
    )
    store = services.store
    with services.admission.permits(1, tenant=acting.caller.tenant, waits=False):
        async with AsyncExitStack() as stack:
            before, after = [await stack.enter_async_context(store.lease(ref, acting.access)) for ref in refs]
            for leased in (before, after):
                version = leased.version
                await acting.has_read(version.name, version.owner, "diff", version=version.version)
            configuration = await _configuration(services, before.version, acting.access)
            other_configuration = await _configuration(services, after.version, acting.access)
            rows = await store.call(_compare, before, after, services.engine.model.num_layers, max_tokens)
    ours, theirs = before.version, after.version
    return DiffReply(
        before=await _compared(services, ours, acting.access),
        after=await _compared(services, theirs, acting.access),
        same_files=ours.digest == theirs.digest,
        configuration=changes(configuration, other_configuration),
        metadata=changes(_described(ours), _described(theirs)),
        lineage=changes(ours.lineage.to_json(), theirs.lineage.to_json()),
        tokens=None if rows is None else [TokenDifference.at(index, row) for index, row in enumerate(rows)],
        shadow=_shadow(services, theirs),
    )


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[FieldChange]:
    """The fields of two JSON objects that differ, in order of their paths."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        one, other, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += changes(one, other, f"{path}.")
        elif one != other:
            found.append(FieldChange(field=path, before=one, after=other))
    return found


def _ref(text: str, param: str) -> PromptRef:
    try:
        return PromptRef.parse(text)
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error


async def _configuration(services: Services, version: PromptVersion, access: Access) -> dict[str, Any]:
    data = await services.store.read_file(version.name, version.version, CONFIG_FILE, access)
    parsed: dict[str, Any] = json.loads(data)
    return parsed


def _compare(
    before: LeasedPrompt, after: LeasedPrompt, num_layers: int, max_tokens: int
) -> list[RowDifference] | None:
    """The virtual tokens of two soft prompts with the same kind of rows."""
    ours, theirs = before.version, after.version
    is_key_values = ours.peft_type.is_key_values
    if PromptKind.ADAPTER in (ours.kind, theirs.kind) or is_key_values != theirs.peft_type.is_key_values:
        return None
    if min(ours.num_virtual_tokens, theirs.num_virtual_tokens) > max_tokens:
        return None
    layers = num_layers if is_key_values else 0
    return compare_rows(before.weights_path, after.weights_path, num_layers=layers)


async def _compared(services: Services, version: PromptVersion, access: Access) -> Compared:
    aliases = (await services.store.get_prompt(version.name, access)).aliases
    return Compared(
        id=version.name,
        version=version.version,
        aliases=sorted(alias for alias, target in aliases.items() if target == version.version),
        num_virtual_tokens=version.num_virtual_tokens,
        scores=dict(version.lineage.scores),
        requests_last_hour=services.usage.last_hour(version.name, version.version),
        running=services.usage.running_now(version.name, version.version),
        pinned=services.warmer.is_pinned(version),
    )


def _described(version: PromptVersion) -> dict[str, Any]:
    return {
        "description": version.description,
        "tags": list(version.tags),
        "metadata": dict(version.metadata),
        "format": None if version.format is None else version.format.to_json(),
    }


def _shadow(services: Services, version: PromptVersion) -> ShadowResults:
    found = services.shadowing.result(f"{version.name}@{version.version}")
    count = found.equal + found.different
    return ShadowResults(
        equal=found.equal,
        different=found.different,
        errors=found.errors,
        dropped=found.dropped,
        mean_logprob_difference=found.logprob_difference / count if count else None,
    )
