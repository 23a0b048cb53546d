"""Ways to choose a replica: the product's, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from server.cluster.routing.ranking import BALANCE, ReplicaRanking, ReplicaState, hashed_order

Policy = Callable[[Sequence[ReplicaState], str], str]
"""Chooses one of the replicas for the digest of a soft prompt; returns its id."""


def warmth(random: Random) -> Policy:
    """The product's own: ``server.cluster.routing``."""
    ranking = ReplicaRanking(random=random)
    return lambda replicas, digest: next(ranking.ranks(replicas, digest))[0]


def one_bound(random: Random) -> Policy:
    """The same without patience for a single copy."""
    ranking = ReplicaRanking(patience=BALANCE, random=random)
    return lambda replicas, digest: next(ranking.ranks(replicas, digest))[0]


def at_random(random: Random) -> Policy:
    """Any replica."""
    return lambda replicas, _digest: random.choice(replicas).id


def least_loaded(random: Random) -> Policy:
    """The replica with the lowest load that the router knows of; any of those with the same."""

    def choose(replicas: Sequence[ReplicaState], _digest: str) -> str:
        lowest = min(replica.load for replica in replicas)
        return random.choice([replica for replica in replicas if replica.load == lowest]).id

    return choose


def pure_hashing(_random: Random) -> Policy:
    """The replica that owns the digest, whatever its load."""
    known: dict[str, list[str]] = {}

    def choose(replicas: Sequence[ReplicaState], digest: str) -> str:
        there = {replica.id for replica in replicas}
        order = known.get(digest)
        if order is None or set(order) != there:
            order = known[digest] = hashed_order([replica.id for replica in replicas], digest)
        return order[0]

    return choose


POLICIES: dict[str, Callable[[Random], Policy]] = {
    "warmth": warmth,
    "one bound": one_bound,
    "random": at_random,
    "least loaded": least_loaded,
    "pure hashing": pure_hashing,
}
