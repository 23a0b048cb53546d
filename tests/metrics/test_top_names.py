"""Places go to the names that are used most at present."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.metrics.top_names import HALF_LIFE_SECONDS, TopNames


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_free_places_are_taken_at_once_and_ties_keep_the_holder() -> None:
    top = TopNames(2, clock=Clock())
    assert [top.use(name) for name in "abcdcdab"] == [None] * 4 + ["a", "b"] + [None] * 2
    top = TopNames(2, clock=Clock())
    assert [top.use(name) for name in "abcdefgh"] == [None] * 8
    assert top.holds("a")
    assert not top.holds("c")


def test_old_uses_count_little() -> None:
    clock = Clock()
    top = TopNames(1, clock=clock)
    for _ in range(1000):
        top.use("old")
    clock.now += 10 * HALF_LIFE_SECONDS
    assert [top.use("new"), top.use("new")] == [None, "old"]
    # The same holds after more half-lives than a float's exponent allows.
    clock.now += 3000 * HALF_LIFE_SECONDS
    assert [top.use("newer"), top.use("newest")] == ["new", None]


def test_with_no_places_no_name_is_held() -> None:
    top = TopNames(0)
    assert top.use("a") is None
    assert not top.holds("a")


@given(
    size=st.integers(1, 4),
    uses=st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.floats(0, 2000)), max_size=200),
)
def test_memory_is_limited_and_a_frequent_name_gets_a_place(size: int, uses: list[tuple[str, float]]) -> None:
    clock = Clock()
    top = TopNames(size, clock=clock)
    held: set[str] = set()
    for name, pause in uses:
        clock.now += pause
        lost = top.use(name)
        if lost is not None:
            assert lost in held
            held.discard(lost)
        held = {known for known in held | {name} if top.holds(known)}
        assert len(held) == len(top._top) <= size
        assert len(top._candidates) <= 4 * size
        assert not top._top.keys() & top._candidates.keys()
    counts = Counter(name for name, _ in uses)
    # A name that alone is used from now on soon gets a place.
    for _ in range(2 * (max(counts.values(), default=0) + 1)):
        top.use("newcomer")
    assert top.holds("newcomer")
