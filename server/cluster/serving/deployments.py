"""What Ray Serve runs: replicas that each run a whole server, and doors."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import ray
import uvicorn
from ray.serve import get_app_handle
from ray.serve.handle import DeploymentHandle

from server import logs
from server.api.http.connections import ConnectionLimits, limited
from server.api.http.hosts import Hosts
from server.api.http.origins import Origins
from server.api.http.refusal_log import RefusalLog
from server.api.keys.key_file import read_keys
from server.api.keys.keys import ApiKeys, is_loopback
from server.api.keys.secret_file import read_secret
from server.api.keys.signed_callers import CallerSigner
from server.cluster.config import ClusterConfig
from server.cluster.ingress.app import Door, DoorSettings
from server.cluster.ingress.known_fleets import addresses_of, fleet_of
from server.cluster.ingress.replicas import Address, SharedFleet, Wish, no_replica
from server.cluster.ingress.resolver import CatalogNames, Resolver
from server.cluster.ingress.upstream import http_session
from server.cluster.replica.arguments import app_name, environment_of, secrets_of, serve_arguments
from server.cluster.replica.process import Place, Report, ServerProcess
from server.cluster.routing.ranking import ReplicaRanking, short
from server.errors import EngineStartError, NotFoundError
from server.tracing import IngressTracer

logger = logging.getLogger(__name__)

_KEYS_SECONDS = 2.0
_CLOSE_SECONDS = 5
_CHOICE_SECONDS = 1.0
"""Seconds in which a choice among running replicas is made, however busy this process is."""


class Replica:
    """One replica: starts a server process, reports for it, and ends it.

    Args:
        config: The cluster.
        base: Name of the base that it serves.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: ClusterConfig, base: str
    ) -> None:
        self._config = config
        self._base = next(one for one in config.bases if one.name == base)
        is_local = config.ray_address is None
        host = config.replica_host or ("127.0.0.1" if is_local else ray.util.get_node_ip_address())
        self._place = Place(config.directory, base, None if is_local else socket.gethostname())
        secrets = secrets_of(config)
        self._server = ServerProcess(
            self._place.name,
            serve_arguments(config, self._base, self._place.folder, secrets),
            environment_of(config, self._base, os.environ),
            host=host,
            signer=CallerSigner(read_secret(secrets.ingress, "ingress secret")),
            log=config.directory / "logs" / f"{self._place.name}.log",
        )
        try:
            await self._server.start(self._base.start_seconds)
        except BaseException:
            await self._server.stop(0)
            self._place.release()
            raise
        report = await self._server.report()
        if report is None:
            raise EngineStartError(f"{self._place.name} does not report")
        self._capacity = report.capacity

    def record_replica_metadata(self) -> dict[str, Any]:
        """What routers know of it for as long as it lives."""
        return {
            "name": self._server.name,
            "url": self._server.url,
            "capacity": self._capacity,
            "pid": self._server.pid,
        }

    async def record_routing_stats(self) -> dict[str, Any]:
        """What routers know of it now."""
        report = await self._server.report()
        if report is None:
            return {}
        return {"at": time.time(), "load": report.load, **_digests(report)}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas depends on."""
        report = await self._server.report()
        if report is None:
            return {"load": 0.0, "tokens_per_second": 0.0}
        return {"load": float(report.load), "tokens_per_second": self._server.tokens_per_second(report)}

    async def check_health(self) -> None:
        """Raise if the server has ended or does not answer."""
        await self._server.check()

    async def __del__(self) -> None:
        """Let running requests finish, and end the server. Ray Serve awaits this, once."""
        await self._server.stop(self._config.drain_seconds)
        self._place.release()


class Ingress:
    """One door: listens at the address of the cluster and passes requests to replicas.

    Args:
        config: The cluster.
    """

    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        logs.configure(config.log_level, "json" if config.log_format == "json" else "text", replica="ingress")
        _log_to_file(config)
        self._stack = AsyncExitStack()
        secrets = secrets_of(config)
        self._keys = None if config.api_key_file is None else ApiKeys(read_keys(config.api_key_file))
        self._config = config
        replicas = ServeReplicas(config)
        names = {base.name: CatalogNames(base.shared_catalog) for base in config.bases}
        for catalog in names.values():
            self._stack.callback(catalog.close)
        resolver = Resolver(names)
        self._stack.callback(resolver.close)
        http = await self._stack.enter_async_context(http_session())
        is_guarded = self._keys is None and is_loopback(config.host)
        endpoint = config.otlp_traces_endpoint
        tracer = None if endpoint is None else IngressTracer.to(endpoint)
        if tracer is not None:
            self._stack.push_async_callback(asyncio.to_thread, tracer.close)
        door = Door(
            replicas,
            resolver,
            self._keys,
            CallerSigner(read_secret(secrets.ingress, "ingress secret")),
            http,
            DoorSettings(
                max_body_bytes=config.max_body_bytes,
                open_metrics=config.open_metrics,
                hosts=Hosts.parse(config.allowed_host, is_guarded=is_guarded),
            ),
            tracer,
        )
        self._socket = _listen(config.host, config.port)
        self._server = uvicorn.Server(_uvicorn_config(door, config))
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="ingress")
        self._reloading = asyncio.create_task(self._reload_keys(), name="reload API keys")
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise EngineStartError(f"{config.host}:{config.port} is not served")
            await asyncio.sleep(0.01)

    async def check_health(self) -> None:
        """Raise if it does not serve any more."""
        if self._serving.done():
            raise EngineStartError("the ingress has ended")

    async def __del__(self) -> None:
        """Refuse new connections, and let running requests finish."""
        self._reloading.cancel()
        self._server.should_exit = True
        await self._serving
        await self._stack.aclose()

    async def _reload_keys(self) -> None:
        """Take a changed key file, as each replica does for itself."""
        path = self._config.api_key_file
        seen = None if path is None else path.stat().st_mtime_ns
        while path is not None and self._keys is not None:
            await asyncio.sleep(_KEYS_SECONDS)
            try:
                now = path.stat().st_mtime_ns
                if now != seen:
                    self._keys.replace(read_keys(path))
                    seen = now
                    logger.info("%d API keys were reloaded", len(self._keys))
            except Exception as error:
                logger.error("the API keys were not reloaded: %s", error)


class ServeReplicas:
    """The replicas of all bases, through the handles of Ray Serve.

    Args:
        config: The cluster.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        routing = config.routing
        self._ranking = ReplicaRanking(balance=routing.balance, patience=routing.patience, floor=routing.floor)

    @asynccontextmanager
    async def choose(self, base: str, wish: Wish) -> AsyncIterator[Address]:
        """Choose the replica that answers one request."""
        handle = self._handle(base)
        known = {state.id for state in self.fleet(base).states()}
        if wish.replica is not None and known and wish.replica not in known:
            raise NotFoundError(f"there is no replica {wish.replica!r}; GET /v1/cluster lists them")
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._config.routing.wait_seconds):
                    metadata = await self._select(stack, handle, base, wish)
            except TimeoutError:
                raise no_replica(base) from None
            yield _address(metadata)

    async def _select(
        self, stack: AsyncExitStack, handle: DeploymentHandle[Any], base: str, wish: Wish
    ) -> dict[str, Any]:
        """What Ray Serve's router knows of the replica that it chooses.

        A reservation waits in Ray Serve's queue, which starts the first replica of a stopped base. It costs a call of
        the replica's actor, so it is left out while there are replicas. If the last one stops just then, the choice
        finds none and is not in the queue, hence the second attempt.
        """
        while self.fleet(base).states():
            with suppress(TimeoutError):
                async with asyncio.timeout(_CHOICE_SECONDS):
                    chosen = await stack.enter_async_context(handle.choose_replica(wish, _reserve=False))
                    return dict(chosen.replica_metadata)
        chosen = await stack.enter_async_context(handle.choose_replica(wish))
        return dict(chosen.replica_metadata)

    def known(self, base: str) -> list[Address]:
        """The replicas of a base that run."""
        self._handle(base)
        return addresses_of(base)

    def is_ready(self, base: str) -> bool:
        """Whether requests for a base are accepted."""
        self._handle(base)
        minimum = next(one for one in self._config.bases if one.name == base).scaling.min
        return minimum == 0 or bool(self.fleet(base).states())

    def fleet(self, base: str) -> SharedFleet:
        """What is known of the replicas of a base."""
        return fleet_of(base, lambda: SharedFleet(self._ranking))

    def _handle(self, base: str) -> DeploymentHandle[Any]:
        if base not in self._handles:
            handle = get_app_handle(app_name(base))
            handle._init()  # noqa: SLF001 - begins to learn of the replicas before the first request
            self._handles[base] = handle
        return self._handles[base]


