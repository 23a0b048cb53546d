"""What this process knows of the replicas of each base: the router writes it, the door reads it.

A module of its own, because Ray Serve may copy the classes of a deployment, with the globals of their modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.cluster.ingress.replicas import Address, SharedFleet

_fleets: dict[str, SharedFleet] = {}
_addresses: dict[str, tuple[Address, ...]] = {}


def fleet_of(base: str, make: Callable[[], SharedFleet]) -> SharedFleet:
    """The replicas of a base.

    Args:
        base: Name of the base.
        make: Makes the object at the first call.
    """
    found = _fleets.get(base)
    return _fleets.setdefault(base, make()) if found is None else found


def addresses_of(base: str) -> list[Address]:
    """The replicas of a base that run."""
    return list(_addresses.get(base, ()))


def set_addresses(base: str, addresses: Sequence[Address]) -> None:
    """Note which replicas of a base run."""
    _addresses[base] = tuple(addresses)
