"""Shadow requests: copies of requests to another version, whose answers are compared and never returned."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from server.api.keys.callers import caller_of
from server.api.keys.in_process import Reply, post
from server.api.keys.limits import KeyLimiter, Limits
from server.engine.types import MAX_PRIORITY
from server.metrics.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 8
"""Copies that run at once; further ones are dropped."""

_MAX_RESULTS = 1000
_MAX_ID_CHARS = 100

_NOT_COPIED = ("prompt_id", "adapter_id", "prompt_ids", "stream_options", "echo", "timeout", "user")
_CHAT = "/v1/chat/completions"
_CLASSIFY = "/v1/classify"


@dataclass(frozen=True, slots=True)
class Output:
    """One choice of an answer, or the result for one input of a classification.

    Attributes:
        answer: Its tokens, or the label.
        logprob: The mean log-probability of its tokens, or of the label; None if it has no tokens.
    """

    answer: tuple[int, ...] | str
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """Comparisons of a shadow with what was returned, since the server started.

    Attributes:
        equal: Requests with equal answers.
        different: Requests with different answers.
        errors: Requests that the shadow failed.
        dropped: Requests that were not copied because the server was busy.
        logprob_difference: Sum over the compared requests of the mean log-probability per token of the shadow's
            answer minus that of the returned one.
    """

    equal: int = 0
    different: int = 0
    errors: int = 0
    dropped: int = 0
    logprob_difference: float = 0.0


class Shadowing:
    """Sends copies of requests in the service tier ``batch``. Used on the event loop only.

    A copy never counts against the limits of a key, never delays an interactive request, and is dropped first.

    Args:
        metrics: Where results are counted.
        is_crowded: Whether requests wait, so that nothing is copied.
    """

    def __init__(self, metrics: Metrics, is_crowded: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._is_crowded = is_crowded
        self._app: ASGIApp | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: OrderedDict[str, Compared] = OrderedDict()

    @asynccontextmanager
    async def running(self, app: ASGIApp) -> AsyncIterator[None]:
        """Copy requests during a block."""
        self._app = app
        try:
            yield
        finally:
            self._app = None
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def result(self, model: str) -> Compared:
        """The comparisons of a shadow, ``NAME@VERSION``."""
        return self._results.get(model, Compared())

    def copy(self, request: Request, shadow: str, served_by: str, outputs: Sequence[Output]) -> None:
        """Send a copy of a request in the background, after it was answered.

        Args:
            request: The request; its body was read.
            shadow: The model name of the shadow.
            served_by: What has answered the request, ``NAME@VERSION``.
            outputs: The answer.
        """
        if self._app is None or len(self._tasks) >= MAX_IN_FLIGHT or self._is_crowded():
            self._count(shadow, "dropped")
            return
        work = self._compare(self._app, request, shadow, served_by, outputs)
        task = asyncio.create_task(work, name=f"shadow {shadow}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self, app: ASGIApp, request: Request, shadow: str, served_by: str, outputs: Sequence[Output]
    ) -> None:
        path = request.url.path
        caller = replace(caller_of(request), limiter=KeyLimiter(Limits()))
        request_id = f"{request.state.request_id[:_MAX_ID_CHARS]}.shadow"
        body = copied_body(path, json.loads(await request.body()), shadow)
        reply = await post(app, path, json.dumps(body).encode(), caller, request_id=request_id)
        if reply.status != 200:
            self._count(shadow, "dropped" if reply.status in (429, 503) else "error")
            return
        found = outputs_of(path, reply)
        result = "equal" if [one.answer for one in found] == [one.answer for one in outputs] else "different"
        difference = _difference(found, outputs)
        self._count(shadow, result, difference)
        logger.info(
            "request %s: the answer of the shadow %s is %s%s that of %s%s",
            request_id,
            shadow,
            result,
            " to" if result == "equal" else " from",
            served_by,
            "" if difference is None else f"; its log-probability per token differs by {difference:+.4f}",
        )

    def _count(self, shadow: str, result: str, difference: float | None = None) -> None:
        names, versions = zip(*(part.split("@") for part in shadow.split("+")), strict=True)
        self._metrics.count_shadow("+".join(names), "+".join(versions), result, difference)
        before = self._results.pop(shadow, Compared())
        field_name = "errors" if result == "error" else result
        after = replace(before, **{field_name: getattr(before, field_name) + 1})
        self._results[shadow] = replace(after, logprob_difference=after.logprob_difference + (difference or 0.0))
        if len(self._results) > _MAX_RESULTS:
            self._results.popitem(last=False)


def copied_body(path: str, body: Mapping[str, Any], shadow: str) -> dict[str, Any]:
    """The body of a copy: the same request to the shadow, of the least urgency, with what a comparison needs."""
    copied = {key: value for key, value in body.items() if key not in _NOT_COPIED}
    copied |= {"model": shadow, "service_tier": "batch", "priority": MAX_PRIORITY}
    if path != _CLASSIFY:
        copied |= {"stream": False, "return_token_ids": True}
        copied["logprobs"] = True if path == _CHAT else copied.get("logprobs") or 0
    return copied


def outputs_of(path: str, reply: Reply) -> list[Output]:
    """The outputs in the response to a copy."""
    body = json.loads(reply.body)
    if path == _CLASSIFY:
        return [Output(one["label"], None) for one in body["data"]]
    found = []
    for choice in sorted(body["choices"], key=lambda choice: choice["index"]):
        scored = choice["logprobs"] or {}
        logprobs = (
            [token["logprob"] for token in scored.get("content", ())]
            if path == _CHAT
            else scored.get("token_logprobs", ())
        )
        found.append(Output(tuple(choice["token_ids"]), mean(logprobs)))
    return found


def mean(logprobs: Sequence[float]) -> float | None:
    """The mean log-probability of tokens; None if there are none."""
    return sum(logprobs) / len(logprobs) if logprobs else None


def _difference(found: Sequence[Output], returned: Sequence[Output]) -> float | None:
    """The mean difference of the outputs that have a log-probability in both."""
    return mean(
        [
            ours.logprob - theirs.logprob
            for ours, theirs in zip(found, returned, strict=False)
            if ours.logprob is not None and theirs.logprob is not None
        ]
    )
