"""The door before replicas that are plain HTTP servers in the same event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.api.inference.request_record import RequestRecord
from server.api.keys.key_file import parse_plain
from server.api.keys.keys import ApiKeys
from server.api.keys.signed_callers import INGRESS_HEADER, LOAD_HEADER, CallerKind, CallerSigner
from server.cluster.ingress.app import Door, DoorSettings
from server.cluster.ingress.replicas import Address, SharedFleet, Wish
from server.cluster.ingress.resolver import Resolver
from server.cluster.ingress.upstream import http_session
from server.cluster.routing.ranking import ReplicaRanking
from server.tracing import IngressTracer, RequestTracer
from tests.support.presence import present
from tests.support.waiting import until

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SIGNER = CallerSigner(b"s" * 32)
DEAD = Address("dead", "http://127.0.0.1:1")


class FakeReplicas:
    def __init__(self, addresses: list[Address]) -> None:
        self.addresses = {address.name: address for address in addresses}
        self.shared = SharedFleet(ReplicaRanking(random=Random(0)))
        self.shared.update(dict.fromkeys(self.addresses, 8))
        self.wishes: list[Wish] = []
        self.stopped: set[str] = set()

    @asynccontextmanager
    async def choose(self, base: str, wish: Wish) -> AsyncIterator[Address]:
        self.wishes.append(wish)
        self.stopped.discard(base)
        name = self.shared.order(wish)[0]
        self.shared.sent(name)
        yield self.addresses[name]

    def known(self, base: str) -> list[Address]:
        return [] if base in self.stopped else list(self.addresses.values())

    def is_ready(self, base: str) -> bool:
        return bool(self.addresses)

    def fleet(self, base: str) -> SharedFleet:
        return self.shared


class Client:
    """A client of an ASGI application that can go in the middle."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.leaves = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.is_finished = False

    async def ask(self, path: str, body: bytes | list[bytes] = b"", method: str = "POST", **headers: str) -> Client:
        parts = [body] if isinstance(body, bytes) else list(body)
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        raw += [(b"host", b"localhost"), (b"content-length", str(sum(map(len, parts))).encode())]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"q=1"}
        messages = [
            {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)}
            for index, part in enumerate(parts)
        ]

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await self.leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                self.chunks.append(message["body"])
                self.is_finished = not message.get("more_body", False)

        await self._door(scope | {"headers": raw}, receive, send)
        return self

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


@asynccontextmanager
async def door(
    *handlers: Handler,
    keys: tuple[str, ...] = (),
    dead: bool = False,
    digests: dict[str, str] | None = None,
    tracer: IngressTracer | None = None,
    bases: tuple[str, ...] = ("demo",),
) -> AsyncIterator[SimpleNamespace]:
    async with AsyncExitStack() as stack:
        addresses = []
        for index, handler in enumerate(handlers):
            application = web.Application(client_max_size=2**30)
            application.router.add_route("*", "/{path:.*}", handler)
            runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            addresses.append(Address(f"r{index}", f"http://{host}:{port}"))
        replicas = FakeReplicas(addresses + [DEAD] * dead)
        found: Any = SimpleNamespace(choose=lambda ref, access, key: (_version((digests or {})[ref.name]), None))
        resolver = Resolver(dict.fromkeys(bases, found))
        stack.callback(resolver.close)
        http = await stack.enter_async_context(http_session())
        known = ApiKeys(parse_plain((f"key {key}", key) for key in keys)) if keys else None
        made = Door(replicas, resolver, known, SIGNER, http, DoorSettings(max_body_bytes=1000), tracer)
        yield SimpleNamespace(door=made, replicas=replicas, client=lambda: Client(made))


def _version(digest: str) -> Any:
    return SimpleNamespace(digest=digest, kind="soft_prompt")


async def echo(request: web.Request) -> web.StreamResponse:
    """Say what arrived."""
    body = await request.read()
    signed = SIGNER.check(
        request.headers.get(INGRESS_HEADER),
        method=request.method,
        target=request.raw_path.encode(),
        request_id=request.headers["x-request-id"],
    )
    trace = request.headers.getall("traceparent", [])
    seen = {"size": len(body), "kind": signed.kind, "key": signed.key, "trace": trace}
    headers = {"retry-after": "7", "retry-after-ms": "6500", LOAD_HEADER: "5", "x-request-id": "from-replica"}
    return web.json_response(seen | {"host": request.headers["host"]}, status=429, headers=headers)


def test_an_answer_passes_unchanged() -> None:
    async def run() -> None:
        async with door(echo) as there:
            trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            client = await there.client().ask("/v1/prompts", [b"x" * 70_000] * 50, traceparent=trace)
            assert (client.status, client.is_finished) == (429, True)
            assert (client.headers["retry-after"], client.headers["retry-after-ms"]) == ("7", "6500")
            assert (client.headers["x-request-id"], client.headers["x-prelude-replica"]) == ("from-replica", "r0")
            assert LOAD_HEADER not in client.headers
            seen = json.loads(client.body)
            assert seen == {"size": 3_500_000, "kind": "unknown", "key": "", "trace": [trace], "host": "localhost"}
            assert there.replicas.shared.states()[0].load == 4  # as the replica said, without the request that ended

    asyncio.run(run())


