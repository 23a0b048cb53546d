"""A picture of the batch as one caller may see it."""

from __future__ import annotations

import base64
import secrets
import time
from collections import Counter
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

from server.api.live.live_names import LiveNames
from server.engine.messages import BatchPicture, SequencePicture
from server.engine.stats import EngineStats

_SALT = secrets.token_bytes(16)
"""Keeps the ids of rows from telling the ids of requests."""

_encoder = msgspec.json.Encoder()


class RowBlocks(msgspec.Struct, kw_only=True):
    """The key/value blocks of a row."""

    soft_prompt: Annotated[int, Meta(description="Blocks of the soft prompt, which all its rows read.")]
    shared: Annotated[int, Meta(description="Blocks of text that other rows use, too.")]
    own: Annotated[int, Meta(description="All others.")]


class Row(msgspec.Struct, kw_only=True):
    """One sequence, or one member of an ensemble. Rows of other tenants are lengths without a name."""

    id: Annotated[str, Meta(description="The same in all pictures; members of an ensemble share it.")]
    mine: Annotated[bool, Meta(description="Whether it is of the caller's tenant.")]
    name: Annotated[str | None, Meta(description="`NAME@VERSION`; null for the base, and for other tenants.")]
    soft_prompt: Annotated[
        int | None, Meta(description="Index in `soft_prompts`; null without one, and for other tenants.")
    ]
    phase: Annotated[str, Meta(description="`waiting`, `prefill` or `decode`.")]
    reason: Annotated[
        str | None,
        Meta(
            description="Why it waits: `place`, `blocks`, `soft_prompt`, `adapter`, `grammar` or `preempted`; null "
            "if it runs."
        ),
    ]
    service_tier: Annotated[str, Meta(description="`default` or `batch`.")]
    virtual_tokens: Annotated[int, Meta(description="Positions of the soft prompt.")]
    text_tokens: Annotated[int, Meta(description="Tokens of the prompt.")]
    new_tokens: Annotated[int, Meta(description="Tokens generated so far.")]
    computed: Annotated[int, Meta(description="Positions whose keys and values are written.")]
    blocks: Annotated[RowBlocks, Meta(description="Its key/value blocks.")]
    age_seconds: Annotated[float, Meta(description="Since its arrival.")]


class ResidentSoftPrompt(msgspec.Struct, kw_only=True):
    """A soft prompt on the device; its blocks exist once."""

    name: Annotated[str | None, Meta(description="`NAME@VERSION`; null if the caller may not see it.")]
    task_id: Annotated[int | None, Meta(description="Task of a multitask prompt.")]
    blocks: Annotated[int, Meta(description="Its key/value blocks.")]
    users: Annotated[int, Meta(description="Sequences that use it or wait for it, of all tenants.")]
    state: Annotated[str, Meta(description="`used`, `idle` or `loading`.")]


class Blocks(msgspec.Struct, kw_only=True):
    """The key/value cache, in blocks."""

    total: Annotated[int, Meta(description="All blocks.")]
    used: Annotated[int, Meta(description="Blocks that a sequence references.")]
    idle: Annotated[int, Meta(description="Blocks that hold only an idle, reusable prefix.")]
    size: Annotated[int, Meta(description="Positions per block.")]
    map: Annotated[
        str | None,
        Meta(
            description="Base64 of one byte for each block, or for every n-th so that there are at most 4,096: 0 "
            "free, 1 idle text, 2 used, 3 used by several, 4 idle soft prompt, 5 used soft prompt, 6 loading; null "
            "if the engine cannot show it."
        ),
    ]


class EngineBody(msgspec.Struct, kw_only=True):
    """The running batch."""

    object: Annotated[str, Meta(description="Always `engine`.")] = "engine"
    at: Annotated[float, Meta(description="When it was shown; Unix time in seconds.")]
    step: Annotated[int, Meta(description="Number of the engine's steps so far.")]
    running: Annotated[int, Meta(description="Running sequences, of all tenants.")]
    waiting: Annotated[int, Meta(description="Waiting sequences, of all tenants, with the service tier `batch`.")]
    shows_rows: Annotated[bool, Meta(description="Whether the engine shows its rows, or only the counts.")]
    rows: Annotated[list[Row], Meta(description="Sequences, running ones first; at most 1,024.")]
    soft_prompts: Annotated[list[ResidentSoftPrompt], Meta(description="Soft prompts on the device.")]
    blocks: Annotated[Blocks, Meta(description="The key/value cache.")]


