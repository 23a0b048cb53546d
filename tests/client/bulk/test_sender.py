"""Requests of the sender, and its handling of answers and refusals."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.client.bulk import sender as sender_module
from server.client.bulk.request_template import CHAT, CLASSIFY, COMPLETIONS, RequestTemplate
from server.client.bulk.rows import Row
from server.client.bulk.sender import Outcome, Sender, SenderError, SendLimits
from server.client.bulk.transport import NoResponseError, Response
from tests.support.presence import present
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def text_rows(count: int, **fields: Any) -> list[Row]:
    return [Row(index, index + 1, {"text": f"t{index}", **fields}, "text", num_bytes=20) for index in range(count)]


Refuse = Callable[[dict[str, Any]], Response | Exception | None]
Answer = Callable[[str, dict[str, Any]], Awaitable[Response]]


class FakeTransport:
    """Passes each request to a function."""

    base_url = "http://test"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def post(self, path: str, content: bytes) -> Response:
        return await self._answer(path, json.loads(content))


class Server:
    """Answers like the API, unless ``refuse`` returns another response for a body."""

    def __init__(self, refuse: Refuse = lambda _: None) -> None:
        self.refuse = refuse
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.random = random.Random(0)

    async def answer(self, path: str, body: dict[str, Any]) -> Response:
        self.bodies.append((path, body))
        texts = body.get("input") or body.get("prompt") or [body.get("messages")]
        self.in_flight += len(texts)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.random.uniform(0, 0.002))
            refused = self.refuse(body)
            if isinstance(refused, Exception):
                raise refused
            if refused is not None:
                return refused
        finally:
            self.in_flight -= len(texts)
        reply: dict[str, Any] = {
            "model": body["model"],
            "usage": {"prompt_tokens": len(texts), "completion_tokens": 1},
        }
        if path == CLASSIFY:
            reply["data"] = [
                {"index": index, "label": text, "probability": 1.0, "probabilities": {text: 1.0}}
                for index, text in enumerate(texts)
            ]
        elif path == CHAT:
            message = {"role": "assistant", "content": "hi", "refusal": None}
            reply["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        else:
            reply["choices"] = [
                {"index": index, "text": f"{text}!", "finish_reason": "stop"} for index, text in enumerate(texts)
            ]
            reply["choices"].reverse()
        return Response(200, {"x-prelude-prompt": f"{body['model']}@1"}, json.dumps(reply).encode())

    async def all(self, rows: list[Row], template: RequestTemplate | None = None, **limits: Any) -> list[Outcome]:
        self.sender = Sender(FakeTransport(self.answer), template or RequestTemplate(model="a"), SendLimits(**limits))
        return [outcome async for given in self.sender.outcomes(iter(rows)) for outcome in given]


def refusal(status: int, code: str = "c", **headers: str) -> Response:
    error = {"error": {"message": f"m{status}", "type": "t", "param": None, "code": code}}
    return Response(
        status, {name.replace("_", "-"): text for name, text in headers.items()}, json.dumps(error).encode()
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "_BACKOFF_SECONDS", 0.001)


async def test_rows_of_one_kind_share_requests_and_keep_their_order() -> None:
    server = Server()
    outcomes = await server.all(text_rows(70), concurrency=64, rows_per_request=16)
    assert [outcome.row.index for outcome in outcomes] == list(range(70))
    assert [present(outcome.response)["text"] for outcome in outcomes] == [f"t{index}!" for index in range(70)]
    assert outcomes[0].response == {"model": "a@1", "text": "t0!", "finish_reason": "stop"}
    assert [len(body["prompt"]) for _, body in server.bodies] == [16, 16, 16, 16, 6]
    assert server.sender.tally.prompt_tokens == 70
    assert server.sender.tally.completion_tokens == server.sender.tally.requests == 5


async def test_each_row_goes_to_the_soft_prompt_it_names() -> None:
    rows = [Row(i, i + 1, {"text": f"t{i}", "prompt_id": f"p{i % 2}", "task_id": 3}, "text") for i in range(4)]
    rows += [Row(4, 5, {"messages": [{"role": "user", "content": "x"}]}, "messages")]
    rows += [Row(5, 6, {"prompt": "y", "model": "m"}, "prompt"), Row(6, 7, {"prompt": "z"}, "prompt")]
    server = Server()

    async def answer(path: str, body: dict[str, Any]) -> Response:
        body.setdefault("model", body.get("prompt_id"))
        return await server.answer(path, body)

    template = RequestTemplate(model="a", task_id=1, options={"max_tokens": 2})
    sender = Sender(FakeTransport(answer), template, SendLimits())
    outcomes = [outcome async for given in sender.outcomes(iter(rows)) for outcome in given]
    assert [present(outcome.response)["model"] for outcome in outcomes] == [
        "p0@1",
        "p1@1",
        "p0@1",
        "p1@1",
        "a@1",
        "m@1",
        "a@1",
    ]
    assert present(outcomes[4].response)["message"] == {"role": "assistant", "content": "hi"}
    asked = sorted((path, body["model"], body["task_id"]) for path, body in server.bodies)
    assert asked == [
        (CHAT, "a", 1),
        (COMPLETIONS, "a", 1),
        (COMPLETIONS, "m", 1),
        (COMPLETIONS, "p0", 3),
        (COMPLETIONS, "p1", 3),
    ]
    assert all(body["max_tokens"] == 2 for _, body in server.bodies)


@pytest.mark.parametrize(("labels", "by_head"), [(("x", "y"), False), ((), True)])
async def test_rows_are_classified_by_labels_or_a_head(labels: tuple[str, ...], by_head: bool) -> None:
    server = Server()
    (outcome,) = await server.all(text_rows(1), RequestTemplate(model="a", labels=labels, by_head=by_head))
    assert outcome.response == {"model": "a@1", "label": "t0", "probability": 1.0, "probabilities": {"t0": 1.0}}
    ((path, body),) = server.bodies
    assert path == CLASSIFY
    assert body.get("labels", []) == list(labels)


async def test_requests_in_flight_and_rows_read_ahead_are_limited() -> None:
    server = Server()
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for row in text_rows(2000):
            read += 1
            yield row

    given_out = 0
    sender = Sender(
        FakeTransport(server.answer),
        RequestTemplate(model="a", labels=["x", "y"]),
        SendLimits(concurrency=32, rows_per_request=8),
    )
    async for given_rows in sender.outcomes(rows()):
        given_out += len(given_rows)
        assert read - given_out <= 4 * 32 // 2
    assert given_out == 2000
    assert server.most_in_flight <= 16  # each request has two sequences


@settings(max_examples=30, deadline=None)
@given(bad=st.sets(st.integers(0, 39)), faults=st.sets(st.integers(0, 39)), per=st.integers(1, 40))
def test_every_row_has_an_outcome_independent_of_the_others(bad: set[int], faults: set[int], per: int) -> None:
    def refuse(body: dict[str, Any]) -> Response | None:
        return refusal(400) if bad & {int(text[1:]) for text in body["prompt"]} else None

    rows = [Row(row.index, row.line, {}, fault="wrong") if row.index in faults else row for row in text_rows(40)]
    outcomes = asyncio.run(Server(refuse).all(rows, rows_per_request=per, concurrency=64))
    assert [outcome.row.index for outcome in outcomes] == list(range(40))
    for index, outcome in enumerate(outcomes):
        if index in faults:
            assert outcome.error == {"message": "wrong", "code": "invalid_row"}
        elif index in bad:
            assert outcome.error == {"message": "m400", "code": "c", "status": 400}
        else:
            assert outcome.error is None
            assert outcome.response is not None
            assert outcome.response["text"] == f"t{index}!"


async def test_too_large_requests_are_split_and_later_ones_are_smaller() -> None:
    server = Server(lambda body: refusal(413) if len(body["prompt"]) > 5 else None)
    outcomes = await server.all(text_rows(200), rows_per_request=16, concurrency=32)
    assert all(outcome.error is None for outcome in outcomes)
    assert sum(len(body["prompt"]) > 5 for _, body in server.bodies) < 20
    assert len(server.bodies[-1][1]["prompt"]) <= 5


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (refusal(429, "overloaded", retry_after_ms="1"), "overloaded"),
        (refusal(503, "engine_restarting"), "engine_restarting"),
        (refusal(500, "request_failed"), "request_failed"),
        (Response(502, {}, b"<html>"), "not_prelude"),
        (NoResponseError("reset"), "unreachable"),
    ],
)
async def test_temporary_failures_are_retried(refused: Response | NoResponseError, reason: str) -> None:
    left = [refused, refused]
    server = Server(lambda _: left.pop() if left else None)
    outcomes = await server.all(text_rows(4))
    assert all(outcome.error is None for outcome in outcomes)
    assert server.sender.tally.retries == {reason: 2}


async def test_a_permanent_server_failure_is_the_rows_error() -> None:
    server = Server(lambda body: refusal(500, "request_failed") if "t1" in body["prompt"] else None)
    outcomes = await server.all(text_rows(4), rows_per_request=4)
    assert [outcome.error and outcome.error["status"] for outcome in outcomes] == [None, 500, None, None]


async def test_a_row_that_must_not_be_retried_fails_at_once() -> None:
    server = Server(lambda body: refusal(429, x_should_retry="false") if "t1" in body["prompt"] else None)
    outcomes = await server.all(text_rows(2))
    assert [outcome.error and outcome.error["code"] for outcome in outcomes] == [None, "c"]


async def test_a_missing_soft_prompt_of_a_row_is_the_rows_error() -> None:
    server = Server(lambda body: refusal(404, "prompt_not_found") if body["model"] == "gone" else None)
    rows = [Row(0, 1, {"text": "a"}, "text"), Row(1, 2, {"text": "b", "model": "gone"}, "text")]
    outcomes = await server.all(rows)
    assert [outcome.error and outcome.error["code"] for outcome in outcomes] == [None, "prompt_not_found"]


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
async def test_an_error_of_every_row_ends_the_run(status: int) -> None:
    with pytest.raises(SenderError, match=f"m{status}") as failed:
        await Server(lambda _: refusal(status)).all(text_rows(4))
    assert failed.value.status == status


async def test_a_server_without_answers_ends_the_run_after_a_while() -> None:
    with pytest.raises(SenderError, match="no response for 0.02 s; last error: .* cannot be reached: off"):
        await Server(lambda _: NoResponseError("off")).all(text_rows(4), patience=0.02)


async def test_a_request_that_times_out_is_sent_again() -> None:
    server = Server()
    slow = [True]

    async def answer(path: str, body: dict[str, Any]) -> Response:
        if slow:
            slow.pop()
            await asyncio.sleep(30)
        return await server.answer(path, body)

    sender = Sender(FakeTransport(answer), RequestTemplate(model="a"), SendLimits(timeout=0.05))
    outcomes = [outcome async for given in sender.outcomes(iter(text_rows(1))) for outcome in given]
    assert outcomes[0].error is None
    assert sender.tally.retries == {"timeout": 1}


@pytest.mark.parametrize("reply", ["<html>", "[]", '{"choices": []}', '{"choices": [{"index": 0}], "usage": {}}'])
async def test_the_error_says_that_it_is_not_a_prelude_server(reply: str) -> None:
    async def answer(_path: str, _body: dict[str, Any]) -> Response:
        return Response(200, {}, reply.encode())

    sender = Sender(FakeTransport(answer), RequestTemplate(model="a"), SendLimits())
    with pytest.raises(SenderError) as failed:
        async for _ in sender.outcomes(iter(text_rows(1))):
            pass
    assert failed.value.code == "not_prelude"


async def test_closing_the_sender_cancels_its_requests() -> None:
    begun, ended = [], []

    async def answer(_path: str, body: dict[str, Any]) -> Response:
        begun.append(body)
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(body)
        raise AssertionError

    sender = Sender(FakeTransport(answer), RequestTemplate(model="a"), SendLimits(rows_per_request=2))
    task = asyncio.create_task(anext(sender.outcomes(iter(text_rows(6)))))
    await until(lambda: len(begun) == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 3


async def test_the_concurrency_falls_when_the_server_is_full_and_recovers() -> None:
    server = Server()
    server.refuse = lambda _: refusal(429, "overloaded") if server.in_flight > 20 else None
    outcomes = await server.all(text_rows(400), concurrency=64, rows_per_request=4)
    assert all(outcome.error is None for outcome in outcomes)
    assert server.sender.tally.retries["overloaded"] > 0
