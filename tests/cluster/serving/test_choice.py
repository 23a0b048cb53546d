"""The choice of a replica through Ray Serve's handles, which are fakes here."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from server.cluster.config import Base, ClusterConfig, Routing
from server.cluster.ingress import known_fleets
from server.cluster.ingress.replicas import Address, Wish
from server.errors import EngineNotReadyError, NotFoundError

pytest.importorskip("ray", reason="Ray is not installed: make test-cluster installs it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own code
    from server.cluster.serving import deployments

METADATA = {"name": "base-0", "url": "http://127.0.0.1:1", "capacity": 8, "pid": 1}


class FakeHandle:
    """Chooses at once if it ``answers``; a reservation starts a replica."""

    def __init__(self, *, answers: bool = True) -> None:
        self.answers = answers
        self.reserved: list[bool] = []
        self.on_choice: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def choose_replica(self, wish: Wish, *, _reserve: bool = True) -> AsyncIterator[Any]:
        self.reserved.append(_reserve)
        self.on_choice()
        if not (_reserve or self.answers):
            await asyncio.Event().wait()
        yield SimpleNamespace(replica_metadata=METADATA)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> deployments.ServeReplicas:
    monkeypatch.setattr(known_fleets, "_fleets", {})
    monkeypatch.setattr(deployments, "_CHOICE_SECONDS", 0.02)
    base = Base(name="base", model="m", store="/s", catalog="postgresql://h/d")
    return deployments.ServeReplicas(ClusterConfig(bases=[base], routing=Routing(wait_seconds=0.2)))


def choose(replicas: deployments.ServeReplicas, handle: FakeHandle, wish: Wish | None = None) -> Address:
    async def run() -> Address:
        replicas._handles["base"] = handle
        async with replicas.choose("base", wish or Wish()) as address:
            return address

    return asyncio.run(run())


def test_running_replicas_are_chosen_without_a_reservation(replicas: deployments.ServeReplicas) -> None:
    replicas.fleet("base").update({"base-0": 8})
    handle = FakeHandle()
    assert choose(replicas, handle) == Address("base-0", "http://127.0.0.1:1")
    assert handle.reserved == [False]


def test_a_stopped_base_is_started_by_a_reservation(replicas: deployments.ServeReplicas) -> None:
    handle = FakeHandle(answers=False)
    assert choose(replicas, handle).name == "base-0"
    assert handle.reserved == [True]


def test_a_base_that_stops_during_the_choice_is_started_again(replicas: deployments.ServeReplicas) -> None:
    replicas.fleet("base").update({"base-0": 8})
    handle = FakeHandle(answers=False)
    handle.on_choice = lambda: replicas.fleet("base").update({})
    assert choose(replicas, handle).name == "base-0"
    assert handle.reserved == [False, True]


def test_the_wait_for_a_replica_ends(replicas: deployments.ServeReplicas) -> None:
    replicas.fleet("base").update({"base-0": 8})
    with pytest.raises(EngineNotReadyError, match="no replica of base is ready"):
        choose(replicas, FakeHandle(answers=False))


def test_a_named_replica_has_to_exist(replicas: deployments.ServeReplicas) -> None:
    replicas.fleet("base").update({"base-0": 8})
    with pytest.raises(NotFoundError, match="no replica 'other'"):
        choose(replicas, FakeHandle(), Wish(replica="other"))
