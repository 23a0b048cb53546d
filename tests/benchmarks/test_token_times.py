"""The driver of ``benchmarks.prefill --parts first-token``, with an engine whose steps have known durations."""

import pytest

from benchmarks.peers.token_times import QUIET_STEPS, measure_token_times
from benchmarks.prefill_parts.first_token import percentile, summary


class SteppedEngine:
    """A step takes a second, and two more if it computes a text; a new request gets its token in its second step."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: dict[str, int] = {}
        self.started: set[str] = set()
        self.aborted: list[str] = []

    def clock(self) -> float:
        return self.now

    def add(self, request_id: str, token_ids: list[int], max_tokens: int) -> None:
        assert token_ids
        self.left[request_id] = max_tokens

    def step(self) -> list[str]:
        self.now += 3 if any(name.startswith("text") for name in self.left) else 1
        received = [name for name in self.left if name in self.started]
        self.started |= set(self.left)
        for name in received:
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
        return received

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.left.pop(request_id, None)


def test_gaps_are_those_of_running_decodes_and_the_next_text_waits_for_the_one_before() -> None:
    engine = SteppedEngine()
    times = measure_token_times(engine, [[1], [2]], [[3]] * 4, steps_between=5, decode_tokens=100, clock=engine.clock)
    assert times.first_token == [6.0, 6.0]
    assert times.quiet_gaps == [1.0] * 4 * QUIET_STEPS
    assert sorted(times.gaps) == [1.0] * 4 * 2 * 5 + [3.0] * 4 * 2 * 2
    assert engine.aborted == ["decode0", "decode1", "decode2", "decode3"]
    assert not engine.left


def test_texts_alone_have_no_gaps_and_no_steps_between() -> None:
    engine = SteppedEngine()
    times = measure_token_times(engine, [[1]] * 3, [], steps_between=5, decode_tokens=100, clock=engine.clock)
    assert times.first_token == [6.0] * 3
    assert times.gaps == times.quiet_gaps == []
    assert engine.now == 18.0


def test_a_decode_that_ends_while_texts_arrive_is_an_error() -> None:
    engine = SteppedEngine()
    with pytest.raises(RuntimeError, match="too few"):
        measure_token_times(
            engine, [[1]] * 3, [[3]], steps_between=5, decode_tokens=QUIET_STEPS + 10, clock=engine.clock
        )


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (1, 1.0), (50, 50.0), (50.5, 51.0), (99, 99.0), (100, 100.0)]
)
def test_a_percentile_is_one_of_the_values(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], percent) == expected
    assert percentile([7.0], percent) == 7.0


def test_a_summary_has_the_slow_steps_in_the_99th_percentile_but_not_in_the_median() -> None:
    alone, beside = SteppedEngine(), SteppedEngine()
    figures = summary(
        measure_token_times(alone, [[1]], [], steps_between=8, decode_tokens=100, clock=alone.clock),
        measure_token_times(beside, [[1]], [[2]], steps_between=8, decode_tokens=100, clock=beside.clock),
    )
    assert figures == {
        "first token alone": 6000.0,
        "first token beside decodes": 6000.0,
        "gap without texts": 1000.0,
        "gap": 1000.0,
        "gap p99": 3000.0,
        "longest gap": 3000.0,
    }
