"""What one router knows of the replicas, from their reports and from its own contacts with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from server.cluster.routing.ranking import ReplicaState


class Fleet:
    """The replicas as one of several routers sees them.

    A replica says how many requests it has in two ways: in reports, which reach all routers and are old by up to a
    period, and whenever this router begins or ends a request there. A contact is newer than the report that follows
    it, so that report's load does not count. Between the choice of a replica and its answer the request is counted
    in advance; otherwise all requests of a burst would go to the replica that had the lowest load before.

    Attributes:
        states: The replicas by id; they change in place.
    """

    def __init__(self) -> None:
        self.states: dict[str, ReplicaState] = {}
        self._contacted: set[str] = set()

    def update(self, capacities: Mapping[str, int]) -> None:
        """Set which replicas there are. New ones have no load until they say otherwise.

        Args:
            capacities: By id, the requests that a replica accepts at once.
        """
        for id_ in self.states.keys() - capacities.keys():
            del self.states[id_]
            self._contacted.discard(id_)
        for id_, capacity in capacities.items():
            state = self.states.setdefault(id_, ReplicaState(id=id_, load=0, capacity=capacity))
            state.capacity = capacity

    def report(self, id_: str, *, load: int, warm: Collection[str], stored: Collection[str]) -> None:
        """A replica has reported; without effect if it is not known.

        Args:
            id_: Its id.
            load: Requests that it has, running and waiting, those of this router included.
            warm: As in ``ReplicaState``.
            stored: As in ``ReplicaState``.
        """
        state = self.states.get(id_)
        if state is None:
            return
        if id_ in self._contacted:
            self._contacted.remove(id_)
        else:
            state.load = load
        state.warm, state.stored = warm, stored

    def sent(self, id_: str) -> None:
        """This router sends a request to a replica that has not answered yet."""
        if id_ in self.states:
            self.states[id_].load += 1

    def ended(self, id_: str) -> None:
        """A request that this router sent to a replica has ended, with an answer or without."""
        if id_ in self.states:
            self.states[id_].load = max(0, self.states[id_].load - 1)

    def contacted(self, id_: str, load: int) -> None:
        """A replica said how many requests it has, as it took or ended one of this router."""
        if id_ in self.states:
            self.states[id_].load = load
            self._contacted.add(id_)
