"""A discrete-event simulation of replicas, routers and their clients."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, count
from random import Random

from benchmarks.cluster_parts.policies import Policy
from server.cluster.routing.fleet import Fleet

_STEP_SECONDS = ((1, 0.0197), (4, 0.0261), (16, 0.0336), (64, 0.0739), (128, 0.1359))
"""Measured: sequences in a step and its duration (benchmarks/README.md, "What a decode step costs")."""

_SECONDS_PER_TOKEN = 0.0081 / 24
"""Measured: a cold soft prompt of 20 tokens adds 24 rows and 8.1 ms to a step ("Cold soft prompts")."""

_READ_SECONDS = 0.0041
"""Measured: looking up and reading a file on the local disk ("Cold soft prompts")."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated; times in seconds.

    Attributes:
        num_replicas: Replicas, all alike.
        num_prompts: Soft prompts, of equal size.
        num_warm: Soft prompts that fit on the device of a replica.
        num_stored: Soft prompts that fit on its disk.
        requests_per_replica: Requests divided by replicas, those of the warm-up included.
        warm_up: Share of the requests, at the beginning, that the results leave out.
        zipf: Exponent of the popularity.
        load: Mean rate of arrivals as a share of what all replicas complete with full batches and warm soft prompts.
        diurnal: Amplitude of the rate as a share of the mean; one day is the whole run.
        num_routers: Routers, each with its own view.
        report_seconds: Period of the replicas' reports.
        failures: Expected failures of each replica in the run.
        restart_seconds: Time until a failed replica is back, with nothing on device and disk.
        batch: Sequences in a step.
        capacity: Requests that a replica accepts at once; more are refused.
        virtual_tokens: Length of a soft prompt, which is computed when it is cold.
        text_tokens: Length of a text.
        new_tokens: Mean number of generated tokens, exponentially distributed.
        fetch_seconds: Time to fetch a file from the object store. An assumption, not measured.
    """

    num_replicas: int
    num_prompts: int
    num_warm: int
    num_stored: int = 4096
    requests_per_replica: int = 1000
    warm_up: float = 0.25
    zipf: float = 1.0
    load: float = 0.5
    diurnal: float = 0.0
    num_routers: int = 2
    report_seconds: float = 1.0
    failures: float = 0.0
    restart_seconds: float = 20.0
    batch: int = 64
    capacity: int = 128
    virtual_tokens: int = 100
    text_tokens: int = 64
    new_tokens: int = 32
    fetch_seconds: float = 0.03

    @property
    def rate(self) -> float:
        """Mean arrivals per second of one replica."""
        step = step_seconds(self.batch) + self.batch / self.new_tokens * self.text_tokens * _SECONDS_PER_TOKEN
        return self.load * self.batch / (self.new_tokens * step)

    @property
    def num_requests(self) -> int:
        """Arrivals of the run."""
        return self.num_replicas * self.requests_per_replica

    @property
    def seconds(self) -> float:
        """Expected length of the run."""
        return self.requests_per_replica / self.rate


@dataclass(kw_only=True)
class Outcome:
    """What was seen after the warm-up.

    Attributes:
        requests: Arrivals.
        warm: Those that found their soft prompt on the device.
        failed: Those that ended because their replica failed.
        refused: Those that were sent to a full replica.
        first_token_seconds: Time from arrival to first token of each completed request, sorted.
        served: Accepted requests of each replica.
    """

    requests: int = 0
    warm: int = 0
    failed: int = 0
    refused: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    served: list[int] = field(default_factory=list)

    @property
    def warm_share(self) -> float:
        """Share of the accepted requests that found their soft prompt on the device."""
        return self.warm / sum(self.served)

    @property
    def balance(self) -> float:
        """Accepted requests of the busiest replica over the mean."""
        return max(self.served) * len(self.served) / sum(self.served)

    def percentile(self, share: float) -> float:
        """A percentile of the time to the first token, in seconds."""
        return self.first_token_seconds[
            min(int(share * len(self.first_token_seconds)), len(self.first_token_seconds) - 1)
        ]


def step_seconds(sequences: float) -> float:
    """Duration of a step, interpolated between measured sizes."""
    sizes = [size for size, _ in _STEP_SECONDS]
    index = min(max(bisect_left(sizes, sequences), 1), len(sizes) - 1)
    (low, fast), (high, slow) = _STEP_SECONDS[index - 1 : index + 1]
    return fast + (slow - fast) * (sequences - low) / (high - low)


@dataclass(eq=False)
class _Request:
    digest: str
    arrived: float
    num_tokens: float
    router: Fleet
    is_counted: bool
    first_token: float = 0.0


class _Replica:
    """A batch that advances in steps whose duration depends on its size; prefills and fills stop it meanwhile.

    Attributes:
        progress: Steps done, as a real number.
    """

    def __init__(self, id_: str, scenario: Scenario) -> None:
        self.id = id_
        self._scenario = scenario
        self._durations = [step_seconds(max(size, 1)) for size in range(scenario.batch + 1)]
        self.served = 0
        self.is_up = True
        self.epoch = 0
        self.reset()

    def reset(self) -> None:
        """Begin with nothing."""
        self.progress = 0.0
        self.at = 0.0
        self.busy_until = 0.0
        self.running: list[tuple[float, int, _Request]] = []
        self.waiting: deque[_Request] = deque()
        self.fetching: set[_Request] = set()
        self.warm: OrderedDict[str, None] = OrderedDict()
        self.stored: OrderedDict[str, None] = OrderedDict()
        self.users: dict[str, int] = {}
        self.epoch += 1

    @property
    def num_requests(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.fetching)

    def advance(self, now: float) -> None:
        """Let the batch run until now."""
        free = max(self.at, self.busy_until)
        if now > free and self.running:
            self.progress += (now - free) / self._durations[len(self.running)]
        self.at = now

    def next_end(self) -> float:
        """When the next request ends if none begins before."""
        steps = self.running[0][0] - self.progress
        return max(self.at, self.busy_until) + max(steps, 0.0) * self._durations[len(self.running)]

    def begin(self, request: _Request, order: int) -> None:
        """Add a waiting request to the batch."""
        digest = request.digest
        rows = self._scenario.text_tokens
        if digest not in self.warm:
            rows += self._scenario.virtual_tokens
            self._make_room()
        self.warm[digest] = None
        self.warm.move_to_end(digest)
        self.users[digest] = self.users.get(digest, 0) + 1
        self.busy_until = max(self.at, self.busy_until) + rows * _SECONDS_PER_TOKEN
        heapq.heappush(self.running, (self.progress + request.num_tokens, order, request))
        request.first_token = self.busy_until + self._durations[len(self.running)]

    def end(self) -> _Request:
        """Remove the request that ends first."""
        _, _, request = heapq.heappop(self.running)
        self.users[request.digest] -= 1
        if not self.users[request.digest]:
            del self.users[request.digest]
        return request

    def store(self, digest: str) -> None:
        """Put a file on the disk."""
        self.stored[digest] = None
        self.stored.move_to_end(digest)
        if len(self.stored) > self._scenario.num_stored:
            self.stored.popitem(last=False)

    def _make_room(self) -> None:
        if len(self.warm) >= self._scenario.num_warm:
            idle = next((digest for digest in self.warm if digest not in self.users), None)
            if idle is not None:  # otherwise the engine would let the request wait; it has room for a batch
                del self.warm[idle]


class Simulation:
    """One run of a scenario.

    Args:
        scenario: What is simulated.
        policy: Makes the choice of each router.
        seed: Of all randomness; the same arrivals for all policies.
    """

    def __init__(self, scenario: Scenario, policy: Callable[[Random], Policy], *, seed: int = 0) -> None:
        self._scenario = scenario
        self._random = Random(seed)
        self._replicas = {f"r{index}": _Replica(f"r{index}", scenario) for index in range(scenario.num_replicas)}
        self._routers = [Fleet() for _ in range(scenario.num_routers)]
        self._policies = [policy(Random(seed + 1 + index)) for index in range(scenario.num_routers)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now = 0.0
        weights = list(accumulate(1 / rank**scenario.zipf for rank in range(1, scenario.num_prompts + 1)))
        self._weights = [weight / weights[-1] for weight in weights]
        self._arrivals = 0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run all of it."""
        self._members_changed()
        self._at(0.0, self._arrive)
        for index, replica in enumerate(self._replicas.values()):
            self._at(self._scenario.report_seconds * (index + 1) / len(self._replicas), self._reporting(replica))
            if self._scenario.failures:
                self._at(self._until_failure(), self._failing(replica))
        while self._events and (self._arrivals < self._scenario.num_requests or self._is_busy()):
            self._now, _, action = heapq.heappop(self._events)
            action()
        self.outcome.first_token_seconds.sort()
        self.outcome.served = [replica.served for replica in self._replicas.values()]
        return self.outcome

    def _is_busy(self) -> bool:
        return any(replica.num_requests for replica in self._replicas.values())

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    def _arrive(self) -> None:
        scenario, random = self._scenario, self._random
        number = self._arrivals
        self._arrivals += 1
        if self._arrivals < scenario.num_requests:
            wave = 1 + scenario.diurnal * math.sin(2 * math.pi * self._now / scenario.seconds)
            self._at(self._now + random.expovariate(scenario.rate * scenario.num_replicas * wave), self._arrive)
        digest = f"{bisect_left(self._weights, random.random()):016x}"
        tokens = max(1.0, random.expovariate(1 / scenario.new_tokens))
        index = random.randrange(scenario.num_routers)
        router = self._routers[index]
        request = _Request(digest, self._now, tokens, router, number >= scenario.warm_up * scenario.num_requests)
        replica = self._replicas[self._policies[index](list(router.states.values()), digest)]
        router.sent(replica.id)
        self._receive(replica, request)
        router.contacted(replica.id, replica.num_requests)

    def _receive(self, replica: _Replica, request: _Request) -> None:
        digest = request.digest
        self.outcome.requests += request.is_counted
        if replica.num_requests >= self._scenario.capacity:
            self.outcome.refused += request.is_counted
            return
        if request.is_counted:
            self.outcome.warm += digest in replica.warm
            replica.served += 1
        delay = 0.0
        if digest not in replica.warm:
            delay = _READ_SECONDS if digest in replica.stored else _READ_SECONDS + self._scenario.fetch_seconds
        replica.store(digest)
        if not delay:
            replica.waiting.append(request)
            self._fill_batch(replica)
            return
        replica.fetching.add(request)

        def fetched() -> None:
            if request in replica.fetching:  # the replica may have failed meanwhile
                replica.fetching.remove(request)
                replica.waiting.append(request)
                self._fill_batch(replica)

        self._at(self._now + delay, fetched)

    def _fill_batch(self, replica: _Replica) -> None:
        """Let requests begin, and plan the next end anew."""
        replica.advance(self._now)
        while replica.waiting and len(replica.running) < self._scenario.batch:
            replica.begin(replica.waiting.popleft(), next(self._order))
        replica.epoch += 1
        if not replica.running:
            return
        epoch = replica.epoch

        def end() -> None:
            if replica.epoch == epoch:
                replica.advance(self._now)
                self._ended(replica, replica.end(), has_failed=False)
                self._fill_batch(replica)

        self._at(replica.next_end(), end)

    def _ended(self, replica: _Replica, request: _Request, *, has_failed: bool) -> None:
        request.router.contacted(replica.id, replica.num_requests)
        if request.is_counted:
            if has_failed:
                self.outcome.failed += 1
            else:
                self.outcome.first_token_seconds.append(request.first_token - request.arrived)

    def _reporting(self, replica: _Replica) -> Callable[[], None]:
        def report() -> None:
            if replica.is_up:
                warm, stored = frozenset(replica.warm), frozenset(replica.stored)
                for router in self._routers:
                    router.report(replica.id, load=replica.num_requests, warm=warm, stored=stored)
            self._at(self._now + self._scenario.report_seconds, report)

        return report

    def _until_failure(self) -> float:
        return self._random.expovariate(self._scenario.failures / self._scenario.seconds)

    def _failing(self, replica: _Replica) -> Callable[[], None]:
        def fail() -> None:
            if sum(other.is_up for other in self._replicas.values()) == 1:
                self._at(self._now + self._until_failure(), fail)  # there is no cluster without a replica
                return
            lost = [request for _, _, request in replica.running] + [*replica.waiting, *replica.fetching]
            replica.reset()
            replica.at = self._now
            replica.is_up = False
            self._members_changed()
            for request in lost:
                self._ended(replica, request, has_failed=True)
            self._at(self._now + self._scenario.restart_seconds, come_back)

        def come_back() -> None:
            replica.is_up = True
            replica.at = self._now
            self._members_changed()
            self._at(self._now + self._until_failure(), fail)

        return fail

    def _members_changed(self) -> None:
        up = {replica.id: self._scenario.capacity for replica in self._replicas.values() if replica.is_up}
        for router in self._routers:
            router.update(up)
