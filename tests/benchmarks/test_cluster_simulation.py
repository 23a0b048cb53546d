"""The simulation of ``benchmarks.cluster_simulation``: its model, and what the router must reach in it."""

from __future__ import annotations

import pytest

from benchmarks.cluster_parts.policies import POLICIES
from benchmarks.cluster_parts.simulation import Outcome, Scenario, Simulation, step_seconds


def run(name: str, scenario: Scenario) -> Outcome:
    return Simulation(scenario, POLICIES[name]).run()


def test_steps_take_the_measured_time_and_between_sizes_a_mean() -> None:
    assert step_seconds(1) == pytest.approx(0.0197)
    assert step_seconds(64) == pytest.approx(0.0739)
    assert step_seconds(40) == pytest.approx((0.0336 + 0.0739) / 2)


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_once(name: str) -> None:
    scenario = Scenario(
        num_replicas=3, num_prompts=50, num_warm=16, requests_per_replica=100, failures=2.0, diurnal=0.5
    )
    outcome = run(name, scenario)
    assert outcome.requests == 0.75 * scenario.num_requests
    assert outcome.failed + outcome.refused + len(outcome.first_token_seconds) == outcome.requests
    assert outcome.failed > 0
    assert sum(outcome.served) == outcome.requests - outcome.refused
    assert min(outcome.first_token_seconds) >= 64 * 0.0081 / 24 + step_seconds(1)


def test_a_quarter_of_the_soft_prompts_fits_and_nine_of_ten_requests_find_theirs() -> None:
    """256 soft prompts over 4 replicas with room for 64 each, Zipf 1.0."""
    scenario = Scenario(num_replicas=4, num_prompts=256, num_warm=64, requests_per_replica=400)
    outcome = run("warmth", scenario)
    assert outcome.warm_share >= 0.9
    assert outcome.balance <= 1.25
    other = run("random", scenario)
    assert other.warm_share < outcome.warm_share - 0.1