def test_keys_are_checked_once() -> None:
    async def run() -> None:
        async with door(echo, keys=("k1",)) as there:
            client = await there.client().ask("/v1/me", authorization="Bearer k1")
            assert json.loads(client.body)["kind"] == "key"
            assert json.loads(client.body)["key"].startswith("key-")
            wrong = await there.client().ask("/v1/me", authorization="Bearer k2")
            assert (wrong.status, wrong.code) == (401, "invalid_api_key")
            assert json.loads((await there.client().ask("/v1/me")).body)["kind"] == CallerKind.UNKNOWN
            assert (await there.client().ask("/v1/cluster", method="GET")).status == 401
            state = await there.client().ask("/v1/cluster", method="GET", authorization="Bearer k1")
            assert [one["name"] for one in json.loads(state.body)["bases"][0]["replicas"]] == ["r0"]
            forged = await there.client().ask("/v1/me", **{"x-prelude-ingress": "forged"})
            assert json.loads(forged.body)["kind"] == CallerKind.UNKNOWN

    asyncio.run(run())


def test_names_decide_and_large_bodies_pass() -> None:
    async def run() -> None:
        async with door(echo, digests={"intent": "a" * 64}) as there:
            body = json.dumps({"model": "intent", "prompt": "x"}).encode()
            small = await there.client().ask("/v1/completions", [body[:5], body[5:]])
            large = await there.client().ask("/v1/completions", [body, b" " * 5000])
            assert [json.loads(one.body)["size"] for one in (small, large)] == [len(body), len(body) + 5000]
            assert [wish.digest for wish in there.replicas.wishes] == ["a" * 16, None]

    asyncio.run(run())


def test_a_replica_that_cannot_be_connected_is_left() -> None:
    async def run() -> None:
        async with door(echo, dead=True) as there:
            for _ in range(4):
                assert (await there.client().ask("/v1/prompts", [b"x"] * 3)).status == 429
        async with door(dead=True) as there:
            client = await there.client().ask("/v1/prompts", b"x")
            assert (client.status, client.code, "retry-after" in client.headers) == (503, "engine_dead", True)

    asyncio.run(run())


def events(number: int, *, dies: bool, pause: float = 0.0) -> Handler:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for index in range(number):
            await response.write(f"data: {index}\n\n".encode())
            await asyncio.sleep(pause)
        if dies:
            assert request.transport is not None
            request.transport.abort()
        return response

    return stream


def test_a_stream_whose_replica_is_lost_ends_with_one_error() -> None:
    async def run() -> None:
        async with door(events(3, dies=True)) as there:
            client = await there.client().ask("/v1/completions", b"{}")
            *good, last, end = client.body.split(b"\n\n")
            assert (good, end, client.is_finished) == ([b"data: 0", b"data: 1", b"data: 2"], b"", True)
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_dead"
        async with door(events(2, dies=False)) as there:
            assert (await there.client().ask("/v1/completions", b"{}")).body == b"data: 0\n\ndata: 1\n\n"

    asyncio.run(run())


def test_a_client_that_goes_ends_the_request_at_the_replica() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def endless(request: web.Request) -> web.StreamResponse:
            try:
                return await events(10_000, dies=False, pause=0.005)(request)
            finally:
                ended.set()

        async with door(endless) as there:
            client = there.client()
            asking = asyncio.create_task(client.ask("/v1/completions", b"{}"))
            await until(lambda: len(client.chunks) >= 3)
            client.leaves.set()
            await asyncio.wait_for(ended.wait(), 5)
            await asking
            assert not client.is_finished
            assert there.replicas.shared.states()[0].load == 0

    asyncio.run(run())


def test_metrics_of_all_replicas_have_a_label() -> None:
    async def metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(text="# TYPE prelude_x gauge\nprelude_x 1.0\n")

    async def run() -> None:
        async with door(metrics, metrics, dead=True) as there:
            text = (await there.client().ask("/metrics", method="GET")).body.decode()
            assert 'prelude_x{replica="r0"} 1.0\nprelude_x{replica="r1"} 1.0' in text
            assert "prelude_ingress_requests_running 1.0" in text
            assert (await there.client().ask("/ready", method="GET")).status == 200

    asyncio.run(run())


async def engine(request: web.Request) -> web.StreamResponse:
    """A replica's ``/v1/engine``, for those who may see it."""
    return web.json_response({}, status=200 if "cookie" in request.headers else 401)


def test_who_may_see_the_engine_sees_the_names_of_the_replicas() -> None:
    async def run() -> None:
        async with door(engine, engine) as there:
            seen = await there.client().ask("/v1/engine", method="GET", cookie="session=1")
            assert (seen.status, seen.headers["x-prelude-replicas"]) == (200, "r0, r1")
            refused = await there.client().ask("/v1/engine", method="GET")
            assert (refused.status, "x-prelude-replicas" in refused.headers) == (401, False)
            other = await there.client().ask("/v1/stats", method="GET", cookie="session=1")
            assert "x-prelude-replicas" not in other.headers

    asyncio.run(run())


