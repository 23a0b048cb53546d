"""Cache of resolved references."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import PromptRef, PromptVersion

MAX_NAMES = 16_384
"""About 2 KB each."""

MAX_REFS_PER_NAME = 64


Resolved = tuple[PromptVersion, Rollout]
"""The version that a reference names, and the rollout of its alias."""


class ResolveCache:
    """Versions and rollouts by reference; the least recently used names are evicted first. Thread-safe.

    The result of a lookup that began before a change must not be cached after it, or the old version would stay
    forever. So a lookup reads ``generation`` first, and ``add`` ignores results of an earlier generation.
    """

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._lock = threading.Lock()
        self._names: OrderedDict[str, dict[PromptRef, Resolved]] = OrderedDict()
        self._generation = 0

    @property
    def generation(self) -> int:
        """Number of invalidations."""
        return self._generation

    def get(self, ref: PromptRef) -> Resolved | None:
        """The version and the rollout of a reference, if it is cached."""
        with self._lock:
            refs = self._names.get(ref.name)
            if refs is None:
                return None
            self._names.move_to_end(ref.name)
            return refs.get(ref)

    def owner(self, name: str) -> str | None:
        """The owner of a name, if it is cached; this does not count as a use of the name."""
        with self._lock:
            refs = self._names.get(name)
            return next(iter(refs.values()))[0].owner if refs else None

    def add(self, ref: PromptRef, version: PromptVersion, generation: int, rollout: Rollout = NO_ROLLOUT) -> None:
        """Cache the result of a lookup, unless an invalidation has happened since its ``generation``."""
        with self._lock:
            if generation != self._generation:
                return
            refs = self._names.setdefault(ref.name, {})
            if len(refs) >= MAX_REFS_PER_NAME:
                refs.clear()
            refs[ref] = version, rollout
            self._names.move_to_end(ref.name)
            if len(self._names) > self._max_names:
                self._names.popitem(last=False)

    def invalidate(self, names: Iterable[str] | None) -> list[PromptRef]:
        """Drop names, or all for None; returns the references that were cached."""
        with self._lock:
            self._generation += 1
            if names is None:
                forgotten = [ref for refs in self._names.values() for ref in refs]
                self._names.clear()
                return forgotten
            return [ref for name in names for ref in self._names.pop(name, {})]
