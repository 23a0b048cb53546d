"""Log one line per connection that is rejected or closed early, at a limited rate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.logs import FIELDS

logger = logging.getLogger(__name__)

LINES_PER_SECOND = 10
"""Per code. Rejected connections cost a client nothing and need no key, so unlimited lines could fill a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A connection that was rejected or ended before its request had begun, or while its response was unread.

    Attributes:
        code: Error code, as in the metrics.
        reason: Error message.
        status: HTTP status of the response; None if there was none.
        request_id: X-Request-ID of the response, or of the request whose response was not read; None if none.
        client: Address of the client, or of a proxy.
        tenant: Tenant of the API key, if known.
    """

    code: str
    reason: str
    status: int | None = None
    request_id: str | None = None
    client: str | None = None
    tenant: str | None = None


class RefusalLog:
    """Logs refusals. Used on the event loop only, so it needs no lock.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, tuple[int, int]] = {}
        self._omitted: dict[str, int] = {}

    def log(self, refusal: Refusal) -> None:
        """Log one, or count it for the next line of its code."""
        second = int(self._clock())
        begun, count = self._seconds.get(refusal.code, (second, 0))
        count = count + 1 if begun == second else 1
        self._seconds[refusal.code] = second, count
        if count > LINES_PER_SECOND:
            self._omitted[refusal.code] = self._omitted.get(refusal.code, 0) + 1
            return
        fields = {
            "request_id": refusal.request_id,
            "tenant": refusal.tenant,
            "status": refusal.status,
            "error": refusal.code,
            "reason": refusal.reason,
            "client": refusal.client,
            "omitted": self._omitted.pop(refusal.code, None),
        }
        logger.info(
            "refused: %s, status %s, client %s, request %s",
            refusal.code,
            refusal.status or "none",
            refusal.client or "unknown",
            refusal.request_id or "none",
            extra={FIELDS: {name: value for name, value in fields.items() if value is not None}},
        )
