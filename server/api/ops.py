"""What operators and their machines ask: probes and metrics."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.services import ServicesDep

router = APIRouter(tags=["operations"])


@router.get("/live")
async def live() -> dict[str, str]:
    """Liveness: the process answers HTTP, even while the model is loading."""
    return {"status": "live"}


@router.get("/health")
@router.get("/ready")
async def ready(services: ServicesDep) -> dict[str, str]:
    """Readiness: 200 if requests are accepted, otherwise 503 with the reason.

    While the store's catalog is away the server goes on with what it knows, and says so here.
    """
    services.require_ready()
    catalog = services.store.status
    if catalog.is_available:
        return {"status": "ready", "store": "available"}
    seconds = time.time() - catalog.since
    return {"status": "ready", "store": f"unavailable for {seconds:.0f} s: what is known already is served"}


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response)
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Metrics in Prometheus' text format, or OpenMetrics if requested by ``Accept``."""
    # Rendering counts what the store holds, which reads the disk.
    body, content_type = await asyncio.to_thread(services.metrics.render, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
