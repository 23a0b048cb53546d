"""Simulate many replicas: how many requests find their soft prompt on the device, and how even the load is.

    python -m benchmarks.cluster_simulation [--replicas 8,64,512] [--prompts 100000]

The router is the one of ``server.cluster``; replicas are simulated with measured durations of steps. First the
affinity of four replicas with room for a quarter of 256 soft prompts each; then larger clusters with failures and a
load that rises and falls once.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.cluster_parts.policies import POLICIES
from benchmarks.cluster_parts.simulation import Scenario, Simulation

_HEADER = (
    "| replicas | policy | warm | busiest over mean | TTFT p50 | p99 | failed, refused | us per choice and event |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def compare(scenario: Scenario, seed: int) -> None:
    """Run all policies on the same arrivals, and print a row of each, and first what all devices could hold."""
    weights = [1 / rank**scenario.zipf for rank in range(1, scenario.num_prompts + 1)]
    held = sum(weights[: scenario.num_replicas * scenario.num_warm]) / sum(weights)
    print(f"| {scenario.num_replicas} | one copy of the most popular | {held:.3f} | | | | | |")
    for name, policy in POLICIES.items():
        started = time.process_time()
        outcome = Simulation(scenario, policy, seed=seed).run()
        spent = (time.process_time() - started) / scenario.num_requests
        failed, refused = (number / outcome.requests for number in (outcome.failed, outcome.refused))
        print(
            f"| {scenario.num_replicas} | {name} | {outcome.warm_share:.3f} | {outcome.balance:.2f} "
            f"| {1000 * outcome.percentile(0.5):,.0f} ms | {1000 * outcome.percentile(0.99):,.0f} ms "
            f"| {failed:.2%}, {refused:.2%} | {1e6 * spent:.0f} |",
            flush=True,
        )


def main() -> None:
    """Simulate and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="8,64,512", help="sizes of the clusters, separated by commas")
    parser.add_argument("--prompts", type=int, default=100_000, help="soft prompts of the clusters")
    parser.add_argument("--warm", type=int, default=128, help="soft prompts that fit on a device")
    parser.add_argument("--requests", type=int, default=500, help="requests per replica")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("256 soft prompts, 4 replicas with room for 64 each\n\n" + _HEADER)
    compare(Scenario(num_replicas=4, num_prompts=256, num_warm=64, requests_per_replica=5000), arguments.seed)
    print(
        f"\n{arguments.prompts:,} soft prompts, room for {arguments.warm} each, failures, diurnal load\n\n{_HEADER}"
    )
    for number in map(int, arguments.replicas.split(",")):
        scenario = Scenario(
            num_replicas=number,
            num_prompts=arguments.prompts,
            num_warm=arguments.warm,
            requests_per_replica=arguments.requests,
            diurnal=0.3,
            failures=0.5,
        )
        compare(scenario, arguments.seed)


if __name__ == "__main__":
    main()
