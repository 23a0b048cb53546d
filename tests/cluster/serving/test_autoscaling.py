"""How many replicas a base gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from server.cluster.serving.autoscaling import LoadPolicy


@dataclass
class Seen:
    aggregated_metrics: dict[str, dict[str, float]] | None = field(default_factory=dict)
    total_queued_requests: float = 0.0
    current_num_replicas: int = 1


@pytest.mark.parametrize(
    ("loads", "tokens", "queued", "wanted"),
    [([10, 30], [0, 0], 0, 4.0), ([0, 0], [0, 0], 0, 0.0), ([1], [300], 0, 3.0), ([], [], 5, 0.5)],
)
def test_the_higher_of_sequences_and_tokens_decides(
    loads: list[float], tokens: list[float], queued: float, wanted: float
) -> None:
    def named(values: list[float]) -> dict[str, float]:
        return {str(index): value for index, value in enumerate(values)}

    policy = LoadPolicy(sequences=10.0, tokens_per_second=100.0)
    metrics = {"load": named(loads), "tokens_per_second": named(tokens)}
    assert policy(Seen(metrics, queued)) == (wanted, {})
    assert LoadPolicy(sequences=10.0)(Seen(None, 20.0)) == (2.0, {})
