"""Pictures of the running batch."""

from __future__ import annotations

from server.engine.constraints import Constraint, ConstraintKind
from server.engine.messages import (
    MAX_HOST_DIGESTS,
    MAX_MAPPED_BLOCKS,
    BatchPicture,
    BlockState,
    Phase,
    encoder,
    from_engine_decoder,
)
from server.engine.scheduling.batch_picture import MAX_ROWS, take_picture
from server.engine.scheduling.pending import PendingSequences
from server.engine.scheduling.scheduler import Scheduler
from server.engine.types import SamplingParams
from tests.engine.scheduling.test_scheduler import finish_step, make, seq, source
from tests.support.engine.sequences import make_sequence


def picture(scheduler: Scheduler, pending: PendingSequences | None = None, now: float = 7.0) -> BatchPicture:
    found = take_picture(scheduler, pending or PendingSequences(), step=3, now=now)
    assert from_engine_decoder.decode(encoder.encode(found)) == found
    return found


def test_an_idle_engine_shows_its_free_blocks() -> None:
    found = picture(make(num_blocks=5))
    assert (found.step, found.sequences, found.runs) == (3, [], [])
    assert (found.num_blocks, found.num_used_blocks, found.num_idle_blocks) == (5, 0, 0)
    assert found.block_map == bytes(5)


def test_rows_tell_phase_lengths_and_blocks() -> None:
    scheduler = make(num_blocks=64, block_size=4, budget=40)
    task = source(9, "task", is_key_values=True)
    for name, length in (("a", 8), ("b", 8), ("long", 60)):
        scheduler.add(seq(name, length, max_tokens=4, soft_prompt=None if name == "long" else task))
    finish_step(scheduler, scheduler.schedule(0.0))
    found = picture(scheduler)
    rows = {row.request_id: row for row in found.sequences}
    a, b, long = rows["a"], rows["b"], rows["long"]
    assert {name: row.phase for name, row in rows.items()} == {
        "a": Phase.DECODE,
        "b": Phase.DECODE,
        "long": Phase.PREFILL,
    }
    assert (a.num_virtual_tokens, a.num_text_tokens, a.num_new_tokens, a.age_seconds) == (9, 8, 1, 7.0)
    (run,) = found.runs
    assert (a.run, b.run, long.run) == (run.key, run.key, None)
    assert (run.digest, run.num_blocks, run.num_users, run.state) == ("task", 3, 2, "used")
    tables = {running.request_id: running.block_table for running in scheduler.running}
    for row in (a, b):
        num_blocks = len(tables[row.request_id])
        assert row.num_prompt_blocks == 2, "the partial block is copied for each sequence"
        assert row.num_prompt_blocks + row.num_shared_blocks + row.num_own_blocks == num_blocks
    states = list(found.block_map)
    assert states.count(BlockState.PROMPT_USED) == 3, "the soft prompt's blocks exist once"
    assert states.count(BlockState.FREE) == found.num_blocks - found.num_used_blocks - found.num_idle_blocks


def test_shared_and_idle_text_is_told_apart() -> None:
    scheduler = make(num_blocks=32, block_size=4, budget=64)
    for name in ("first", "second"):
        scheduler.add(seq(name, 13, max_tokens=2 if name == "first" else 9))
        finish_step(scheduler, scheduler.schedule(0.0))
    shared = picture(scheduler).sequences
    assert {row.num_shared_blocks for row in shared} <= {0, 3}
    while scheduler.running:
        finish_step(scheduler, scheduler.schedule(0.0))
    found = picture(scheduler)
    assert found.sequences == []
    assert list(found.block_map).count(BlockState.IDLE) == found.num_idle_blocks > 0
    assert BlockState.USED not in found.block_map


def test_two_sequences_of_one_text_share_its_blocks() -> None:
    scheduler = make(num_blocks=32, block_size=4, budget=64)
    scheduler.add(seq("first", 13, max_tokens=9))
    finish_step(scheduler, scheduler.schedule(0.0))
    scheduler.add(seq("second", 13, max_tokens=9))
    finish_step(scheduler, scheduler.schedule(0.0))
    found = picture(scheduler)
    assert [row.num_shared_blocks for row in found.sequences] == [3, 3]
    assert list(found.block_map).count(BlockState.SHARED) == 3


def test_waiting_rows_have_a_reason() -> None:
    scheduler = make(num_blocks=12, block_size=4, seqs=2, budget=16)
    for name in ("a", "b", "c"):
        scheduler.add(seq(name, 4, max_tokens=12))
    finish_step(scheduler, scheduler.schedule(0.0))
    reasons = {row.request_id: row.reason for row in picture(scheduler).sequences}
    assert reasons == {"a": None, "b": None, "c": "place"}
    scheduler.preempt(scheduler.running[-1])
    scheduler.check_integrity()
    reasons = {row.request_id: row.reason for row in picture(scheduler).sequences}
    assert reasons == {"a": None, "b": "preempted", "c": "blocks"}
    pending = PendingSequences()
    task = source(4, "cold", is_key_values=False)
    pending.add(seq("cold", 3, soft_prompt=task), [task.identity])
    grammar = Constraint(kind=ConstraintKind.REGEX, text="a+")
    pending.add(make_sequence("grammar", [1], SamplingParams(constraint=grammar)), [grammar])
    rows = {row.request_id: row for row in picture(scheduler, pending).sequences}
    assert (rows["cold"].reason, rows["grammar"].reason) == ("soft_prompt", "grammar")
    assert {rows["cold"].phase, rows["c"].phase} == {Phase.WAITING}


def test_members_of_an_ensemble_are_rows_of_one_request() -> None:
    scheduler = make(num_blocks=64)
    one, two = (source(4, digest, is_key_values=True) for digest in ("one", "two"))
    scheduler.add(make_sequence("both", [1, 2], SamplingParams(max_tokens=4), one, others=[two]))
    finish_step(scheduler, scheduler.schedule(0.0))
    found = picture(scheduler)
    assert [(row.request_id, row.run) for row in found.sequences] == [("both", run.key) for run in found.runs]


def test_large_caches_and_queues_are_bounded() -> None:
    scheduler = make(num_blocks=3 * MAX_MAPPED_BLOCKS + 1, seqs=4)
    for number in range(MAX_ROWS + 10):
        scheduler.add(seq(f"s{number}", 2))
    finish_step(scheduler, scheduler.schedule(0.0))
    found = picture(scheduler)
    assert len(found.sequences) == MAX_ROWS
    assert len(found.block_map) <= MAX_MAPPED_BLOCKS


def test_what_is_in_host_memory_is_bounded() -> None:
    host = (f"{index:064x}" for index in range(MAX_HOST_DIGESTS + 5))
    found = take_picture(make(num_blocks=5), PendingSequences(), step=3, now=7.0, host=host)
    assert found.host == [f"{index:064x}" for index in range(MAX_HOST_DIGESTS)]
    assert found.adapters == []
