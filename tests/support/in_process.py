"""Clients of an application that runs in the same event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI

from tests.support.waiting import until


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Start an application without waiting until it is ready."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client


async def is_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/ready")).status_code == 200


@asynccontextmanager
async def ready(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Start an application and wait until it is ready."""
    async with started(app) as client:
        await until(lambda: is_ready(client))
        yield client
