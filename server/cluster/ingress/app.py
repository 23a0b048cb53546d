"""The door as an ASGI application: checks the key, chooses a replica, and passes the request on."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import aiohttp
import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.errors import describe
from server.api.http.answers import PROTECTIVE_HEADERS
from server.api.http.disconnect import CLIENT_CLOSED_REQUEST, ClientDisconnected
from server.api.http.hosts import Hosts
from server.api.http.request_ids import request_id_of
from server.api.keys.callers import Caller
from server.api.keys.callers import Scope as Permission
from server.api.keys.keys import ApiKeys
from server.api.keys.signed_callers import INGRESS_HEADER, CallerKind, CallerSigner, target_of
from server.cluster.ingress.heads import REPLICAS_HEADER, RequestHead, names_in_body, read_head
from server.cluster.ingress.merging import merged_metrics, merged_models, stopped_base
from server.cluster.ingress.replicas import Address, Replicas, Wish
from server.cluster.ingress.resolver import Resolver, Route
from server.cluster.ingress.upstream import (
    TRACE_HEADERS,
    Exchange,
    ReplicaLostError,
    ReplicaUnreachableError,
    RequestBody,
)
from server.errors import (
    AuthenticationError,
    EngineDeadError,
    EngineNotReadyError,
    MisdirectedRequestError,
    PermissionDeniedError,
)
from server.logs import FIELDS
from server.tracing import IngressSpan, IngressTracer

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_GATHER_SECONDS = 5.0
_POLLED = frozenset({"/live", "/ready", "/health", "/metrics"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSettings:
    """The settings of a door.

    Attributes:
        max_body_bytes: Largest body that is read for the names in it.
        open_metrics: Whether metrics need no key.
        hosts: The accepted names in the Host header; None accepts any.
    """

    max_body_bytes: int
    open_metrics: bool = False
    hosts: Hosts | None = None


class DoorMetrics:
    """Metrics of a door."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "prelude_ingress_requests_total",
            "Requests of the ingress by base and status.",
            ("base", "status"),
            registry=self.registry,
        )
        self.routed = Counter(
            "prelude_ingress_routed_total",
            "Requests by where their soft prompt was at the chosen replica: device, disk, cold, or base without one.",
            ("base", "found"),
            registry=self.registry,
        )
        self.retries = Counter(
            "prelude_ingress_retries_total",
            "Attempts after a replica could not be reached.",
            ("base",),
            registry=self.registry,
        )
        self.running = Gauge(
            "prelude_ingress_requests_running", "Requests that are being answered.", registry=self.registry
        )
        self.choice = Histogram(
            "prelude_ingress_choice_seconds",
            "Time from a request's head to the choice of its replica.",
            registry=self.registry,
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0, 10.0, 100.0),
        )


class ReplicaState(msgspec.Struct, kw_only=True):
    """A replica in ``GET /v1/cluster``."""

    name: str
    url: str
    load: int
    capacity: int
    on_device: int
    on_disk: int


class BaseState(msgspec.Struct, kw_only=True):
    """A base in ``GET /v1/cluster``."""

    name: str
    ready: bool
    replicas: list[ReplicaState]


class ClusterState(msgspec.Struct, kw_only=True):
    """The answer of ``GET /v1/cluster``."""

    bases: list[BaseState]
    object: str = "cluster"


