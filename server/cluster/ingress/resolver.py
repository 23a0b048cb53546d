"""From the names in a request to a base and a content digest, by the catalogs of all bases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.errors import PromptNotFoundError, PromptStoreError
from prompt_store.types import Access, PromptKind, PromptRef, PromptVersion
from server.cluster.ingress.heads import RequestHead

logger = logging.getLogger(__name__)

_NUM_THREADS = 4
_SHORT = 16


class Names(Protocol):
    """The names of one base, as a cached catalog knows them."""

    def choose(
        self, ref: PromptRef, access: Access | None = None, key: str | None = None
    ) -> tuple[PromptVersion, PromptRef | None]:
        """The version that answers one request; raises PromptNotFoundError or StoreUnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Attributes:
        base: Name of the base.
        digest: Beginning of the content digest by which a replica is chosen; None for the bare base.
    """

    base: str
    digest: str | None


class Resolver:
    """Resolves the names of requests. What is unknown goes to a replica all the same, which reports the error.

    Lookups are cached and run in threads; a change of a name is known here when the replicas know it.

    Args:
        names: The names of each base; the first base is the default.
    """

    def __init__(self, names: Mapping[str, Names]) -> None:
        self._names = names
        self._default = next(iter(names))
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="resolve")

    @property
    def bases(self) -> frozenset[str]:
        """Names of the bases."""
        return frozenset(self._names)

    @property
    def order(self) -> list[str]:
        """Names of the bases, the default first."""
        return list(self._names)

    async def route(self, head: RequestHead, access: Access | None) -> Route:
        """Find out where a request goes.

        Args:
            head: What it names.
            access: What its caller may see; None is not known, and sees what is shared only.
        """
        refs = head.refs
        if not refs:
            return Route(self._named(head) or self._default, None)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._route, head, refs, access or Access(""))

    def _route(self, head: RequestHead, refs: Sequence[PromptRef], access: Access) -> Route:
        named = self._named(head)
        bases = list(self._names) if named is None else [named]
        for base in bases:
            versions = [version for ref in refs if (version := self._find(base, ref, access, head.key)) is not None]
            if versions:
                # Of a pair, the soft prompt decides: its blocks are what is slow to compute.
                first = min(versions, key=lambda version: version.kind is not PromptKind.SOFT_PROMPT)
                return Route(base, first.digest[:_SHORT])
        return Route(bases[0] if len(bases) == 1 else self._default, None)

    def _named(self, head: RequestHead) -> str | None:
        """The base that a request names, if there is one of that name."""
        return head.base if head.base in self._names else None

    def _find(self, base: str, ref: PromptRef, access: Access, key: str | None) -> PromptVersion | None:
        try:
            return self._names[base].choose(ref, access, key)[0]
        except PromptNotFoundError:
            return None
        except PromptStoreError:
            logger.warning("the catalog of %s cannot be reached: %s is routed without it", base, ref, exc_info=True)
            return None

    def close(self) -> None:
        """Stop its threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class CatalogNames:
    """The names in a PostgreSQL catalog, cached and watched; the files behind them are not opened.

    Args:
        url: URL of the catalog.
    """

    def __init__(self, url: str) -> None:
        self._catalog = Catalog(Database(url))
        self.cached = CachedCatalog(self._catalog)
        self.cached.watch()

    def choose(
        self, ref: PromptRef, access: Access | None = None, key: str | None = None
    ) -> tuple[PromptVersion, PromptRef | None]:
        """The version that answers one request."""
        return self.cached.choose(ref, access, key)

    def close(self) -> None:
        """Stop watching, and close the catalog."""
        self.cached.stop_watching()
        self._catalog.close()
