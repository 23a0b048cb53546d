"""How many replicas a base gets: by the sequences that wait and run, and by the tokens that are computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Seen(Protocol):
    """What the policy reads of Ray Serve's ``AutoscalingContext``."""

    @property
    def current_num_replicas(self) -> int:
        """Replicas that run."""
        ...

    @property
    def total_queued_requests(self) -> float:
        """Requests that wait for the first replica."""
        ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """By metric, the values that the replicas have recorded."""
        ...


class LoadPolicy:
    """As many replicas as keep each below the targets. Ray Serve applies bounds and delays.

    Args:
        sequences: Sequences per replica, running and waiting.
        tokens_per_second: Tokens per second and replica; None: only sequences count.
    """

    def __init__(self, sequences: float, tokens_per_second: float | None = None) -> None:
        self._sequences = sequences
        self._tokens_per_second = tokens_per_second

    def __call__(self, seen: Seen) -> tuple[float, dict[str, Any]]:
        """The number of replicas, before it is rounded up, and no state."""
        metrics = seen.aggregated_metrics or {}
        wanted = (sum(metrics.get("load", {}).values()) + seen.total_queued_requests) / self._sequences
        if self._tokens_per_second is not None:
            wanted = max(wanted, sum(metrics.get("tokens_per_second", {}).values()) / self._tokens_per_second)
        return wanted, {}
