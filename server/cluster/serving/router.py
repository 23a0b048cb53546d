"""The request router of Ray Serve that knows which soft prompts are warm where."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.cluster.ingress.known_fleets import fleet_of, set_addresses
from server.cluster.ingress.replicas import Address, SharedFleet, Wish
from server.cluster.routing.ranking import ReplicaRanking


class SoftPromptRouter(RequestRouter):
    """Chooses by ``server.cluster.routing``, from the replicas' reports and from what this process sent them.

    A handle is asked with a ``Wish``. The door of the same process reads the same state.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the settings of ``RequestRouterConfig.request_router_kwargs``."""
        ranking = ReplicaRanking(balance=kwargs["balance"], patience=kwargs["patience"], floor=kwargs["floor"])
        self._fleet = fleet_of(str(kwargs["base"]), lambda: SharedFleet(ranking))
        self._by_name: dict[str, RunningReplica] = {}
        self._base = str(kwargs["base"])

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run, each with its last report."""
        super().update_replicas(replicas)
        named = {str(replica.replica_metadata.get("name")): replica for replica in replicas}
        self._set(named)
        for name, replica in named.items():
            stats = replica.routing_stats
            if stats:
                self._fleet.report(name, stats["at"], load=stats["load"], warm=stats["device"], stored=stats["disk"])

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Forget a replica."""
        super().on_replica_actor_died(replica_id)
        self._set({name: one for name, one in self._by_name.items() if one.replica_id != replica_id})

    def _set(self, named: dict[str, RunningReplica]) -> None:
        self._by_name = named
        metadata = {name: replica.replica_metadata for name, replica in named.items()}
        self._fleet.update({name: int(one["capacity"]) for name, one in metadata.items()})
        addresses = [Address(name, str(one["url"])) for name, one in sorted(metadata.items())]
        set_addresses(self._base, addresses)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica for a request."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        wish = pending_request.args[0] if pending_request is not None and pending_request.args else Wish()
        running = {replica.replica_id for replica in candidate_replicas}
        for name in self._fleet.order(wish):
            replica = self._by_name.get(name)
            if replica is not None and replica.replica_id in running:
                self._fleet.sent(name)
                return [[replica]]
        return []
