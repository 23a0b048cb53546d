"""The scheduler's hooks of the connector, with requests as vLLM shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.types import SoftPromptSource
from server.engine.vllm.residency import Reported, State
from server.engine.vllm.scheduler_side import Commands, Load, Save, SchedulerSide
from server.engine.vllm.use import Role, Use


@dataclass
class Request:
    request_id: str
    kv_transfer_params: dict[str, Any] | None = None


@dataclass
class Steps:
    """A scheduler side with one worker, and blocks of 4 and 8 positions in two groups."""

    side: SchedulerSide = field(
        default_factory=lambda: SchedulerSide(num_workers=1, budget_bytes=100, block_sizes=(4, 8))
    )
    blocks: dict[str, tuple[list[int], ...]] = field(default_factory=dict)

    def step(self, new: dict[str, tuple[int, int]] | None = None, cached: Any = None) -> Commands:
        """A step; requests have (computed before, computed now) tokens."""
        new, cached = new or {}, cached or {}
        output = SimpleNamespace(
            num_scheduled_tokens={key: now for key, (_, now) in (new | cached).items()},
            scheduled_new_reqs=[
                SimpleNamespace(req_id=key, num_computed_tokens=before) for key, (before, _) in new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(cached), num_computed_tokens=[before for before, _ in cached.values()]
            ),
        )
        return self.side.take_commands(output, self.blocks.__getitem__)

    def load_all(self, commands: Commands) -> None:
        self.side.report(Reported(loaded={read.ticket: (1, 10, 0.0) for read in commands.reads}))


@pytest.fixture
def steps() -> Steps:
    return Steps()


def source(name: str, *, is_key_values: bool = True, count: int = 6) -> SoftPromptSource:
    return SoftPromptSource(digest=name, num_virtual_tokens=count, is_key_values=is_key_values, path=f"/{name}")


def request(
    request_id: str, role: Role | None = None, of: SoftPromptSource | None = None, adapter: str | None = None
) -> Request:
    use = Use(request_id=f"own-{request_id}", role=role, source=of, adapter=adapter)
    return Request(request_id, use.to_params())


def test_requests_without_a_soft_prompt_load_nothing(steps: Steps) -> None:
    for plain in (Request("foreign"), request("plain"), Request("malformed", {"role": 3})):
        steps.side.new_request(plain)
        assert steps.side.num_external_tokens(plain, 0) == (0, False)
        steps.side.allocated(plain, ([1], [2]), 0)
        steps.side.finished(plain.request_id)
    assert steps.side.take_stats().started == ["own-plain"]
    assert steps.step() == Commands()


def test_a_request_waits_for_its_file_and_is_then_loaded_before_its_step(steps: Steps) -> None:
    first = request("r", Role.LOAD, source("a"))
    steps.side.new_request(first)
    assert steps.side.num_external_tokens(first, 0) == (None, False)
    commands = steps.step()
    assert [read.source.digest for read in commands.reads] == ["a"]
    steps.load_all(commands)
    assert steps.side.num_external_tokens(first, 0) == (6, False)
    steps.side.allocated(first, ([3, 4, 5], [7, 8]), 6)
    ticket = steps.side.residency.ticket("a")
    loads = steps.step({"r": (6, 2)}).loads
    assert loads == [Load(ticket, 0, 6, ((3, 4), (7,)))]
    assert steps.step(cached={"r": (8, 1)}) == Commands()
    stats = steps.side.take_stats()
    assert (stats.num_loads, stats.num_hits, stats.started) == (1, 0, ["own-r"])


@pytest.mark.parametrize(("num_computed", "external"), [(4, 2), (6, 0), (8, 0)])
def test_only_what_the_prefix_cache_lacks_is_loaded(steps: Steps, num_computed: int, external: int) -> None:
    of = request("r", Role.LOAD, source("a"))
    steps.side.new_request(of)
    steps.load_all(steps.step())
    assert steps.side.num_external_tokens(of, num_computed) == (external, False)
    steps.side.allocated(of, ([3, 4], [7]), external)
    loads = steps.step({"r": (6, 1)}).loads
    assert [(load.first, load.stop) for load in loads] == ([(4, 6)] if external else [])
    assert steps.side.take_stats().num_hits == (0 if external else 1)


def test_a_request_whose_file_fails_is_failed_alone(steps: Steps) -> None:
    bad, good = request("bad", Role.LOAD, source("a")), request("good", Role.LOAD, source("b"))
    for one in (bad, good):
        steps.side.new_request(one)
    reads = {read.source.digest: read.ticket for read in steps.step().reads}
    steps.side.report(Reported(loaded={reads["b"]: (1, 10, 0.0)}, failed={reads["a"]: "unreadable"}))
    assert steps.side.num_external_tokens(bad, 0) == (6, True)
    steps.side.allocated(bad, ([1, 2], [3]), 6)
    assert steps.side.num_external_tokens(good, 0) == (6, False)
    steps.side.allocated(good, ([4, 5], [6]), 6)
    commands = steps.step({"good": (6, 1)})
    assert commands.failed == ["bad"]
    assert [load.block_ids[0] for load in commands.loads] == [(4, 5)]
    assert commands.drops == [reads["a"]]
    steps.side.finished("bad")
    assert steps.side.residency.state("a") is State.ABSENT


def test_embeddings_that_are_missing_fail_their_request(steps: Steps) -> None:
    missing = request("r", Role.LOAD, source("a", is_key_values=False))
    steps.side.new_request(missing)
    assert steps.side.num_external_tokens(missing, 0) == (6, True)
    steps.side.allocated(missing, ([1, 2], [3]), 6)
    assert steps.step().failed == ["r"]
    steps.side.finished("r")


def test_embeddings_are_saved_in_the_step_that_computes_their_last_row(steps: Steps) -> None:
    of = source("a", is_key_values=False)
    computing = request("c", Role.COMPUTE, of)
    steps.side.new_request(computing)
    assert steps.side.num_external_tokens(computing, 0) == (0, False)
    steps.blocks["c"] = ([0, 9, 1], [5])
    assert steps.step({"c": (0, 4)}).saves == []
    (save,) = steps.step(cached={"c": (4, 2)}).saves
    assert save == Save(steps.side.residency.ticket("a"), ((0, 9), (5,)))
    assert steps.step(cached={"c": (6, 1)}).saves == []
    steps.side.finished("c")
    steps.side.report(Reported(loaded={save.ticket: (1, 10, 0.0)}))
    user = request("r", Role.LOAD, of)
    steps.side.new_request(user)
    assert steps.side.num_external_tokens(user, 0) == (6, False)


def test_a_computation_that_ends_early_leaves_nothing(steps: Steps) -> None:
    of = source("a", is_key_values=False)
    steps.side.new_request(request("c", Role.COMPUTE, of))
    steps.blocks["c"] = ([1], [2])
    steps.step({"c": (0, 4)})
    steps.side.finished("c")
    assert steps.side.residency.state("a") is State.ABSENT


def test_pins_outlive_their_requests(steps: Steps) -> None:
    steps.side.residency = type(steps.side.residency)(1, 0)
    steps.side.new_request(request("p", Role.PIN, source("a")))
    steps.load_all(steps.step({"p": (0, 1)}))
    steps.side.finished("p")
    assert steps.side.residency.state("a") is State.RESIDENT
    steps.side.new_request(request("u", Role.UNPIN, source("a")))
    assert steps.side.residency.state("a") is State.ABSENT


def test_a_request_that_is_preempted_is_loaded_again(steps: Steps) -> None:
    of = request("r", Role.LOAD, source("a"))
    steps.side.new_request(of)
    steps.load_all(steps.step())
    for blocks in (([3, 4], [7]), ([8, 9], [2])):
        assert steps.side.num_external_tokens(of, 0) == (6, False)
        steps.side.allocated(of, blocks, 6)
        assert [load.block_ids for load in steps.step({"r": (6, 1)}).loads] == [tuple(map(tuple, blocks))]
    assert steps.side.take_stats().started == ["own-r"]


def test_steps_are_counted_with_their_soft_prompts_and_adapters(steps: Steps) -> None:
    for name, adapter in (("a", None), ("a", "x"), ("b", "x")):
        of = request(f"r{len(steps.blocks)}", Role.LOAD, source(name), adapter)
        steps.blocks[of.request_id] = ([1], [1])
        steps.side.new_request(of)
    steps.step({"r0": (6, 5), "r1": (6, 1), "r2": (6, 1), "foreign": (0, 3)})
    (step,) = steps.side.take_stats().steps
    assert (step.num_sequences, step.num_tokens, step.num_distinct, step.num_adapters) == (4, 10, 2, 1)
    assert steps.side.take_stats().steps == []