class Door:
    """An ASGI application that passes requests to replicas.

    Args:
        replicas: The replicas of all bases.
        resolver: From names to bases and digests.
        keys: The accepted keys; None serves every client.
        signer: Signs callers for the replicas.
        http: Connections to the replicas.
        settings: The settings.
        tracer: Writes a span for each request that uses a model; None passes the headers of traces on.
    """

    def __init__(
        self,
        replicas: Replicas,
        resolver: Resolver,
        keys: ApiKeys | None,
        signer: CallerSigner,
        http: aiohttp.ClientSession,
        settings: DoorSettings,
        tracer: IngressTracer | None = None,
    ) -> None:
        self._replicas = replicas
        self._resolver = resolver
        self._keys = keys
        self._signer = signer
        self._http = http
        self._settings = settings
        self._tracer = tracer
        self.metrics = DoorMetrics()
        for base in resolver.bases:
            self.metrics.retries.labels(base)  # 0, not missing, before the first one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise TypeError(f"a door answers HTTP requests only, not {scope['type']}")
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id", b"").decode("latin-1"))
        call = _Call(self, scope, receive, send, headers, request_id)
        self.metrics.running.inc()
        try:
            await call.run()
        finally:
            self.metrics.running.dec()

    # What a call needs

    def authenticate(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        """The owner of the key that a request has; None if it has none, or none is needed.

        Raises:
            AuthenticationError: If the key is not valid.
            MisdirectedRequestError: If it is for another host.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if self._settings.hosts is not None and host not in self._settings.hosts:
            raise MisdirectedRequestError(f"the host {host[:200]!r} is not served here")
        authorization = headers.get(b"authorization")
        if self._keys is None or authorization is None:
            return None
        return self._keys.check(authorization.decode("latin-1"))

    def sign(self, caller: Caller | None, scope: Scope, request_id: str) -> str:
        """The signature of a request."""
        kind = CallerKind.UNKNOWN if caller is None else CallerKind.KEY
        return self._signer.sign(
            kind,
            "" if caller is None or caller.name is None else caller.name,
            method=scope["method"],
            target=target_of(scope["raw_path"], scope["query_string"]),
            request_id=request_id,
        )

    def begin_span(self, scope: Scope, headers: Mapping[bytes, bytes]) -> IngressSpan | None:
        """The span of a request; None for one that is not traced."""
        if self._tracer is None or not names_in_body(scope["method"], scope["path"]):
            return None
        found = {name.decode(): headers[name].decode("latin-1") for name in TRACE_HEADERS if name in headers}
        return self._tracer.begin(scope["method"], scope["path"], found)

    async def route(self, head: RequestHead, caller: Caller | None) -> Route:
        """Where a request goes."""
        return await self._resolver.route(head, None if caller is None else caller.access)

    @property
    def http(self) -> aiohttp.ClientSession:
        """Connections to the replicas."""
        return self._http

    @property
    def replicas(self) -> Replicas:
        """The replicas."""
        return self._replicas

    @property
    def bases(self) -> frozenset[str]:
        """Names of the bases."""
        return self._resolver.bases

    def replica_names(self) -> list[str]:
        """Names of the replicas of all bases."""
        return sorted(address.name for base in self.bases for address in self._replicas.known(base))

    def base_of(self, replica: str) -> str | None:
        """The base that a replica serves; None if it is not known."""
        for base in self._resolver.order:
            if any(address.name == replica for address in self._replicas.known(base)):
                return base
        return None

    @property
    def max_body_bytes(self) -> int:
        """Largest body that is read for the names in it."""
        return self._settings.max_body_bytes

    # What the door answers itself

    async def own_answer(self, scope: Scope, caller: Caller | None, request_id: str) -> Response | None:
        """The answer of a request that no single replica could answer; None for all others.

        Raises:
            AuthenticationError: If it needs a key.
            PermissionDeniedError: If it needs a key with another scope.
            EngineNotReadyError: If the cluster is not ready.
        """
        if scope["method"] not in ("GET", "HEAD"):
            return None
        match scope["path"]:
            case "/live":
                return _json({"status": "live"})
            case "/ready" | "/health":
                waiting = sorted(base for base in self.bases if not self._replicas.is_ready(base))
                if waiting:
                    raise EngineNotReadyError(f"no replica is ready of: {', '.join(waiting)}")
                return _json({"status": "ready", "store": "available"})
            case "/metrics":
                if not self._settings.open_metrics:
                    self._require(caller, Permission.ADMIN)
                return Response(await self._all_metrics(), headers={"content-type": "text/plain; version=0.0.4"})
            case "/v1/cluster":
                self._require(caller, Permission.ADMIN)
                return Response(msgspec.json.encode(self.state()), media_type="application/json")
            case "/v1/models" if len(self.bases) > 1:
                return await self._all_models(caller, request_id)
        return None

    def state(self) -> ClusterState:
        """The replicas of all bases."""
        found = []
        for base in sorted(self.bases):
            urls = {address.name: address.url for address in self._replicas.known(base)}
            replicas = [
                ReplicaState(
                    name=state.id,
                    url=urls.get(state.id, ""),
                    load=state.load,
                    capacity=state.capacity,
                    on_device=len(state.warm),
                    on_disk=len(state.stored),
                )
                for state in self._replicas.fleet(base).states()
            ]
            found.append(BaseState(name=base, ready=self._replicas.is_ready(base), replicas=replicas))
        return ClusterState(bases=found)

    def _require(self, caller: Caller | None, permission: Permission) -> None:
        if self._keys is None:
            return
        if caller is None:
            raise AuthenticationError("an API key is required: send 'Authorization: Bearer KEY'")
        if permission not in caller.scopes:
            raise PermissionDeniedError(f"this requires an API key with the scope {permission}", scopes=[permission])

    async def _all_metrics(self) -> str:
        addresses = [address for base in sorted(self.bases) for address in self._replicas.known(base)]
        answers = await asyncio.gather(*(self._ask(address, "/metrics", CallerKind.CLUSTER) for address in addresses))
        texts = {
            address.name: answer[1].decode()
            for address, answer in zip(addresses, answers, strict=True)
            if answer is not None and answer[0] == 200
        }
        return merged_metrics(texts) + generate_latest(self.metrics.registry).decode()

    async def _all_models(self, caller: Caller | None, request_id: str) -> Response:
        """The models of all bases; an error of one replica is the answer.

        The first base is started for it if it is stopped, because a replica checks the caller's scopes. A list starts
        no other base: of a stopped one it has the name.
        """
        bodies: list[bytes] = []
        name = "" if caller is None or caller.name is None else caller.name
        kind = CallerKind.UNKNOWN if caller is None else CallerKind.KEY
        for base in self._resolver.order:
            if bodies and not self._replicas.known(base):
                bodies.append(stopped_base(base))
                continue
            async with self._replicas.choose(base, Wish()) as address:
                answer = await self._ask(address, "/v1/models", kind, name=name, request_id=request_id)
            if answer is None:
                raise EngineDeadError(f"the replica {address.name} does not answer")
            status, body = answer
            if status != 200:
                return Response(body, status, media_type="application/json")
            bodies.append(body)
        return Response(merged_models(bodies), media_type="application/json")

    async def _ask(
        self, address: Address, path: str, kind: CallerKind, *, name: str = "", request_id: str | None = None
    ) -> tuple[int, bytes] | None:
        """Ask a replica on behalf of the door; None if it does not answer."""
        request_id = request_id or uuid.uuid4().hex
        signature = self._signer.sign(kind, name, method="GET", target=path.encode(), request_id=request_id)
        headers = {INGRESS_HEADER: signature, "x-request-id": request_id, "host": "localhost"}
        try:
            async with (
                asyncio.timeout(_GATHER_SECONDS),
                self._http.get(address.url + path, headers=headers) as response,
            ):
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            logger.warning("the replica %s does not answer %s", address.name, path)
            return None


class _Call:
    """The life of one request at the door."""

    def __init__(
        self, door: Door, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes], request_id: str
    ) -> None:
        self._door = door
        self._scope = scope
        self._receive = receive
        self._client = send
        self._headers = headers
        self._request_id = request_id
        self._began = time.monotonic()
        self._status = CLIENT_CLOSED_REQUEST
        self._started = False
        self._base = ""
        self._replica = ""
        self._span = door.begin_span(scope, headers)

    async def run(self) -> None:
        """Answer, or report what is wrong."""
        try:
            await self._answer()
        except ClientDisconnected:
            pass
        except Exception as error:
            if self._started:
                self._log()
                raise  # the connection closes, so that the client notices the incomplete answer
            reply = describe(error, request_id=self._request_id)
            await self._own(reply.response())
        self._log()

    async def _answer(self) -> None:
        caller = self._door.authenticate(self._headers)
        own = await self._door.own_answer(self._scope, caller, self._request_id)
        if own is not None:
            await self._own(own)
            return
        body = RequestBody(self._receive)
        content = None
        if names_in_body(self._scope["method"], self._scope["path"]):
            content = await body.read(self._door.max_body_bytes)
        query = self._scope["query_string"]
        head = read_head(self._scope["path"], self._headers, content, self._door.bases, query)
        if head.replica is not None and head.base is None:
            head = replace(head, base=self._door.base_of(head.replica))
        route = await self._door.route(head, caller)
        self._base = route.base
        wish = Wish(digest=route.digest, home=head.home, replica=head.replica)
        signature = self._door.sign(caller, self._scope, self._request_id)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            is_last = attempt == _MAX_ATTEMPTS
            try:
                await self._try(body, wish, signature)
            except ReplicaUnreachableError as error:
                if is_last or not body.can_be_sent:
                    raise EngineDeadError("the replica cannot be reached", retry_after=1.0) from error
            except ReplicaLostError as error:
                # Only what changes nothing is sent again: the lost replica may have done it.
                if is_last or not (content is not None or self._scope["method"] in ("GET", "HEAD")):
                    raise EngineDeadError("the replica ended before it answered", retry_after=1.0) from error
            else:
                return
            self._door.metrics.retries.labels(self._base).inc()

    async def _try(self, body: RequestBody, wish: Wish, signature: str) -> None:
        fleet = self._door.replicas.fleet(self._base)
        chosen_at = time.monotonic()
        async with self._door.replicas.choose(self._base, wish) as address:
            self._door.metrics.choice.observe(time.monotonic() - chosen_at)
            self._replica = address.name
            self._door.metrics.routed.labels(self._base, fleet.found(address.name, wish.digest)).inc()
            exchange = Exchange(
                self._door.http,
                self._scope,
                body,
                self._send,
                signature=signature,
                request_id=self._request_id,
                trace={} if self._span is None else self._span.headers,
                on_answer=lambda load: fleet.answered(address.name, load),
            )
            try:
                await exchange.run(address)
            except (ReplicaUnreachableError, ReplicaLostError):
                fleet.shun(address.name)
                raise
            finally:
                fleet.ended(address.name)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._status = message["status"]
            if self._scope["path"] == "/v1/engine" and self._status == 200:
                message["headers"].append((REPLICAS_HEADER, ", ".join(self._door.replica_names()).encode()))
        await self._client(message)

    async def _own(self, response: Response) -> None:
        response.headers["x-request-id"] = self._request_id
        for name, value in PROTECTIVE_HEADERS:
            response.headers.setdefault(name, value)
        await response(self._scope, self._receive, self._send)

    def _log(self) -> None:
        if self._span is not None:
            self._span.end(status=self._status, base=self._base, replica=self._replica)
        self._door.metrics.requests.labels(self._base, self._status).inc()
        level = logging.DEBUG if self._scope["path"] in _POLLED else logging.INFO
        seconds = time.monotonic() - self._began
        fields = {
            "request_id": self._request_id,
            "status": self._status,
            "replica": self._replica,
            "base": self._base,
        }
        logger.log(
            level,
            "%s %s %d by %s in %.3f s (%s)",
            self._scope["method"],
            self._scope["raw_path"].decode("latin-1"),
            self._status,
            self._replica or "the ingress",
            seconds,
            self._request_id,
            extra={FIELDS: {**fields, "seconds": round(seconds, 4)}},
        )


def _json(content: Mapping[str, str] | Sequence[str]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
