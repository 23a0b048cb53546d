"""The memory of adapters: its budget, who holds what, what is evicted, and pins."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.scheduling.adapter_memory import MAX_KNOWN_SIZES, AdapterMemory, Hold
from server.engine.types import AdapterSource


class Files:
    """Notes what is read and dropped."""

    def __init__(self) -> None:
        self.reading: list[str] = []
        self.resident: set[str] = set()

    def start(self, source: AdapterSource) -> None:
        self.reading.append(source.identity)

    def drop(self, identity: str) -> None:
        self.resident.remove(identity)


def adapter(name: str, num_parameters: int = 10) -> AdapterSource:
    return AdapterSource(digest=name, path="/nowhere", config_path="/nowhere", num_parameters=num_parameters)


def make(
    budget: int = 30, *, held_bytes: int | None = None, max_reads: int = 8, item: int = 1
) -> tuple[AdapterMemory, Files]:
    files = Files()
    memory = AdapterMemory(
        files, budget_bytes=budget, bytes_per_parameter=item, held_bytes=held_bytes, max_reads=max_reads
    )
    return memory, files


def end(memory: AdapterMemory, files: Files, name: str, nbytes: int | None = 10) -> str | None:
    files.reading.remove(name)
    if nbytes is not None:
        files.resident.add(name)
    return memory.end_read(name, nbytes)


def acquire(memory: AdapterMemory, seq: str, *names: str, may_take_room: bool = True) -> Hold:
    return memory.acquire(seq, [adapter(name) for name in names], may_take_room=may_take_room)


def load(memory: AdapterMemory, files: Files, *names: str) -> None:
    """Make adapters idle, in this order."""
    for name in names:
        acquire(memory, f"load {name}", name)
        end(memory, files, name)
        memory.release(f"load {name}")


def test_an_adapter_is_read_once_for_all_that_hold_it() -> None:
    memory, files = make()
    assert acquire(memory, "s", "a") is Hold.READING
    assert acquire(memory, "t", "a") is Hold.READING
    assert acquire(memory, "s", "a") is Hold.READING
    assert files.reading == ["a"]
    assert memory.is_reading
    assert list(memory.entries()) == [("a", 2, False)]
    assert not memory.is_held("s")
    assert end(memory, files, "a") is None
    assert list(memory.entries()) == [("a", 2, True)]
    assert memory.is_held("s")
    assert acquire(memory, "s", "a") is acquire(memory, "u", "a", "a") is Hold.READY
    assert (memory.stats.misses, memory.stats.hits) == (1, 2)
    assert (memory.num_resident, memory.resident_bytes, memory.is_reading) == (1, 10, False)


def test_the_least_recently_used_is_evicted_and_what_is_held_stays() -> None:
    memory, files = make()
    load(memory, files, "a", "b", "c")
    acquire(memory, "s", "a")
    memory.release("s")  # now b is the oldest
    acquire(memory, "t", "c")
    assert acquire(memory, "u", "d") is Hold.READING
    assert files.resident == {"a", "c"}
    assert acquire(memory, "v", "e") is Hold.READING
    assert files.resident == {"c"}
    assert acquire(memory, "w", "f") is Hold.NO_ROOM
    assert files.reading == ["d", "e"]
    assert memory.stats.evictions == 2


def test_all_adapters_of_an_ensemble_are_held_or_none() -> None:
    memory, files = make()
    load(memory, files, "a", "b")
    acquire(memory, "s", "c")
    acquire(memory, "t", "a")
    assert acquire(memory, "u", "b", "d", "e") is Hold.NO_ROOM
    assert not memory.release("u")
    assert files.resident == {"a", "b"}  # nothing was evicted in vain
    assert acquire(memory, "v", "d") is Hold.READING  # b was not held
    assert files.resident == {"a"}


def test_an_adapter_of_an_ensemble_is_not_evicted_for_another_of_the_same() -> None:
    memory, files = make()
    load(memory, files, "a", "b", "c")
    assert acquire(memory, "s", "a", "d", "e") is Hold.READING
    assert files.resident == {"a"}


def test_later_sequences_take_no_room() -> None:
    memory, files = make()
    load(memory, files, "a", "b")
    acquire(memory, "s", "a")
    assert acquire(memory, "t", "a", may_take_room=False) is Hold.READY
    assert acquire(memory, "u", "b", may_take_room=False) is Hold.NO_ROOM  # idle, so the first one may need its room
    assert acquire(memory, "v", "c", may_take_room=False) is Hold.NO_ROOM
    assert files.reading == []


def test_a_bounded_number_is_read_at_once() -> None:
    memory, files = make(100, max_reads=2)
    assert acquire(memory, "s", "a") is acquire(memory, "t", "b") is Hold.READING
    assert acquire(memory, "u", "c") is Hold.BUSY
    end(memory, files, "a")
    assert acquire(memory, "u", "c") is Hold.READING
    for name in "bc":
        end(memory, files, name)
    assert acquire(memory, "v", "d", "e", "f") is Hold.READING  # more than the bound, but alone


def test_a_device_limits_what_is_held() -> None:
    memory, files = make(100, held_bytes=20)
    load(memory, files, "a", "b", "c")
    assert acquire(memory, "s", "a") is acquire(memory, "t", "b") is Hold.READY
    assert acquire(memory, "u", "c") is Hold.NO_ROOM
    assert acquire(memory, "v", "b") is Hold.READY
    memory.release("s")
    assert acquire(memory, "u", "c") is Hold.READY
    with pytest.raises(ValueError, match="need 30 bytes of memory; the engine has 20"):
        memory.check([adapter("a"), adapter("b"), adapter("c"), adapter("a")])


def test_sizes_are_estimated_from_parameters() -> None:
    memory, _ = make(40, item=4)
    memory.check([adapter("a", 10)])
    with pytest.raises(ValueError, match="44 bytes"):
        memory.check([adapter("a", 11)])


def test_a_failed_read_is_forgotten() -> None:
    memory, files = make()
    acquire(memory, "s", "a", "b")
    acquire(memory, "t", "a")
    assert end(memory, files, "a", None) is None
    assert not memory.release("s")  # everything was released already
    assert not memory.release("t")
    end(memory, files, "b")
    assert (memory.num_resident, files.resident) == (1, {"b"})
    assert acquire(memory, "u", "a") is Hold.READING  # it is tried again


def test_an_adapter_that_outgrows_its_room_is_acquired_with_its_actual_size() -> None:
    memory, files = make()
    acquire(memory, "s", "a")
    acquire(memory, "t", "b")
    end(memory, files, "a")
    assert end(memory, files, "b", 21) is None
    assert files.resident == {"a"}
    assert acquire(memory, "t", "b") is Hold.NO_ROOM
    memory.release("s")
    assert acquire(memory, "t", "b") is Hold.READING
    assert files.resident == set()
    assert end(memory, files, "b", 21) is None
    assert acquire(memory, "t", "b") is Hold.READY


def test_an_adapter_that_outgrows_its_estimate_evicts_idle_ones() -> None:
    memory, files = make()
    load(memory, files, "a", "b")
    acquire(memory, "s", "c")
    assert end(memory, files, "c", 15) is None
    assert files.resident == {"b", "c"}
    assert acquire(memory, "s", "c") is Hold.READY


def test_an_adapter_that_never_fits_is_refused() -> None:
    memory, files = make()
    memory.pin(adapter("a"))
    acquire(memory, "s", "a")
    refused = end(memory, files, "a", 31)
    assert refused == "its 31 bytes are more than the 30 that the engine has for adapters"
    assert files.resident == set()
    assert not memory.is_pinned(adapter("a"))
    with pytest.raises(ValueError, match="31 bytes"):
        memory.check([adapter("a")])


def test_actual_sizes_of_a_bounded_number_of_adapters_are_kept() -> None:
    memory, files = make(10)
    for number in range(MAX_KNOWN_SIZES + 2):
        acquire(memory, "s", f"a{number}")
        end(memory, files, f"a{number}", 7)
        memory.release("s")
    assert len(memory._sizes) == MAX_KNOWN_SIZES


def test_pins_stay_and_come_back() -> None:
    memory, files = make()
    memory.pin(adapter("p"))
    memory.pin(adapter("p"))
    assert files.reading == ["p"]
    end(memory, files, "p")
    load(memory, files, "a", "b", "c")
    assert files.resident == {"p", "b", "c"}
    memory.unpin(adapter("p"))
    memory.unpin(adapter("p"))
    load(memory, files, "d")
    assert files.resident == {"p", "c", "d"}  # the pin's end made it the most recently used
    load(memory, files, "e", "f")
    assert "p" not in files.resident


def test_an_idle_adapter_is_pinned_without_a_read() -> None:
    memory, files = make()
    load(memory, files, "p")
    memory.pin(adapter("p"))
    assert files.reading == []
    load(memory, files, "a", "b", "c")
    assert "p" in files.resident


def test_a_pin_gives_way_only_to_a_sequence_that_could_never_run() -> None:
    memory, files = make()
    for name in "pq":
        memory.pin(adapter(name))
        end(memory, files, name)
    acquire(memory, "s", "a")
    large = adapter("large", 25)
    assert memory.acquire("t", [large], may_take_room=True) is Hold.NO_ROOM  # s ends some time
    end(memory, files, "a")
    assert memory.acquire("t", [large], may_take_room=True) is Hold.NO_ROOM
    memory.release("s")
    assert memory.acquire("t", [large], may_take_room=True) is Hold.READING
    assert files.resident == set()
    end(memory, files, "large", 25)
    memory.read_pins()
    assert files.reading == []  # no room beside what is held
    memory.release("t")
    memory.read_pins()
    assert files.reading == ["p", "q"]
    for name in "pq":
        end(memory, files, name)
    assert files.resident == {"p", "q"}


def test_a_pin_that_never_fits_is_refused() -> None:
    memory, _ = make()
    with pytest.raises(ValueError, match="--adapter-host-memory"):
        memory.pin(adapter("p", 31))
    assert not memory.is_pinned(adapter("p", 31))


def test_a_pin_whose_file_cannot_be_read_ends() -> None:
    memory, files = make()
    memory.pin(adapter("p"))
    end(memory, files, "p", None)
    memory.read_pins()
    assert files.reading == []


SIZES = {"a": 3, "b": 5, "c": 8, "d": 13, "e": 20}
ACTUAL = {"a": 3, "b": 7, "c": 8, "d": 14, "e": 21}


class Machine(RuleBasedStateMachine):
    """Random sequences, reads and pins: the books must balance, and memory never exceeds its budget."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.files = make(21, held_bytes=21, max_reads=3)
        self.held: dict[str, list[AdapterSource]] = {}

    @rule(seq=st.sampled_from("stuvw"), names=st.sets(st.sampled_from("abcde"), min_size=1, max_size=3))
    def acquire(self, seq: str, names: set[str]) -> None:
        if seq not in self.held:
            sources = [adapter(name, SIZES[name]) for name in sorted(names)]
            if self.memory.acquire(seq, sources, may_take_room=True) in (Hold.READY, Hold.READING):
                self.held[seq] = sources

    @rule(seq=st.sampled_from("stuvw"))
    def release(self, seq: str) -> None:
        assert self.memory.release(seq) == (self.held.pop(seq, None) is not None)

    @rule(fails=st.booleans())
    @precondition(lambda self: self.files.reading)
    def end_read(self, fails: bool) -> None:
        name = self.files.reading[0]
        end(self.memory, self.files, name, None if fails else ACTUAL[name])
        if name not in self.files.resident:
            self.held = {seq: held for seq, held in self.held.items() if all(one.identity != name for one in held)}

    @rule(name=st.sampled_from("abcde"))
    def pin(self, name: str) -> None:
        source = adapter(name, SIZES[name])
        if self.memory.is_pinned(source):
            self.memory.unpin(source)
        else:
            self.memory.pin(source)

    @rule()
    def read_pins(self) -> None:
        self.memory.read_pins()

    @rule(name=st.sampled_from("abcde"))
    def one_that_fits_gets_its_turn(self, name: str) -> None:
        for seq in list(self.held):
            self.release(seq)
        while self.files.reading:
            self.end_read(fails=False)
        source = adapter(name, SIZES[name])
        assert self.memory.acquire("x", [source], may_take_room=True) in (Hold.READY, Hold.READING)
        self.memory.release("x")

    @invariant()
    def books_balance(self) -> None:
        self.memory.check_integrity(self.held)
        assert sum(ACTUAL[name] for name in self.files.resident) == self.memory.resident_bytes <= 21
        assert len(self.files.reading) <= 3


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
