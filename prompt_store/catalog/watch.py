"""Watches a shared catalog for the changes of other replicas."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Listener
from prompt_store.catalog.schema import state
from prompt_store.errors import StoreUnavailableError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Between looks at the revision, where no notification comes: behind a pooler that drops LISTEN, for instance."""


LONGEST_LOOK_SECONDS = 5.0
"""A hung server keeps its connections alive, so no network timeout detects it."""


@dataclass(frozen=True, slots=True)
class CatalogStatus:
    """Whether the catalog can be used.

    Attributes:
        is_available: Whether the newest attempt reached it.
        reason: What went wrong, where it did.
        since: When it became (un)available, in Unix seconds.
        revision: The newest revision that was seen.
    """

    is_available: bool
    reason: str | None
    since: float
    revision: int


class CatalogWatch:
    """A thread that reports which names other replicas have changed.

    Notifications bring a change within milliseconds; the revision is looked at every half second all the same.

    Args:
        catalog: A shared catalog.
        on_change: Called from the thread with the names that have changed, or None where that may be all.
        poll_seconds: How long to wait for a notification.
    """

    def __init__(
        self,
        catalog: Catalog,
        on_change: Callable[[set[str] | None], None],
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._catalog = catalog
        self._on_change = on_change
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._look_began: float | None = None
        self._status = CatalogStatus(True, None, time.time(), catalog.revision())
        self._thread = threading.Thread(target=self._run, name="catalog-watch", daemon=True)
        self._thread.start()

    @property
    def status(self) -> CatalogStatus:
        """Whether the catalog can be reached, as of the newest look; one that does not end tells that it can not."""
        began, status = self._look_began, self._status
        if status.is_available and began is not None and time.monotonic() - began > LONGEST_LOOK_SECONDS:
            reason = "the catalog takes connections and does not answer"
            return CatalogStatus(False, reason, time.time() - (time.monotonic() - began), status.revision)
        return status

    def close(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(timeout=2 * LONGEST_LOOK_SECONDS)  # it may hang in a look; it is a daemon

    def _run(self) -> None:
        while not self._stopping.is_set():
            listener: Listener | None = None
            try:
                listener = self._catalog.listen()
                while not self._stopping.is_set():
                    self._look_began = time.monotonic()
                    self._look(listener)
                    self._look_began = None
                    listener.wait(self._poll_seconds)
            except StoreUnavailableError as error:
                self._look_began = None
                self._lost(error)
                self._stopping.wait(self._poll_seconds)
            except Exception:
                # Whatever it was, a replica that stops watching would serve old versions for good.
                logger.exception("watching the catalog failed; trying again")
                self._stopping.wait(self._poll_seconds)
            finally:
                if listener is not None:
                    listener.close()

    def _look(self, listener: Listener) -> None:
        revision = int(listener.scalar(sa.select(state.c.revision)))
        seen = self._status
        if not seen.is_available:
            logger.warning("the catalog is reachable again after %.0f s", time.time() - seen.since)
            seen = self._status = CatalogStatus(True, None, time.time(), seen.revision)
        if revision != seen.revision:
            # A smaller one is another database, restored from a backup perhaps: nothing known is sure then.
            changed = self._catalog.changed_since(seen.revision) if revision > seen.revision else None
            self._on_change(changed)
            self._status = CatalogStatus(True, None, seen.since, revision)

    def _lost(self, error: StoreUnavailableError) -> None:
        seen = self._status
        if seen.is_available:
            logger.warning("%s; continuing with cached names and versions", error)
            self._status = CatalogStatus(False, str(error), time.time(), seen.revision)
