"""Probes and metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.keys.callers import Scope
from server.api.operations import Operation
from server.api.services import ServicesDep

router = APIRouter(tags=["operations"])

_METRICS_CONTENT: dict[str, Any] = {
    media_type: {"schema": {"type": "string"}} for media_type in ("text/plain", "application/openmetrics-text")
}


@router.get("/live")
@Operation(scopes=None, errors=(), is_probe=True)
async def live() -> dict[str, str]:
    """Liveness: the process answers HTTP, even while the model is loading."""
    return {"status": "live"}


@router.get("/health")
@router.get("/ready")
@Operation(scopes=None, is_probe=True)
async def ready(services: ServicesDep) -> dict[str, str]:
    """Readiness: 200 if requests are accepted, otherwise 503 with the reason.

    While the store's catalog is unavailable, the server continues with what it has cached, which is reported here.
    """
    services.require_ready()
    catalog = services.store.status
    if catalog.is_available:
        return {"status": "ready", "store": "available"}
    seconds = time.time() - catalog.since
    return {"status": "ready", "store": f"unavailable for {seconds:.0f} s: what is known already is served"}


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response, responses={200: {"content": _METRICS_CONTENT}})
@Operation(scopes={Scope.ADMIN}, errors=(), is_metrics=True)  # it shows the soft prompts of all tenants
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Metrics in Prometheus' text format, or OpenMetrics if requested by ``Accept``."""
    # Rendering counts the contents of the store, which reads the disk.
    body, content_type = await asyncio.to_thread(services.metrics.render, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
