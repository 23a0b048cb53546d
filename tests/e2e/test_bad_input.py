"""Malformed bodies during a stream, on a whole server."""

from __future__ import annotations

import asyncio
import random

import httpx

from scripts.mutate_bodies import mutated, run


def test_mutated_bodies_are_answered_quickly_and_do_not_affect_a_stream(demo_server: httpx.Client) -> None:
    quiet, loud = asyncio.run(run(str(demo_server.base_url), bodies=80, seed=3))
    assert loud.faults == []
    assert sum(loud.statuses.values()) == 80
    assert {400, 413} <= loud.statuses.keys()
    assert loud.slowest < 30
    assert quiet.longest_gap > 0
    assert 0 < loud.longest_gap < 10


def test_mutations_are_of_every_kind_and_repeatable() -> None:
    bodies = [mutated(random.Random(seed)) for seed in range(200)]
    assert bodies == [mutated(random.Random(seed)) for seed in range(200)]
    assert max(len(body) for _, body in bodies) > 10_000_000
    assert any(b"[" * 1000 in body for _, body in bodies)
    assert any(b"regex" in body for _, body in bodies)