def test_a_list_of_models_starts_the_first_base_only() -> None:
    async def models(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "one", "parent": None}, {"id": "task", "parent": "one"}]})

    async def run() -> None:
        async with door(models, bases=("one", "two")) as there:
            there.replicas.stopped = {"one", "two"}
            client = await there.client().ask("/v1/models", method="GET")
            cards = {card["id"]: card for card in json.loads(client.body)["data"]}
            assert list(cards) == ["one", "two", "task"]
            assert cards["two"]["root"] == "two"
            assert there.replicas.stopped == {"two"}

    asyncio.run(run())


def test_a_replica_that_is_named_decides_the_base() -> None:
    async def run() -> None:
        async with door(echo) as there:
            await there.client().ask("/v1/stats", method="GET", **{"x-prelude-replica": "r0"})
            await there.client().ask("/v1/stats", method="GET", **{"x-prelude-replica": "gone"})
            assert [wish.replica for wish in there.replicas.wishes] == ["r0", "gone"]
            assert (there.door.base_of("r0"), there.door.base_of("gone")) == ("demo", None)

    asyncio.run(run())


TRACE = "0af7651916cd43dd8448eb211c80319c"


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def test_the_spans_of_a_replica_are_children_of_the_span_of_the_ingress() -> None:
    exporter = InMemorySpanExporter()

    async def run() -> None:
        async with door(echo, tracer=IngressTracer(SimpleSpanProcessor(exporter))) as there:
            body = b'{"prompt": "a secret"}'
            caller = f"00-{TRACE}-b7ad6b7169203331-01"
            client = await there.client().ask("/v1/completions", body, traceparent=caller, tracestate="x=1")
            (passed,) = json.loads(client.body)["trace"]
            record = RequestRecord(
                request_id="r", method="POST", path="/v1/completions", traceparent=passed, operation="chat", model="m"
            )
            RequestTracer(SimpleSpanProcessor(exporter)).observe(record)
            ours, replicas = exporter.get_finished_spans()
            assert {f"{span.context.trace_id:032x}" for span in (ours, replicas)} == {TRACE}
            assert (ours.name, ours.kind, parent_of(ours)) == ("POST /v1/completions", SpanKind.SERVER, caller[36:52])
            assert parent_of(replicas) == f"{ours.context.span_id:016x}"
            assert ours.resource.attributes["service.name"] == "prelude-ingress"
            assert present(ours.attributes) == {
                "http.request.method": "POST",
                "http.route": "/v1/completions",
                "http.response.status_code": 429,
                "prelude.base": "demo",
                "prelude.replica": "r0",
            }

    asyncio.run(run())


def test_a_trace_begins_at_the_ingress_if_the_client_has_none() -> None:
    exporter = InMemorySpanExporter()

    async def run() -> None:
        async with door(echo, tracer=IngressTracer(SimpleSpanProcessor(exporter))) as there:
            for headers in ({}, {"traceparent": "malformed"}):
                client = await there.client().ask("/v1/completions", b"{}", **headers)
                span = exporter.get_finished_spans()[-1]
                (passed,) = json.loads(client.body)["trace"]
                assert passed[:53] == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-"
                assert (int(passed[53:], 16) & 1, parent_of(span)) == (1, None)
            unsampled = f"00-{TRACE}-b7ad6b7169203331-00"
            client = await there.client().ask("/v1/completions", b"{}", traceparent=unsampled)
            (passed,) = json.loads(client.body)["trace"]
            assert passed.startswith(f"00-{TRACE}-")
            assert passed.endswith("-00")  # the client decides what is sampled
            other = await there.client().ask("/v1/prompts", b"{}", traceparent=unsampled)
            assert json.loads(other.body)["trace"] == [unsampled]
            assert len(exporter.get_finished_spans()) == 2
        async with door(echo, keys=("k",), dead=True, tracer=IngressTracer(SimpleSpanProcessor(exporter))) as there:
            assert (await there.client().ask("/v1/completions", b"{}", authorization="Bearer no")).status == 401
            refused = exporter.get_finished_spans()[-1]
            assert present(refused.attributes)["http.response.status_code"] == 401
            assert refused.status.status_code is StatusCode.UNSET
        async with door(dead=True, tracer=IngressTracer(SimpleSpanProcessor(exporter))) as there:
            assert (await there.client().ask("/v1/completions", b"{}")).status == 503
            failed = exporter.get_finished_spans()[-1]
            assert present(failed.attributes)["error.type"] == "503"
            assert failed.status.status_code is StatusCode.ERROR

    asyncio.run(run())


def test_a_list_of_models_needs_the_key_of_which_the_first_base_knows() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"code": "invalid_api_key"}}, status=401)

    async def run() -> None:
        async with door(refuse, bases=("one", "two"), keys=("k",)) as there:
            there.replicas.stopped = {"two"}
            client = await there.client().ask("/v1/models", method="GET")
            assert (client.status, client.code) == (401, "invalid_api_key")
            assert there.replicas.stopped == {"two"}

    asyncio.run(run())
