"""Where versions lie on this server: on the device, in host memory, on the local disk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, Field

from prompt_store.types import PromptVersion
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.engine.interface import Engine
from server.engine.messages import MAX_HOST_DIGESTS, BatchPicture, RunPicture
from server.errors import EngineNotReadyError, UnsupportedByEngineError

State = Literal["used", "idle", "loading"]


class OnDevice(BaseModel):
    """What a version takes on the device; the tasks of a multitask prompt together."""

    blocks: int = Field(description="Its key/value blocks; 0 for an adapter.")
    users: int = Field(description="Sequences that use it or wait for it, of all tenants.")
    state: State = Field(description="`used`, `idle` or `loading`.")


class Residency(BaseModel):
    """Where a version lies on this server."""

    known: bool = Field(
        description="False while the engine does not say what it has in memory; `device` and `host` are null then."
    )
    device: OnDevice | None = Field(description="What it takes on the device; null if it is not there.")
    host: bool | None = Field(
        description="Whether it is in host memory; null if that is not known, as only 1,024 are listed there."
    )
    disk: bool = Field(description="Whether its files are on the local disk.")


async def residency_of(engine: Engine, store: AsyncPromptStore, versions: Sequence[PromptVersion]) -> list[Residency]:
    """Find out where versions lie; the engine is asked once.

    An engine that loads, restarts or cannot say what it holds leaves device and host unknown.
    """
    if not versions:
        return []
    try:
        picture = await engine.look()
    except (EngineNotReadyError, UnsupportedByEngineError):
        picture = None
    are_local = await store.are_local(versions)
    devices = {} if picture is None else _devices(picture)
    host = frozenset(() if picture is None else picture.host)
    is_complete = picture is not None and len(picture.host) < MAX_HOST_DIGESTS
    return [
        Residency(
            known=picture is not None,
            device=devices.get(version.digest),
            host=True if version.digest in host else False if is_complete else None,
            disk=is_local,
        )
        for version, is_local in zip(versions, are_local, strict=True)
    ]


def _devices(picture: BatchPicture) -> dict[str, OnDevice]:
    """What is on the device, by digest."""
    found: dict[str, OnDevice] = {}
    for adapter in picture.adapters:
        state: State = "loading" if not adapter.is_loaded else "used" if adapter.num_users else "idle"
        found[adapter.digest] = OnDevice(blocks=0, users=adapter.num_users, state=state)
    for digest, runs in groupby(sorted(picture.runs, key=_digest_of), key=_digest_of):
        tasks = list(runs)
        states = {run.state for run in tasks}
        found[digest] = OnDevice(
            blocks=sum(run.num_blocks for run in tasks),
            users=sum(run.num_users for run in tasks),
            state="used" if "used" in states else "loading" if "loading" in states else "idle",
        )
    return found


def _digest_of(run: RunPicture) -> str:
    return run.digest
