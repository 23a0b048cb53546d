"""Cache of resolved references."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from prompt_store.types import PromptRef, PromptVersion

MAX_NAMES = 16_384
"""About 2 KB each: the cache is bounded, whatever the number of registered names."""

MAX_REFS_PER_NAME = 64


class ResolveCache:
    """Versions by reference, least recently used names out first. Thread-safe.

    A lookup that began before a change must not be kept after it, or the old meaning would stay for good. So a
    lookup takes the ``generation`` first, and ``add`` forgets what comes from an earlier one.
    """

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._lock = threading.Lock()
        self._names: OrderedDict[str, dict[PromptRef, PromptVersion]] = OrderedDict()
        self._generation = 0

    @property
    def generation(self) -> int:
        """Counts the changes."""
        return self._generation

    def get(self, ref: PromptRef) -> PromptVersion | None:
        """What a reference means, if that is known."""
        with self._lock:
            refs = self._names.get(ref.name)
            if refs is None:
                return None
            self._names.move_to_end(ref.name)
            return refs.get(ref)

    def owner(self, name: str) -> str | None:
        """Whose a name is, if that is known; the name counts no more used than before."""
        with self._lock:
            refs = self._names.get(name)
            return next(iter(refs.values())).owner if refs else None

    def add(self, ref: PromptRef, version: PromptVersion, generation: int) -> None:
        """Keep a lookup's result, unless something has changed since its ``generation``."""
        with self._lock:
            if generation != self._generation:
                return
            refs = self._names.setdefault(ref.name, {})
            if len(refs) >= MAX_REFS_PER_NAME:
                refs.clear()
            refs[ref] = version
            self._names.move_to_end(ref.name)
            if len(self._names) > self._max_names:
                self._names.popitem(last=False)

    def invalidate(self, names: Iterable[str] | None) -> list[PromptRef]:
        """Forget what names meant, None being all of them; returns the references that were known."""
        with self._lock:
            self._generation += 1
            if names is None:
                forgotten = [ref for refs in self._names.values() for ref in refs]
                self._names.clear()
                return forgotten
            return [ref for name in names for ref in self._names.pop(name, {})]
