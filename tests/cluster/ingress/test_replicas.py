"""What a door remembers of the replicas, and the order in which it asks them."""

from __future__ import annotations

from random import Random

from server.cluster.ingress.replicas import SHUN_SECONDS, SharedFleet, Wish
from server.cluster.routing.ranking import ReplicaRanking, hashed_order


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fleet(clock: Clock | None = None, floor: int = 1) -> SharedFleet:
    found = SharedFleet(ReplicaRanking(random=Random(0), floor=floor), clock or Clock())
    found.update(dict.fromkeys("abc", 8))
    return found


def test_warm_then_stored_then_home() -> None:
    shared = fleet()
    home = shared.order(Wish(digest="x"))[0]
    assert home == hashed_order("abc", "x")[0]
    stored, warm = (name for name in "abc" if name != home)
    shared.report(stored, 1, load=0, warm=[], stored=["x"])
    assert shared.order(Wish(digest="x"))[0] == stored
    shared.report(warm, 1, load=0, warm=["x"], stored=[])
    assert shared.order(Wish(digest="x"))[0] == warm
    assert (shared.found(warm, "x"), shared.found(stored, "x"), shared.found(home, "x")) == ("device", "disk", "cold")
    assert shared.found(home, None) == "base"


def test_a_few_requests_do_not_leave_a_warm_replica() -> None:
    def requests_at_the_warm_one(floor: int) -> int:
        shared, number = fleet(floor=floor), 0
        shared.report("a", 1, load=0, warm=["x"], stored=[])
        while shared.order(Wish(digest="x"))[0] == "a" and number < 8:
            shared.sent("a")
            number += 1
        return number

    assert requests_at_the_warm_one(1) < 4 <= requests_at_the_warm_one(4)


def test_the_same_report_counts_once() -> None:
    shared = fleet()
    shared.report("a", 1.5, load=0, warm=[], stored=[])
    shared.sent("a")
    shared.report("a", 1.5, load=0, warm=[], stored=[])
    assert shared.states()[0].load == 1
    shared.answered("a", 3)
    shared.ended("a")
    assert shared.states()[0].load == 2


def test_an_unreachable_replica_comes_last_for_a_while() -> None:
    clock = Clock()
    shared = fleet(clock)
    first = shared.order(Wish(digest="x"))[0]
    shared.shun(first)
    assert shared.order(Wish(digest="x"))[-1] == first
    for name in "abc":
        shared.shun(name)
    assert sorted(shared.order(Wish())) == ["a", "b", "c"]
    clock.now = SHUN_SECONDS + 0.1
    assert shared.order(Wish(digest="x"))[0] == first


def test_homes_and_named_replicas() -> None:
    shared = fleet()
    assert shared.order(Wish(home="/v1/batches")) == hashed_order("abc", "/v1/batches")
    assert shared.order(Wish(replica="b")) == ["b"]
    assert shared.order(Wish(replica="z")) == []
