"""How the door finds a replica: the interface, and what it remembers of the replicas."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from server.cluster.routing.fleet import Fleet
from server.cluster.routing.ranking import ReplicaRanking, ReplicaState, hashed_order
from server.errors import EngineNotReadyError

SHUN_SECONDS = 5.0
"""Seconds for which a replica gets no requests after it could not be connected; by then it is known to be lost."""


@dataclass(frozen=True, slots=True)
class Address:
    """A replica that gets a request.

    Attributes:
        name: Its name.
        url: Where it listens.
    """

    name: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What kind of replica a request needs.

    Attributes:
        digest: Content digest that it uses; None for the bare base.
        home: Requests with the same text go to the same replica.
        replica: Name of the replica.
    """

    digest: str | None = None
    home: str | None = None
    replica: str | None = None


class Replicas(Protocol):
    """The replicas of all bases, as the door needs them."""

    def choose(self, base: str, wish: Wish) -> AbstractAsyncContextManager[Address]:
        """Choose the replica that answers one request, for as long as it takes.

        Raises:
            EngineNotReadyError: If there is none in time.
            NotFoundError: If the wish names a replica that does not exist.
        """
        ...

    def known(self, base: str) -> list[Address]:
        """The replicas of a base that run."""
        ...

    def is_ready(self, base: str) -> bool:
        """Whether requests for a base are accepted; also if its first replica has yet to be started for them."""
        ...

    def fleet(self, base: str) -> SharedFleet:
        """What is known of the replicas of a base."""
        ...


class SharedFleet:
    """The replicas of one base as one door knows them: a ``Fleet`` for several threads, and the order of choice.

    Args:
        ranking: Ranks the replicas.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, ranking: ReplicaRanking, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = Fleet()
        self._ranking = ranking
        self._clock = clock
        self._lock = threading.Lock()
        self._shunned: dict[str, float] = {}
        self._reported: dict[str, object] = {}

    def update(self, capacities: Mapping[str, int]) -> None:
        """Set which replicas there are, by name and with the number of requests that each accepts."""
        with self._lock:
            self._fleet.update(capacities)
            self._shunned = {name: until for name, until in self._shunned.items() if name in capacities}
            self._reported = {name: stamp for name, stamp in self._reported.items() if name in capacities}

    def report(self, name: str, stamp: object, *, load: int, warm: Collection[str], stored: Collection[str]) -> None:
        """A replica has reported; the same report counts once.

        Args:
            name: The replica.
            stamp: Tells reports apart.
            load: As in ``Fleet.report``.
            warm: As in ``Fleet.report``.
            stored: As in ``Fleet.report``.
        """
        with self._lock:
            if self._reported.get(name) == stamp:
                return
            self._reported[name] = stamp
            self._fleet.report(name, load=load, warm=frozenset(warm), stored=frozenset(stored))

    def order(self, wish: Wish) -> list[str]:
        """The replicas for a request, the best first; those that could not be connected come last."""
        with self._lock:
            states = list(self._fleet.states.values())
            if wish.replica is not None:
                return [state.id for state in states if state.id == wish.replica]
            now = self._clock()
            shunned = {name for name, until in self._shunned.items() if until > now}
            usable = [state for state in states if state.id not in shunned]
            if wish.home is not None:
                found = hashed_order([state.id for state in usable], wish.home)
            else:
                ranks = self._ranking.ranks(usable, wish.digest) if usable else ()
                found = [name for rank in ranks for name in rank]
            return found + sorted(shunned & self._fleet.states.keys())

    def sent(self, name: str) -> None:
        """A request is sent to a replica."""
        with self._lock:
            self._fleet.sent(name)

    def answered(self, name: str, load: int) -> None:
        """A replica has begun to answer, and said how many sequences it has."""
        with self._lock:
            self._fleet.contacted(name, load)

    def ended(self, name: str) -> None:
        """A request to a replica has ended."""
        with self._lock:
            self._fleet.ended(name)

    def shun(self, name: str) -> None:
        """A replica could not be connected."""
        with self._lock:
            self._shunned[name] = self._clock() + SHUN_SECONDS

    def found(self, name: str, digest: str | None) -> str:
        """Where a soft prompt is at a replica: ``device``, ``disk`` or ``cold``; ``base`` without one."""
        with self._lock:
            state = self._fleet.states.get(name)
            if digest is None:
                return "base"
            if state is None:
                return "cold"
            return "device" if digest in state.warm else "disk" if digest in state.stored else "cold"

    def states(self) -> list[ReplicaState]:
        """Copies of what is known of the replicas, by name."""
        with self._lock:
            return [
                ReplicaState(
                    id=state.id,
                    load=state.load,
                    capacity=state.capacity,
                    warm=frozenset(state.warm),
                    stored=frozenset(state.stored),
                )
                for _, state in sorted(self._fleet.states.items())
            ]


def no_replica(base: str) -> EngineNotReadyError:
    """The error if no replica came up in time."""
    return EngineNotReadyError(f"no replica of {base} is ready", retry_after=5.0)
