"""Which constraint is compiled next. Pure logic."""

from __future__ import annotations

from collections import OrderedDict

from server.engine.constraints import Constraint


class GrammarQueue:
    """Constraints that wait to be compiled: tenants take turns, and each tenant's go in the order of their coming."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, OrderedDict[Constraint, None]] = OrderedDict()
        self._tenants: dict[Constraint, str] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, constraint: Constraint, tenant: str) -> None:
        """Let a constraint wait; one that waits already keeps its place."""
        if constraint not in self._tenants:
            self._tenants[constraint] = tenant
            self._waiting.setdefault(tenant, OrderedDict())[constraint] = None

    def count(self, tenant: str) -> int:
        """How many of a tenant's wait."""
        return len(self._waiting.get(tenant, ()))

    def take(self) -> tuple[Constraint, str] | None:
        """Take the first of the tenant whose turn it is, with that tenant; None where none waits."""
        if not self._waiting:
            return None
        tenant, own = next(iter(self._waiting.items()))
        constraint = next(iter(own))
        self._waiting.move_to_end(tenant)
        self.discard(constraint)
        return constraint, tenant

    def discard(self, constraint: Constraint) -> bool:
        """Take one out; whether it was here."""
        tenant = self._tenants.pop(constraint, None)
        if tenant is None:
            return False
        own = self._waiting[tenant]
        del own[constraint]
        if not own:
            del self._waiting[tenant]
        return True