def _address(metadata: dict[str, Any]) -> Address:
    return Address(str(metadata["name"]), str(metadata["url"]))


def _digests(report: Report) -> dict[str, list[str]]:
    return {"device": [short(digest) for digest in report.device], "disk": [short(one) for one in report.disk]}


def _log_to_file(config: ClusterConfig) -> None:
    """Write this process's log beside those of the replicas, too."""
    path = config.directory / "logs" / "ingress.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    handler = logging.handlers.WatchedFileHandler(path)
    handler.setFormatter(root.handlers[0].formatter)
    root.addHandler(handler)


def _listen(host: str, port: int) -> socket.socket:
    """Listen beside another door of this machine, so that one can replace the other."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), port), family=family, backlog=2048, reuse_port=True)


def _uvicorn_config(door: Door, config: ClusterConfig) -> uvicorn.Config:
    refusals = RefusalLog()
    limits = ConnectionLimits(
        max_connections=config.max_connections,
        max_head_bytes=64 * 1024,
        head_seconds=15.0,
        stall_seconds=60.0,
        on_refused=refusals.log,
        origins=Origins(()),
    )
    return uvicorn.Config(
        door,
        http=limited(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,  # the replica's is passed on
        timeout_graceful_shutdown=int(config.drain_seconds) + _CLOSE_SECONDS,
    )
