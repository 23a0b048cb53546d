"""The load of the last hour as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated

import msgspec
from msgspec import Meta

from server.api.load import POINT_SECONDS, Load, LoadPoint, Mark, Times, percentiles


class Percentiles(msgspec.Struct, kw_only=True):
    """Percentiles of durations, in seconds."""

    p50: Annotated[float, Meta(description="The median.")]
    p95: Annotated[float, Meta(description="The 95th percentile.")]


class StatsPoint(msgspec.Struct, kw_only=True):
    """The load of one interval."""

    at: Annotated[int, Meta(description="End of the interval; Unix time in seconds.")]
    tokens_per_second: Annotated[float, Meta(description="Generated tokens per second.")]
    prompt_tokens_per_second: Annotated[float, Meta(description="Text tokens of admitted requests per second.")]
    cache_hit_rate: Annotated[
        float | None, Meta(description="Share of the text tokens found in the prefix cache; null without any.")
    ]
    running: Annotated[int, Meta(description="Running sequences at the end.")]
    waiting: Annotated[int, Meta(description="Waiting sequences at the end, without the service tier `batch`.")]
    batch_waiting: Annotated[int, Meta(description="Waiting sequences of the service tier `batch` at the end.")]
    used_blocks: Annotated[int, Meta(description="Blocks in use at the end.")]
    idle_blocks: Annotated[int, Meta(description="Blocks of idle prefixes at the end.")]
    blocks: Annotated[int, Meta(description="All blocks.")]
    first_token_seconds: Annotated[
        Percentiles | None, Meta(description="From a request's arrival to its first token; null without requests.")
    ]
    between_tokens_seconds: Annotated[
        Percentiles | None, Meta(description="Between two tokens of a sequence; null without any.")
    ]
    outcomes: Annotated[dict[str, int], Meta(description="Ended requests by `stop`, `length`, `abort` and `error`.")]
    errors: Annotated[dict[str, int], Meta(description="Error responses by code.")]


class StatsMark(msgspec.Struct, kw_only=True):
    """Something that happened."""

    at: Annotated[float, Meta(description="Unix time in seconds.")]
    kind: Annotated[
        str, Meta(description="`restart`, `keys_reloaded`, or an action of the history, such as `publish`.")
    ]
    text: Annotated[str, Meta(description="What it is about.")]


class Stats(msgspec.Struct, kw_only=True):
    """The load of the last hour at most."""

    object: Annotated[str, Meta(description="Always `stats`.")] = "stats"
    since: Annotated[int, Meta(description="Since when this server counts; Unix time in seconds.")]
    step: Annotated[int, Meta(description="Seconds of a point.")]
    points: Annotated[list[StatsPoint], Meta(description="The oldest first.")]
    marks: Annotated[list[StatsMark], Meta(description="The oldest first: those that concern all, or the tenant.")]


def stats_body(load: Load, tenant: str, *, window: int, step: int, now: float) -> Stats:
    """The load as a tenant may see it.

    Args:
        load: The load.
        tenant: The caller's tenant.
        window: Seconds before now.
        step: Seconds of a point; a multiple of ``POINT_SECONDS``.
        now: Unix time in seconds.
    """
    recent = [point for point in load.points if point.at > now - window]
    groups = [list(group) for _, group in groupby(recent, key=lambda point: (point.at - POINT_SECONDS / 2) // step)]
    return Stats(
        since=int(load.began),
        step=step,
        points=[point_body(group) for group in groups],
        marks=[
            StatsMark(at=mark.at, kind=mark.kind, text=mark.text)
            for mark in load.marks
            if mark.at > now - window and _may_see(mark, tenant)
        ],
    )


def point_body(points: Sequence[LoadPoint]) -> StatsPoint:
    """One or more consecutive points as one."""
    last, seconds = points[-1], sum(point.seconds for point in points)
    queries = sum(point.cache_queries for point in points)
    return StatsPoint(
        at=round(last.at),
        tokens_per_second=round(sum(point.generation_tokens for point in points) / seconds, 2),
        prompt_tokens_per_second=round(sum(point.prompt_tokens for point in points) / seconds, 2),
        cache_hit_rate=round(sum(point.cache_hits for point in points) / queries, 4) if queries else None,
        running=last.num_running,
        waiting=last.num_waiting,
        batch_waiting=last.num_batch_waiting,
        used_blocks=last.num_used_blocks,
        idle_blocks=last.num_idle_blocks,
        blocks=last.num_blocks,
        first_token_seconds=_percentiles([point.first_token for point in points]),
        between_tokens_seconds=_percentiles([point.between_tokens for point in points]),
        outcomes=_sum(point.outcomes for point in points),
        errors=_sum(point.errors for point in points),
    )


def _percentiles(times: Sequence[Times]) -> Percentiles | None:
    found = percentiles(times)
    return None if found is None else Percentiles(p50=round(found[0], 6), p95=round(found[1], 6))


def _sum(counts: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total += one
    return dict(total)


def _may_see(mark: Mark, tenant: str) -> bool:
    return mark.tenant is None or mark.tenant == tenant
