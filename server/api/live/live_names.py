"""The names behind the engine's requests and digests, for people who watch the batch. The engine knows no names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from prompt_store.types import SHARED, PromptVersion

_MAX_KNOWN = 4096
"""Maximum number of digests whose names are remembered; those used last stay."""

_MAX_OWNERS = 16


class LiveNames:
    """What each sequence in flight is called, and which names a digest has. Used on the event loop only."""

    def __init__(self) -> None:
        self._rows: dict[str, Sequence[str | None]] = {}
        self._known: OrderedDict[str, dict[str, str]] = OrderedDict()
        """By digest: ``NAME@VERSION`` by owner, the one used last at the end."""

    def begin(self, request_id: str, names: Sequence[str | None], versions: Iterable[PromptVersion]) -> None:
        """A sequence is sent to the engine.

        Args:
            request_id: The engine's id of the request.
            names: What answers: one name, or that of each member of an ensemble; None is the base.
            versions: The versions behind the names.
        """
        self._rows[request_id] = names
        for version in versions:
            self.know(version)

    def end(self, request_id: str) -> None:
        """The sequence has ended."""
        self._rows.pop(request_id, None)

    def know(self, version: PromptVersion) -> None:
        """Remember the name of a digest."""
        owners = self._known.setdefault(version.digest, {})
        owners.pop(version.owner, None)
        if len(owners) < _MAX_OWNERS:
            owners[version.owner] = f"{version.name}@{version.version}"
        self._known.move_to_end(version.digest)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def name_of(self, request_id: str, member: int) -> str | None:
        """The name of a sequence, or of a member of an ensemble; None for the base, or if it is not known."""
        names = self._rows.get(request_id, ())
        return names[member] if member < len(names) else None

    def name_for(self, tenant: str, digest: str) -> str | None:
        """The name of a digest that was used last, of those that a tenant may see; None if there is none."""
        owners = self._known.get(digest, {})
        return next((owners[owner] for owner in reversed(owners) if owner in (tenant, SHARED)), None)
