"""What operators and their machines ask: probes and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.deps import ServicesDep

router = APIRouter(tags=["operations"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The process answers HTTP; the model may still be loading."""
    return {"status": "live"}


@router.get("/health")
@router.get("/ready")
async def ready(services: ServicesDep) -> dict[str, str]:
    """New requests are taken; 503 with the reason while they are not."""
    services.require_ready()
    return {"status": "ready"}


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response)
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Prometheus' text format, or OpenMetrics where ``Accept`` asks for it."""
    # Rendering counts what the store holds, which reads the disk.
    body, content_type = await asyncio.to_thread(services.metrics.render, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