def engine_body(stats: EngineStats, picture: BatchPicture | None, names: LiveNames, tenant: str) -> EngineBody:
    """Show a picture to a tenant.

    Args:
        stats: The engine's counts.
        picture: The batch; None if the engine cannot show it.
        names: The names of sequences and digests.
        tenant: The caller's tenant.
    """
    rows, resident = ([], []) if picture is None else _visible(picture, names, tenant)
    return EngineBody(
        at=round(time.time(), 3),
        step=stats.steps if picture is None else picture.step,
        running=stats.num_running,
        waiting=stats.num_waiting + stats.num_batch_waiting,
        shows_rows=picture is not None,
        rows=rows,
        soft_prompts=resident,
        blocks=Blocks(
            total=stats.num_blocks if picture is None else picture.num_blocks,
            used=stats.num_used_blocks if picture is None else picture.num_used_blocks,
            idle=stats.num_cached_blocks if picture is None else picture.num_idle_blocks,
            size=stats.block_size,
            map=None if picture is None else base64.b64encode(picture.block_map).decode(),
        ),
    )


class Shown:
    """A picture as a tenant sees it, made once for all its subscribers.

    Args:
        body: The batch, with the map of blocks.

    Attributes:
        blocks: The key/value cache, with the map.
        body: The batch without the map.
        json: ``body`` in JSON.
    """

    def __init__(self, body: EngineBody) -> None:
        self.blocks = body.blocks
        self.body = msgspec.structs.replace(body, blocks=msgspec.structs.replace(body.blocks, map=None))
        self.json = _encoder.encode(self.body)

    def is_as(self, other: Shown | None) -> bool:
        """Whether another one shows the same, apart from the time."""
        if other is None or other is self:
            return other is self
        return msgspec.structs.replace(self.body, at=other.body.at) == other.body


class ShownPictures:
    """What was shown of the newest picture, by tenant.

    Without it, each of 64 subscribers would cost a body and its JSON five times a second.
    """

    def __init__(self) -> None:
        self._picture: BatchPicture | None = None
        self._by_tenant: dict[str, Shown] = {}

    def show(self, stats: EngineStats, picture: BatchPicture | None, names: LiveNames, tenant: str) -> Shown:
        """Show a picture to a tenant; see ``engine_body``."""
        if picture is None:
            return Shown(engine_body(stats, None, names, tenant))
        if picture is not self._picture:
            self._picture, self._by_tenant = picture, {}
        shown = self._by_tenant.get(tenant)
        if shown is None:
            shown = self._by_tenant[tenant] = Shown(engine_body(stats, picture, names, tenant))
        return shown


def _visible(picture: BatchPicture, names: LiveNames, tenant: str) -> tuple[list[Row], list[ResidentSoftPrompt]]:
    index_of = {run.key: index for index, run in enumerate(picture.runs)}
    seen: Counter[str] = Counter()
    rows = []
    for one in picture.sequences:
        rows.append(_row(one, names, index_of, seen[one.request_id], is_mine=one.tenant == tenant))
        seen[one.request_id] += 1
    resident = [
        ResidentSoftPrompt(
            name=names.name_for(tenant, run.digest),
            task_id=run.task_id,
            blocks=run.num_blocks,
            users=run.num_users,
            state=run.state,
        )
        for run in picture.runs
    ]
    return rows, resident


def _row(one: SequencePicture, names: LiveNames, index_of: dict[str, int], member: int, *, is_mine: bool) -> Row:
    return Row(
        id=blake2b(one.request_id.encode(), digest_size=6, key=_SALT).hexdigest(),
        mine=is_mine,
        name=names.name_of(one.request_id, member) if is_mine else None,
        soft_prompt=index_of.get(one.run) if is_mine and one.run is not None else None,
        phase=one.phase,
        reason=one.reason,
        service_tier="batch" if one.is_batch else "default",
        virtual_tokens=one.num_virtual_tokens,
        text_tokens=one.num_text_tokens,
        new_tokens=one.num_new_tokens,
        computed=one.num_computed,
        blocks=RowBlocks(soft_prompt=one.num_prompt_blocks, shared=one.num_shared_blocks, own=one.num_own_blocks),
        age_seconds=one.age_seconds,
    )
