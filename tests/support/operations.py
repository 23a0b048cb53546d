"""The operations of a server."""

from __future__ import annotations

from fastapi import FastAPI

from server.api.operations import Operation, Operations
from server.app import ROUTERS

OPERATIONS = Operations(route for router in ROUTERS for route in router.routes)
"""The operations of the API, without FastAPI's documentation routes."""


def operations_of(app: FastAPI) -> dict[tuple[str, str], Operation]:
    """All operations of an application, by method and path."""
    (operations,) = [item.kwargs["operations"] for item in app.user_middleware if "operations" in item.kwargs]
    assert isinstance(operations, Operations)
    return operations.by_route
