"""Which replica answers a request: pure logic, which the router of Ray Serve and the simulation share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

HOMES = 2
"""Replicas at which a cold soft prompt starts, while one of them has room."""

BALANCE = 1.15
"""Load that a replica may have and still be preferred, as a multiple of the mean load."""

PATIENCE = 1.5
"""The same for a replica that has the soft prompt on the device, if no other one does and is below ``BALANCE``."""

_SHORT = 16


@dataclass(slots=True, kw_only=True)
class ReplicaState:
    """A replica as the router knows it.

    Attributes:
        id: Its id, the same in all routers.
        load: Requests that it has, running and waiting.
        capacity: Requests that it accepts at once.
        warm: Content digests (``short``) of soft prompts and adapters on the device.
        stored: The same for files on its disk.
    """

    id: str
    load: int
    capacity: int
    warm: Collection[str] = field(default=frozenset(), repr=False)
    stored: Collection[str] = field(default=frozenset(), repr=False)

    @property
    def is_full(self) -> bool:
        """Whether it accepts no further request."""
        return self.load >= self.capacity


class ReplicaRanking:
    """Ranks the replicas for a request.

    A request for a soft prompt goes to the first of

    1. the replicas that have it on the device and a load below the bound,
    2. those that have it on the device and a load below the higher bound,
    3. those that have its file on their disk and a load below the bound,
    4. all others.

    In each, consistent hashing of the digest decides (highest random weight, Thaler and Ravishankar 1998), so a cold
    soft prompt starts at the same replicas whichever router asks, and only the soft prompts of a replica that comes
    or goes move. The bounds are ``balance`` and ``patience`` times the mean load (bounded loads, Mirrokni et al.
    2018). A popular soft prompt spreads over as many replicas as its load needs, and its requests leave a busy
    replica first, because they find another copy; one with a single copy waits longer before a second one is made.
    Order decides, not load, because two half-used copies take the room of another soft prompt; a copy that is no
    longer needed is evicted like any idle one.

    A request for the bare base goes to the less loaded of two random replicas (power of two choices).

    Args:
        balance: The bound as a multiple of the mean load, more than 1.
        patience: The higher bound, at least ``balance``.
        homes: Replicas of a cold soft prompt; if all are above the bound, the least loaded replica is next.
        floor: Load below which a replica is never above a bound; a few requests more cost a batch nearly nothing.
        random: Source of the two choices.
    """

    def __init__(
        self,
        *,
        balance: float = BALANCE,
        patience: float = PATIENCE,
        homes: int = HOMES,
        floor: int = 1,
        random: Random | None = None,
    ) -> None:
        if not 1 < balance <= patience or homes < 1:
            raise ValueError(
                f"1 < balance <= patience and homes >= 1 must hold, not with {balance}, {patience} and {homes}"
            )
        if floor < 1:
            raise ValueError(f"floor must be at least 1, not {floor}")
        self._balance = balance
        self._patience = patience
        self._homes = homes
        self._floor = floor
        self._random = random or Random()  # noqa: S311 - spreads load, protects nothing

    def ranks(self, replicas: Sequence[ReplicaState], digest: str | None) -> Iterator[list[str]]:
        """The ids of all replicas, each once, in ranks; of a rank the least loaded is best, which stands first.

        Full replicas are in the last rank, and there is no other if all are full.

        Args:
            replicas: The replicas that could answer, with different ids.
            digest: What the request names, as in ``ReplicaState.warm``; None for the bare base.
        """
        open_ = [replica for replica in replicas if not replica.is_full]
        if open_:
            yield from self._of_base(open_) if digest is None else self._of_soft_prompt(replicas, open_, digest)
        full = [replica for replica in replicas if replica.is_full]
        if full:
            yield _by_load(full)

    def _of_base(self, open_: Sequence[ReplicaState]) -> Iterator[list[str]]:
        chosen = self._random.sample(open_, min(2, len(open_)))
        yield _by_load(chosen)
        ids = {replica.id for replica in chosen}
        rest = [replica for replica in open_ if replica.id not in ids]
        if rest:
            yield _by_load(rest)

    def _of_soft_prompt(
        self, replicas: Sequence[ReplicaState], open_: Sequence[ReplicaState], digest: str
    ) -> Iterator[list[str]]:
        bound = max(self._floor, load_bound(replicas, self._balance))
        below = [replica for replica in open_ if replica.load < bound]
        warm = [replica for replica in open_ if digest in replica.warm]
        yield from _one_by_one([replica.id for replica in warm if replica.load < bound], digest)
        patient = max(self._floor, load_bound(replicas, self._patience))
        yield from _one_by_one([replica.id for replica in warm if bound <= replica.load < patient], digest)
        done = {replica.id for replica in warm if replica.load < patient}
        stored = [replica.id for replica in below if digest in replica.stored and replica.id not in done]
        yield from _one_by_one(stored, digest)
        done.update(stored)
        by_weight = hashed_order([replica.id for replica in replicas], digest)
        open_below = {replica.id for replica in below}
        homes = [id_ for id_ in by_weight[: self._homes] if id_ in open_below and id_ not in done]
        yield from _one_by_one(homes, digest)
        done.update(homes)
        # The mean may be above what a replica accepts, so that one below the bound is not always open.
        rest = [replica for replica in open_ if replica.id not in done]
        if rest:
            yield _by_load(rest)


def load_bound(replicas: Sequence[ReplicaState], balance: float) -> int:
    """The load below which a replica may get a request for its warmth: a multiple of the mean load, rounded up.

    It counts the request that is to be placed, so the bound is at least 1 and some replica is always below it.
    """
    return math.ceil(balance * (sum(replica.load for replica in replicas) + 1) / len(replicas))


def hashed_order(ids: Sequence[str], digest: str) -> list[str]:
    """The order in which replicas own a digest. It is the same in all processes, and of any subset of the ids."""
    return sorted(ids, key=lambda id_: blake2b(f"{digest}/{id_}".encode(), digest_size=8).digest())


def short(digest: str) -> str:
    """The beginning of a content digest, as replicas report it: 64 bits tell millions apart."""
    return digest[:_SHORT]


def _one_by_one(ids: Sequence[str], digest: str) -> Iterator[list[str]]:
    return ([id_] for id_ in (hashed_order(ids, digest) if len(ids) > 1 else ids))


def _by_load(replicas: Sequence[ReplicaState]) -> list[str]:
    return [replica.id for replica in sorted(replicas, key=lambda replica: replica.load)]
