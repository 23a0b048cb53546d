"""Rollouts: what is accepted, and which version a draw gives."""

from __future__ import annotations

import random
from collections import Counter
from math import sqrt

import pytest

from prompt_store import rollouts
from prompt_store.rollouts import NO_ROLLOUT, Rollout, Shadow


def test_a_rollout_is_read_and_written() -> None:
    value = {"canaries": {"8": 5, "9": 0.5}, "shadow": {"version": 10, "percent": 25}}
    rollout = Rollout.parse(value)
    assert rollout == Rollout({8: 5.0, 9: 0.5}, Shadow(10, 25.0))
    assert rollout.versions == {8, 9, 10}
    assert Rollout.parse(rollout.to_json()) == rollout
    assert Rollout.parse({}) == NO_ROLLOUT
    assert NO_ROLLOUT.to_json() == {}
    rollout.check(7)
    for own in (8, 10):
        with pytest.raises(ValueError, match="is the alias's own"):
            rollout.check(own)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be an object with canaries and shadow"),
        ({"weights": {}}, "must be an object with canaries and shadow"),
        ({"canaries": {str(number): 1 for number in range(1, 10)}}, "at most 8 versions"),
        ({"canaries": {"8": 60, "9": 41}}, "take 101% of the requests"),
        ({"canaries": {"8": 5, "08": 5}}, "names a version twice"),
        ({"canaries": {"0": 5}}, "'0' is not a version number"),
        ({"canaries": {"latest": 5}}, "'latest' is not a version number"),
        ({"canaries": {"9" * 25: 5}}, "is not a version number"),
        ({"canaries": {"8": 0}}, "above 0 and at most 100"),
        ({"canaries": {"8": float("nan")}}, "above 0 and at most 100"),
        ({"canaries": {"8": True}}, "above 0 and at most 100"),
        ({"shadow": {"version": 9}}, "must be an object with version and percent"),
        ({"shadow": {"version": True, "percent": 1}}, "is not a version number"),
        ({"shadow": {"version": 9, "percent": 101}}, "above 0 and at most 100"),
    ],
)
def test_an_invalid_rollout_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rollout.parse(value)


def test_draws_follow_the_percents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "random", random.Random(1))
    rollout = Rollout({8: 5.0, 9: 20.0})
    found = Counter(rollout.draw(7, "p", None) for _ in range(10_000))
    for version, share in {7: 0.75, 8: 0.05, 9: 0.2}.items():
        assert abs(found[version] - 10_000 * share) < 3 * sqrt(10_000 * share * (1 - share))
    assert Counter(NO_ROLLOUT.draw(7, "p", None) for _ in range(100)) == {7: 100}
    assert Counter(Rollout({8: 100.0}).draw(7, "p", None) for _ in range(100)) == {8: 100}


def test_a_key_keeps_its_version() -> None:
    keys = [f"user-{number}" for number in range(10_000)]
    few, more = Rollout({8: 5.0}), Rollout({8: 10.0})
    canary = {key for key in keys if few.draw(7, "p", key) == 8}
    assert abs(len(canary) - 500) < 3 * sqrt(500 * 0.95)
    assert canary == {key for key in keys if few.draw(7, "p", key) == 8}
    assert canary < {key for key in keys if more.draw(7, "p", key) == 8}  # a larger percent takes none away
    # Another soft prompt, and another version, meet other clients first.
    assert len(canary & {key for key in keys if few.draw(7, "q", key) == 8}) < 100
    assert len(canary & {key for key in keys if Rollout({9: 5.0}).draw(7, "p", key) == 9}) < 100


def test_a_share_is_copied_to_the_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "random", random.Random(1))
    rollout = Rollout({}, Shadow(9, 25.0))
    found = Counter(rollout.draw_shadow() for _ in range(10_000))
    assert found.keys() == {None, 9}
    assert abs(found[9] - 2500) < 3 * sqrt(2500 * 0.75)
    assert {rollout.draw(7, "p", None) for _ in range(100)} == {7}
    assert NO_ROLLOUT.draw_shadow() is None
