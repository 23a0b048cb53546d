"""Replicas behind an ingress without Ray: the door and the server processes that Ray Serve would run."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn

from server.api.keys.secret_file import read_secret
from server.api.keys.signed_callers import CallerSigner
from server.cluster.config import Base, ClusterConfig
from server.cluster.ingress.app import Door, DoorSettings
from server.cluster.ingress.replicas import Address, SharedFleet, Wish
from server.cluster.ingress.resolver import CatalogNames, Resolver
from server.cluster.ingress.upstream import http_session
from server.cluster.replica.arguments import environment_of, secrets_of, serve_arguments
from server.cluster.replica.process import Place, ServerProcess
from server.cluster.routing.ranking import ReplicaRanking, short
from server.demo.tour import MODEL_DIRECTORY
from tests.support.processes import free_port
from tests.support.serving import BASE
from tests.support.waiting import wait_until

_REPORT_SECONDS = 0.3


class StartedReplicas:
    """The replicas of one base, which all run already."""

    def __init__(self, servers: list[ServerProcess], capacity: int) -> None:
        self._servers = servers
        self._addresses = {server.name: Address(server.name, server.url) for server in servers}
        self._fleet = SharedFleet(ReplicaRanking(floor=1))
        self._fleet.update(dict.fromkeys(self._addresses, capacity))

    @asynccontextmanager
    async def choose(self, base: str, wish: Wish) -> AsyncIterator[Address]:
        name = self._fleet.order(wish)[0]
        self._fleet.sent(name)
        yield self._addresses[name]

    def known(self, base: str) -> list[Address]:
        return list(self._addresses.values())

    def is_ready(self, base: str) -> bool:
        return True

    def fleet(self, base: str) -> SharedFleet:
        return self._fleet

    async def keep_reporting(self) -> None:
        while True:
            for server in self._servers:
                report = await server.report()
                if report is not None:
                    warm, stored = map(short, report.device), map(short, report.disk)
                    self._fleet.report(
                        server.name, object(), load=report.load, warm=frozenset(warm), stored=frozenset(stored)
                    )
            await asyncio.sleep(_REPORT_SECONDS)


@contextmanager
def ingress_without_ray(folder: Path, catalog: str, number: int = 2) -> Iterator[str]:
    """An ingress with replicas of the demo; yields its URL.

    Args:
        folder: For files and logs.
        catalog: URL of a PostgreSQL database.
        number: Number of replicas.
    """
    flags = {"kv-cache-memory": "64MiB", "num-threads": 1}
    base = Base.model_validate(
        {
            "name": BASE,
            "model": str(MODEL_DIRECTORY),
            "store": str(folder / "store"),
            "catalog": catalog,
            "flags": flags,
        }
    )
    config = ClusterConfig(bases=[base], directory=folder, drain_seconds=1, port=free_port())
    server: list[uvicorn.Server] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_serve(config, number, server))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="ingress")
    thread.start()
    try:
        wait_until(lambda: bool(failures) or (bool(server) and server[0].started), 240)
        if failures:
            raise failures[0]
        yield f"http://127.0.0.1:{config.port}"
    finally:
        for one in server:
            one.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


async def _serve(config: ClusterConfig, number: int, server: list[uvicorn.Server]) -> None:
    (base,) = config.bases
    secrets = secrets_of(config)
    signer = CallerSigner(read_secret(secrets.ingress, "ingress secret"))
    async with AsyncExitStack() as stack:
        servers = []
        for _ in range(number):
            place = Place(config.directory, base.name)
            stack.callback(place.release)
            one = ServerProcess(
                place.name,
                serve_arguments(config, base, place.folder, secrets),
                environment_of(config, base, os.environ),
                host="127.0.0.1",
                signer=signer,
                log=config.directory / f"{place.name}.log",
            )
            stack.push_async_callback(one.stop, config.drain_seconds)
            servers.append(one)
        await asyncio.gather(*(one.start(base.start_seconds) for one in servers))
        report = await servers[0].report()
        assert report is not None
        replicas = StartedReplicas(servers, report.capacity)
        names = CatalogNames(base.shared_catalog)
        stack.callback(names.close)
        resolver = Resolver({base.name: names})
        stack.callback(resolver.close)
        http = await stack.enter_async_context(http_session())
        door = Door(replicas, resolver, None, signer, http, DoorSettings(max_body_bytes=config.max_body_bytes))
        reporting = asyncio.create_task(replicas.keep_reporting())
        stack.callback(reporting.cancel)
        settings = uvicorn.Config(
            door, host="127.0.0.1", port=config.port, lifespan="off", log_config=None, ws="none"
        )
        server.append(uvicorn.Server(settings))
        await server[0].serve()
