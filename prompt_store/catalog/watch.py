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
"""The interval of polling the revision without notifications, for instance behind a pooler that drops LISTEN."""


MAX_POLL_SECONDS = 5.0
"""A hung server keeps its connections alive, so no network timeout detects it."""


@dataclass(frozen=True, slots=True)
class CatalogStatus:
    """Whether the catalog can be used.

    Attributes:
        is_available: Whether the last attempt reached it.
        reason: The error of the last attempt, if any.
        since: Unix time in seconds at which it became available or unavailable.
        revision: The newest known revision.
    """

    is_available: bool
    reason: str | None
    since: float
    revision: int


class CatalogWatch:
    """A thread that reports which names other replicas have changed.

    Notifications report a change within milliseconds. The revision is also polled.

    Args:
        catalog: A shared catalog.
        on_change: Called from the thread with the changed names, or None if all may have changed.
        poll_seconds: Maximum wait for a notification.
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
        self._poll_began: float | None = None
        self._status = CatalogStatus(True, None, time.time(), catalog.revision())
        self._thread = threading.Thread(target=self._run, name="catalog-watch", daemon=True)
        self._thread.start()

    @property
    def status(self) -> CatalogStatus:
        """Whether the last poll reached the catalog; a poll that takes too long counts as a failure."""
        began, status = self._poll_began, self._status
        if status.is_available and began is not None and time.monotonic() - began > MAX_POLL_SECONDS:
            reason = "the catalog takes connections and does not answer"
            return CatalogStatus(False, reason, time.time() - (time.monotonic() - began), status.revision)
        return status

    def close(self) -> None:
        """Stop the thread."""
        self._stopping.set()
        self._thread.join(timeout=2 * MAX_POLL_SECONDS)  # it may hang in a poll; it is a daemon

    def _run(self) -> None:
        while not self._stopping.is_set():
            listener: Listener | None = None
            try:
                listener = self._catalog.listen()
                while not self._stopping.is_set():
                    self._poll_began = time.monotonic()
                    self._poll(listener)
                    self._poll_began = None
                    listener.wait(self._poll_seconds)
            except StoreUnavailableError as error:
                self._poll_began = None
                self._set_unavailable(error)
                self._stopping.wait(self._poll_seconds)
            except Exception:
                # A replica that stops watching would serve old versions forever.
                logger.exception("watching the catalog failed; trying again")
                self._stopping.wait(self._poll_seconds)
            finally:
                if listener is not None:
                    listener.close()

    def _poll(self, listener: Listener) -> None:
        revision = int(listener.scalar(sa.select(state.c.revision)))
        seen = self._status
        if not seen.is_available:
            logger.warning("the catalog is reachable again after %.0f s", time.time() - seen.since)
            seen = self._status = CatalogStatus(True, None, time.time(), seen.revision)
        if revision != seen.revision:
            # A smaller revision means another database, perhaps a restored backup: the whole cache is stale.
            changed = self._catalog.changed_since(seen.revision) if revision > seen.revision else None
            self._on_change(changed)
            self._status = CatalogStatus(True, None, seen.since, revision)

    def _set_unavailable(self, error: StoreUnavailableError) -> None:
        seen = self._status
        if seen.is_available:
            logger.warning("%s; continuing with cached names and versions", error)
            self._status = CatalogStatus(False, str(error), time.time(), seen.revision)
