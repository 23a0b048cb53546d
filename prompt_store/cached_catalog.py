"""The catalog with a cache of resolved references, which changes and the watch keep fresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.resolve_cache import ResolveCache, Resolved
from prompt_store.catalog.watch import CatalogStatus, CatalogWatch
from prompt_store.errors import PromptForbiddenError, PromptNotFoundError, StoreUnavailableError
from prompt_store.types import Access, PromptRef, PromptVersion, StoreTotals

_MAX_REFRESHED = 1000


class CachedCatalog:
    """Cached lookups, and blocks that change names and drop them from the cache. Thread-safe.

    Args:
        catalog: Closed by the caller.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._resolved = ResolveCache()
        self._subscribers: list[Callable[[set[str] | None], None]] = []
        self._totals = (-1, StoreTotals())
        """With their generation: counting a hundred thousand names at each scrape would be slow."""
        self._watch: CatalogWatch | None = None

    def watch(self) -> None:
        """Start to watch a shared catalog for the changes of other replicas."""
        if self._catalog.is_shared:
            self._watch = CatalogWatch(self._catalog, self._apply_changes)

    def stop_watching(self) -> None:
        """Stop the watch, if there is one."""
        if self._watch is not None:
            self._watch.close()

    def subscribe(self, callback: Callable[[set[str] | None], None]) -> None:
        """Register a callback for names changed by other replicas, as ``PromptStore.subscribe`` does."""
        self._subscribers.append(callback)

    @property
    def status(self) -> CatalogStatus:
        """Whether the catalog is reachable."""
        if self._watch is None:
            return CatalogStatus(True, None, 0.0, 0)
        return self._watch.status

    def require(self) -> None:
        """Fail at once while the catalog is known to be unreachable; an attempt would block a thread for seconds.

        Raises:
            StoreUnavailableError: If it is.
        """
        status = self.status
        if not status.is_available:
            raise StoreUnavailableError(status.reason or "the catalog cannot be reached")

    def resolve(self, ref: PromptRef, access: Access | None = None) -> PromptVersion:
        """Resolve a reference, from the cache if possible.

        Raises:
            PromptNotFoundError: If there is none.
            StoreUnavailableError: If it is not cached and the catalog cannot be reached.
        """
        return self._look_up(ref, access)[0]

    def choose(
        self, ref: PromptRef, access: Access | None = None, key: str | None = None
    ) -> tuple[PromptVersion, PromptRef | None]:
        """Resolve a reference to the version that answers one request.

        One state of the alias decides, so no request gets a version that the alias never sent it to.

        Args:
            ref: An alias draws from its rollout.
            access: What the caller may see.
            key: Requests with the same key get the same version as long as the rollout lasts.

        Returns:
            The version, and the version that gets a copy of the request, if any.

        Raises:
            PromptNotFoundError: If there is none.
            StoreUnavailableError: If it is not cached and the catalog cannot be reached.
        """
        version, rollout = self._look_up(ref, access)
        number = rollout.draw(version.version, ref.name, key)
        if number != version.version:
            try:
                version = self.resolve(PromptRef(ref.name, version=number, alias=None), access)
            except PromptNotFoundError:
                version = self.resolve_again(ref, access)  # deleted since, which has ended the rollout
        shadow = rollout.draw_shadow()
        if shadow is None or shadow == version.version:
            return version, None
        return version, PromptRef(ref.name, version=shadow, alias=None)

    def _look_up(self, ref: PromptRef, access: Access | None) -> Resolved:
        found = self._resolved.get(ref)
        # A cached version of another tenant is looked up like an unknown name: an answer without the catalog, while
        # it is unreachable or slow, would reveal that the name exists.
        if found is None or not (access is None or access.sees(found[0].owner)):
            self.require()
            generation = self._resolved.generation
            found = version, rollout = self._catalog.look_up(ref, access)
            # First, so that an outage of the catalog cannot fail the requests of canaries only.
            for number in rollout.canaries:
                canary = PromptRef(ref.name, version=number, alias=None)
                self._resolved.add(canary, self._catalog.resolve(canary, access), generation)
            self._resolved.add(ref, version, generation, rollout)
        return found

    def resolve_again(self, ref: PromptRef, access: Access | None = None) -> PromptVersion:
        """Resolve a reference without the cache, whose version has no files any more; raises what ``resolve`` does.

        The cache is invalidated only if this succeeds: while the catalog is unreachable, nothing else is known.
        """
        self.require()
        fresh = self._catalog.resolve(ref, access)
        self._resolved.invalidate([ref.name])
        return fresh

    @property
    def last_totals(self) -> StoreTotals:
        """The result of the last ``totals``."""
        return self._totals[1]

    def totals(self) -> StoreTotals:
        """Number of names, versions and blobs; the last known one while the catalog is unreachable."""
        generation = self._resolved.generation
        known, totals = self._totals
        if known != generation and self.status.is_available:
            totals = self._catalog.totals()
            self._totals = (generation, totals)
        return totals

    @contextmanager
    def changing(self, name: str, access: Access | None = None) -> Iterator[None]:
        """A block that changes a name in the catalog; afterwards the cache does not know the name.

        Raises:
            StoreUnavailableError: If the catalog is known to be unreachable.
        """
        self.require()
        try:
            yield
        except StoreUnavailableError:
            # In a shared catalog the watch finds changes that were written; until then the cache stays in use.
            owner = self._resolved.owner(name)
            is_anothers = access is not None and owner is not None and not access.changes(owner)
            if not (self._catalog.is_shared or is_anothers):
                self._resolved.invalidate([name])
            raise
        except (PromptNotFoundError, PromptForbiddenError):
            raise  # nothing was changed, and the caller may not be permitted to see the name
        except BaseException:
            self._resolved.invalidate([name])
            raise
        self._resolved.invalidate([name])

    def _apply_changes(self, names: set[str] | None) -> None:
        """Drop changed names from the cache, and resolve the recently used ones again."""
        for ref in self._resolved.invalidate(names)[-_MAX_REFRESHED:]:
            try:
                self.resolve(ref)
            except PromptNotFoundError:
                continue
            except StoreUnavailableError:
                break
        for callback in self._subscribers:
            callback(names)
