"""``/v1/replica``: what the ingress of a cluster needs to know of a replica to route requests."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter
from msgspec import Meta
from starlette.responses import Response

from server.api.keys.callers import Scope
from server.api.operations import Operation
from server.api.services import Services, ServicesDep
from server.engine.messages import BatchPicture
from server.errors import EngineNotReadyError, UnsupportedByEngineError

router = APIRouter(prefix="/v1", tags=["server"])


class ReplicaBody(msgspec.Struct, kw_only=True):
    """The load of a server, and where soft prompts and adapters lie on it, by content digest."""

    object: Annotated[str, Meta(description="Always `replica`.")] = "replica"
    name: Annotated[str | None, Meta(description="Its `--replica-name`.")]
    model: Annotated[str, Meta(description="Name of the base model in requests.")]
    load: Annotated[int, Meta(description="Sequences that it has admitted, running and waiting.")]
    capacity: Annotated[int, Meta(description="Sequences that it admits at once.")]
    running: Annotated[int, Meta(description="Sequences in the batch.")]
    max_running: Annotated[int, Meta(description="Sequences that fit in the batch, its `--max-num-seqs`.")]
    tokens: Annotated[int, Meta(description="Tokens computed since the start: prompt tokens and new ones.")]
    device: Annotated[list[str], Meta(description="Digests on the device.")]
    disk: Annotated[list[str], Meta(description="Digests in host memory, or used and still on the local disk.")]


@router.get("/replica", response_class=Response)
@Operation(scopes={Scope.ADMIN}, is_probe=True, reply=ReplicaBody)
async def get_replica(services: ServicesDep) -> Response:
    """Get the load of this server and the digests of what it holds, of all tenants; the ingress of a cluster asks."""
    services.require_ready()
    stats, engine = services.engine.stats, services.settings.engine
    picture = await _picture(services)
    on_device = set() if picture is None else _on_device(picture)
    body = ReplicaBody(
        name=services.settings.replica_name,
        model=services.base_name,
        load=services.admission.num_in_use,
        capacity=services.admission.capacity,
        running=stats.num_running,
        max_running=engine.max_num_seqs,
        tokens=stats.prompt_tokens + stats.generation_tokens,
        device=sorted(on_device),
        disk=sorted(await _nearby(services, picture) - on_device),
    )
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _picture(services: Services) -> BatchPicture | None:
    """What the engine holds; None if it does not say."""
    try:
        return await services.engine.look()
    except (EngineNotReadyError, UnsupportedByEngineError):
        return None


def _on_device(picture: BatchPicture) -> set[str]:
    return {run.digest for run in picture.runs} | {adapter.digest for adapter in picture.adapters}


async def _nearby(services: Services, picture: BatchPicture | None) -> set[str]:
    recent = services.store.recent.all()
    are_local = await services.store.are_local(recent)
    found = {version.digest for version, is_local in zip(recent, are_local, strict=True) if is_local}
    return found if picture is None else found | set(picture.host)
