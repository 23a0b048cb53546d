"""Host-memory budgets of pinned soft prompts and adapters, per tenant and in total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from server.engine.types import AdapterSource, ModelInfo, SoftPromptSource
from server.errors import PinBudgetError

LEAST_BYTES = 4096
"""Minimum size counted per pin, for its lease and names."""

_HEAD_BYTES_PER_NUMBER = 4


def pinned_bytes(source: SoftPromptSource | AdapterSource, model: ModelInfo) -> int:
    """Host memory of a pin in bytes: rows or the parameters of an adapter in the serving dtype, and a head."""
    if isinstance(source, AdapterSource):
        numbers = source.num_parameters
    elif source.is_key_values:
        numbers = source.num_virtual_tokens * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    else:
        numbers = source.num_virtual_tokens * model.embedding_width
    head = (source.num_labels or 0) * (model.hidden_size or model.embedding_width) * _HEAD_BYTES_PER_NUMBER
    return max(LEAST_BYTES, numbers * (4 if model.dtype == "float32" else 2) + head)


class PinBudget:
    """Counts the bytes of pins. The same content counts once per tenant, and once in total.

    Pins of the operator are never refused. They count in the total, so they leave less for the tenants.

    Args:
        total_bytes: Maximum of all pins.
        tenant_bytes: Maximum of the pins of one tenant.
    """

    def __init__(self, total_bytes: int, tenant_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._tenant_bytes = tenant_bytes
        self._sizes: dict[str, int] = {}
        self._pins: Counter[tuple[str | None, str]] = Counter()
        """Number of pins by tenant (None is the operator) and identity."""
        self._all: Counter[str] = Counter()
        self._used: Counter[str | None] = Counter()
        self._used_in_all = 0

    def check(
        self,
        tenant: str | None,
        adding: Mapping[str, int],
        ending: Collection[tuple[str | None, str]] = (),
    ) -> None:
        """Check that a tenant may add pins.

        Args:
            tenant: The tenant; None is the operator.
            adding: Bytes of the new pins by identity.
            ending: Pins, by tenant and identity, that end when these are added.

        Raises:
            PinBudgetError: If a budget would be exceeded; the message names it.
        """
        if tenant is None:
            return
        ends, ends_in_all = Counter(ending), Counter(identity for _, identity in ending)
        new_own, new_in_all = 0, 0
        for identity, size in adding.items():
            new_own += size * (not self._pins[tenant, identity])
            new_in_all += size * (not self._all[identity])
        for (payer, identity), count in ends.items():
            if payer == tenant and identity not in adding and count >= self._pins[payer, identity] > 0:
                new_own -= self._sizes[identity]
        for identity, count in ends_in_all.items():
            if identity not in adding and count >= self._all[identity] > 0:
                new_in_all -= self._sizes[identity]
        used, size = self._used[tenant], sum(adding.values())
        if new_own > 0 and used + new_own > self._tenant_bytes:
            raise PinBudgetError(
                f"pin: {size} bytes of host memory are needed, and the tenant's pins hold {used} of at most "
                f"{self._tenant_bytes} (--pinned-memory-per-tenant): release another pin first",
                param="pin",
            )
        if new_in_all > 0 and self._used_in_all + new_in_all > self._total_bytes:
            raise PinBudgetError(
                f"pin: {size} bytes of host memory are needed, and the limit for all pins of this server is "
                f"{self._total_bytes} (--pinned-memory); too little of it is free",
                param="pin",
            )

    def add(self, tenant: str | None, identity: str, size: int) -> None:
        """Count a pin; call ``check`` first."""
        self._sizes.setdefault(identity, size)
        if not self._pins[tenant, identity]:
            self._used[tenant] += self._sizes[identity]
        if not self._all[identity]:
            self._used_in_all += self._sizes[identity]
        self._pins[tenant, identity] += 1
        self._all[identity] += 1

    def remove(self, tenant: str | None, identity: str) -> None:
        """Stop counting a pin."""
        if not self._pins[tenant, identity]:
            raise RuntimeError("more pins were ended than there are")
        self._pins[tenant, identity] -= 1
        self._all[identity] -= 1
        if not self._pins[tenant, identity]:
            del self._pins[tenant, identity]
            self._used[tenant] -= self._sizes[identity]
            if not self._used[tenant]:
                del self._used[tenant]
        if not self._all[identity]:
            del self._all[identity]
            self._used_in_all -= self._sizes.pop(identity)
