"""Drive the scheduler and the block manager with random traffic, and check their state after every step.

Instead of a model, each slot of each block records what was last written to it. A step writes what its plan says, and
then reads what attention would read. Each position of each chunk's sequence, up to the chunk's end, must hold that
sequence's token, computed from that sequence's prefix, soft prompt, adapter and tenant. The first read detects a
block that is shared wrongly, evicted in use, copied too early or never filled. Some texts and soft prompts are NaN
from some position on. After the step that computes them, no findable block may contain NaN, and only the affected
sequences may have ended.

Adapters are read into a memory of a few bytes. Some reads fail, and some adapters are larger than estimated. Whatever
a step computes with must be in memory.

Large soft prompts of keys and values are loaded beside the steps, a few positions with each. A load that no sequence
waits for stops, though it may write one piece more, and some loads fail.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from zlib import crc32

from scripts.soak_model import NOT_FINITE, Limits, SoakFiles, Tally, contents_of, expect, is_finite, virtual_contents
from server.engine.scheduling.adapter_memory import AdapterMemory
from server.engine.scheduling.adapter_turns import adapters_of
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.types import (
    AdapterSource,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Member,
    SamplingParams,
    SoftPromptSource,
)

NUM_PROMPTS = 7
NUM_ADAPTERS = 6


@dataclass(slots=True)
class Load:
    """A load in progress or in the queue.

    Attributes:
        run: The blocks.
        num_copied: Positions that are written.
        is_last: Whether no sequence waited for it after its last piece, so that the next one is the last.
    """

    run: SoftPromptRun
    num_copied: int = 0
    is_last: bool = False


@dataclass(slots=True)
class Drive:
    """One scheduler under random traffic; each method is one event.

    Every method checks the integrity of the scheduler, and raises AssertionError if it does not hold.

    Args:
        limits: The limits.
        plans_ahead: Whether the decodes of a step are planned while the step before is computed.
    """

    limits: Limits = field(default_factory=Limits)
    plans_ahead: bool = False
    tally: Tally = field(default_factory=Tally)
    scheduler: Scheduler = field(init=False)
    now: float = 0.0
    live: dict[str, Sequence] = field(default_factory=dict)
    versions: list[int] = field(default_factory=lambda: [0] * NUM_PROMPTS)
    adapter_versions: list[int] = field(default_factory=lambda: [0] * NUM_ADAPTERS)
    files: SoakFiles = field(default_factory=SoakFiles)
    adapters: AdapterMemory = field(init=False)
    slots: dict[tuple[int, int], object] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = self.limits
        self.adapters = AdapterMemory(
            self.files,
            budget_bytes=limits.adapter_bytes,
            bytes_per_parameter=1,
            held_bytes=limits.held_adapter_bytes,
            max_reads=2,
        )
        self.scheduler = Scheduler(
            BlockManager(limits.num_blocks, limits.block_size),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            step_fill_tokens=limits.step_fill_tokens,
            adapter_memory=self.adapters,
        )

    def add(
        self,
        length: int,
        max_tokens: int,
        prompt: int,
        variant: int,
        tenant: int,
        priority: int,
        timeout: float | None,
        num_members: int = 1,
        adapter: int = 0,
    ) -> None:
        """Add a request.

        Args:
            length: Tokens in the text. All texts share their first five tokens.
            max_tokens: Maximum number of new tokens.
            prompt: Soft prompt: 0 for none, even for keys and values, odd for embeddings.
            variant: Selects the tokens after the first five.
            tenant: Selects the salt.
            priority: Lower is more urgent.
            timeout: Maximum seconds in the queue.
            num_members: Number of ensemble members; each takes the next soft prompt and adapter.
            adapter: Adapter: 0 for none.
        """
        self.tally.added += 1
        first, *others = (
            Member(
                soft_prompt=self._source((prompt + index) % NUM_PROMPTS),
                adapter=self._adapter((adapter + index) % NUM_ADAPTERS if adapter else 0),
            )
            for index in range(num_members)
        )
        request = GenerateRequest(
            request_id=f"s{self.tally.added}",
            prompt_token_ids=[(index + (variant if index > 4 else 0)) % 3 for index in range(length)],
            params=SamplingParams(max_tokens=max_tokens),
            soft_prompt=first.soft_prompt,
            adapter=first.adapter,
            others=tuple(others),
            salt=f"t{tenant}",
            priority=priority,
            timeout=timeout,
        )
        seq = Sequence(request, arrival=self.now)
        longest = {member: member.num_positions + max_tokens for member in seq.members}
        needed = sum(
            self.scheduler.block_manager.blocks_to_finish(member.request.soft_prompt, length - 1)
            for member, length in longest.items()
        )
        fits = (
            max(longest.values()) <= self.limits.max_model_len
            and needed <= self.limits.num_blocks
            and num_members <= self.limits.max_num_seqs
            and self._fit([one.adapter for one in (first, *others) if one.adapter is not None])
        )
        try:
            self.scheduler.add(seq)
        except ValueError:
            expect(not fits, f"{seq.request_id} was refused, but it fits")
            self.tally.refused += 1
            return
        expect(fits, f"{seq.request_id} was accepted, but it can never fit")
        self.live[seq.request_id] = seq

    def _adapter(self, number: int) -> AdapterSource | None:
        if not number:
            return None
        digest = f"a{number}.{self.adapter_versions[number]}"
        return AdapterSource(digest=digest, path="/nowhere", config_path="/nowhere", num_parameters=number + 1)

    def _fit(self, sources: list[AdapterSource]) -> bool:
        try:
            self.adapters.check(sources)
        except ValueError:
            return False
        return True

    def _source(self, prompt: int) -> SoftPromptSource | None:
        if not prompt:
            return None
        digest = f"d{prompt}.{self.versions[prompt]}"
        return SoftPromptSource(
            digest=digest, num_virtual_tokens=prompt + 1, is_key_values=prompt % 2 == 0, path="/nowhere"
        )

    def abort(self, choice: int) -> None:
        """Abort a request."""
        if self.live:
            request_id = list(self.live)[choice % len(self.live)]
            seq = self.scheduler.abort(request_id)
            expect(seq is self.live.pop(request_id), f"the scheduler did not know {request_id}")
            self.tally.aborted += 1
        self.scheduler.check_integrity()

    def swap(self, prompt: int) -> None:
        """Publish a new version of a soft prompt and of an adapter; existing sequences keep their versions."""
        self.versions[prompt % NUM_PROMPTS] += 1
        self.adapter_versions[prompt % NUM_ADAPTERS] += 1

    def pin(self, number: int) -> None:
        """Pin an adapter, or end its pin."""
        source = self._adapter(1 + number % (NUM_ADAPTERS - 1))
        if source is not None and self.adapters.is_pinned(source):
            self.adapters.unpin(source)
        elif source is not None and self._fit([source]):
            self.adapters.pin(source)
        self.scheduler.check_integrity()

    def evict(self) -> None:
        """Evict all unreferenced blocks: a large sequence takes them and releases them at once."""
        blocks = self.scheduler.block_manager
        if blocks.num_available:
            text = [7] * (blocks.num_available * blocks.block_size)
            request = GenerateRequest(
                request_id="big", prompt_token_ids=text, params=SamplingParams(max_tokens=1), salt="evict"
            )
            big = Sequence(request)
            expect(blocks.admit(big, None) is not None, "available blocks could not be allocated")
            blocks.free(big)
        self.scheduler.check_integrity()

    def step(self, seconds: float = 1.0) -> None:
        """Advance the clock by ``seconds``, then plan and run one step."""
        self.tally.steps += 1
        self.now += seconds
        self._advance_loads()
        self._advance_reads()
        self._expire()
        first = self.scheduler.running[0] if self.scheduler.running else None
        waiting = {seq.request_id for seq in self.scheduler.waiting}
        ready = [
            (seq, seq.block_table)
            for seq in self.scheduler.running
            if all(member.num_computed == member.num_positions - 1 for member in seq.members)
        ]
        plan = self.scheduler.schedule(self.now)
        self.loads += [Load(run) for run in plan.loads]
        self.tally.beside += bool(self.loads and plan.chunks)
        self._check_plan(plan, first)
        # A preempted sequence has lost its table, and may have a new one.
        self._check_decodes_first(plan, [seq for seq, table in ready if seq.block_table is table])
        self._check_ensembles(plan)
        self._write(plan)
        for chunk in plan.chunks:
            if chunk.seq is not None:
                self._read(chunk.seq, chunk.stop)
        if self.plans_ahead:
            self.scheduler.plan_ahead()
        self._end_spoiled(plan)
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.samples and chunk.seq.block_table and not chunk.seq.is_follower:
                self._sample(chunk.seq)
        self._check_findable()
        began = [seq for seq in self.scheduler.running if seq.request_id in waiting]
        self.tally.promoted += sum(seq.urgency != seq.request.priority for seq in began)
        self.scheduler.check_integrity()

    def finish(self, max_steps: int = 5000) -> None:
        """Run all sequences and loads to their end, and check that every block was released."""
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self.loads and not self.files.reading:
                break
            self.step()
        expect(not self.scheduler.has_work and not self.live, f"{len(self.live)} sequences never ended")
        expect(self.scheduler.block_manager.num_available == self.limits.num_blocks, "some blocks were not released")

    def _advance_loads(self) -> None:
        """Write a piece of the first load, and end it if it is complete, abandoned or failed."""
        for load in self.loads[:1]:
            run, first = load.run, load.num_copied
            virtual = virtual_contents(run.source, run.adapter)
            load.num_copied = min(first + 2, len(virtual))
            for position in range(first, load.num_copied):
                block = run.blocks[position // self.limits.block_size]
                self.slots[block, position % self.limits.block_size] = virtual[position]
            is_complete = load.num_copied == len(virtual)
            has_failed = is_complete and crc32(run.key.encode()) % 5 == 0
            if is_complete or load.is_last:
                self.loads.remove(load)
                self._end_load(load, has_failed=has_failed)
            load.is_last = run.ref_count == 0

    def _advance_reads(self) -> None:
        """End the first read, and the sequences that wait for an adapter that is not readable or never fits."""
        if self.files.reading:
            source, nbytes = self.files.end_first()
            refused = self.adapters.end_read(source.identity, nbytes)
            self.tally.outgrown += nbytes is not None and source.identity not in self.files.resident
            for seq in self.scheduler.adapters.users(source.identity):
                if nbytes is None or refused is not None or not self._fit(adapters_of(seq)):
                    self.scheduler.finish(seq, ErrorCode.FAILED)
                    del self.live[seq.request_id]
                    self.tally.unreadable += 1
        self.adapters.read_pins()
        self.scheduler.check_integrity()

    def _end_load(self, load: Load, *, has_failed: bool) -> None:
        is_filled = not has_failed and load.num_copied == load.run.source.num_virtual_tokens
        waiting = self.scheduler.holders(load.run) if has_failed else []
        self.scheduler.block_manager.end_load(load.run, is_filled=is_filled)
        for seq in waiting:
            self.scheduler.finish(seq, ErrorCode.FAILED)
            del self.live[seq.request_id]
        self.tally.loaded += is_filled
        self.tally.unloadable += has_failed
        self.tally.abandoned += not is_filled and not has_failed
        self.scheduler.check_integrity()

    def _expire(self) -> None:
        for seq in self.scheduler.expire(self.now):
            expect(seq.first_run is None and seq.deadline is not None, f"{seq.request_id} must not expire")
            expect(seq.end_reason is ErrorCode.WAIT_TIMEOUT, f"{seq.request_id} expired with another reason")
            del self.live[seq.request_id]
            self.tally.expired += 1
        for seq in self.scheduler.waiting:
            late = seq.first_run is None and seq.deadline is not None and seq.deadline <= self.now
            expect(not late, f"{seq.request_id} waits after its deadline")

    def _check_plan(self, plan: StepPlan, first: Sequence | None) -> None:
        limits = self.limits
        expect(plan.num_tokens <= limits.max_num_batched_tokens, f"the step computes {plan.num_tokens} tokens")
        expect(self.scheduler.num_running <= limits.max_num_seqs, "too many sequences run")
        may_wait = bool(self.loads or self.files.reading) or not self.scheduler.has_work
        used = {adapter.identity for chunk in plan.chunks if (adapter := chunk.adapter) is not None}
        expect(used <= self.files.resident.keys(), "the step computes with an adapter that is not in memory")
        expect(sum(self.files.resident.values()) <= limits.adapter_bytes, "adapters take more than their memory")
        expect(len(self.files.reading) <= 3, "more adapters are read ahead than allowed")
        expect(not plan.is_empty or may_wait, "the plan is empty, but sequences wait")
        expect(first is None or bool(first.block_table), "the sequence that is first in order was preempted")
        seqs = [chunk.seq.request_id for chunk in plan.chunks if chunk.seq is not None]
        expect(len(seqs) == len(set(seqs)), "a sequence is in the step twice")
        expect(all(chunk.num_tokens > 0 for chunk in plan.chunks), "a chunk is empty")
        expect(
            all(seq.block_table for chunk in plan.chunks if (seq := chunk.seq) is not None),
            "a preempted sequence is in the step",
        )
        self.tally.repeated += sum(chunk.num_virtual_tokens > 0 for chunk in plan.chunks if chunk.seq is not None)

    def _check_decodes_first(self, plan: StepPlan, ready: list[Sequence]) -> None:
        expected = [member for seq in ready for member in seq.members]
        if self.loads and ready and self._lacks_blocks(ready[-1]):
            expected = [member for seq in ready[:-1] for member in seq.members]
        leading = [chunk.seq for chunk in plan.chunks[: len(expected)] if chunk.num_tokens == 1]
        expect(leading == expected, "a sequence that could decode had to wait")

    def _lacks_blocks(self, seq: Sequence) -> bool:
        """Whether a sequence waits for blocks that are loading: every other block is in use before its turn."""
        blocks = self.scheduler.block_manager
        needed = [blocks.blocks_for(member.num_positions) - len(member.block_table) for member in seq.members]
        return seq is self.scheduler.running[-1] and sum(needed) > blocks.num_available

    def _check_ensembles(self, plan: StepPlan) -> None:
        """Check that the members of an ensemble sample in the same step, in adjacent rows."""
        sampling = [chunk.seq for chunk in plan.chunks if chunk.seq is not None and chunk.samples]
        leaders = [seq for seq in sampling if not seq.is_follower]
        expect(
            sampling == [member for seq in leaders for member in seq.members],
            "members of an ensemble do not sample together",
        )

    def _end_spoiled(self, plan: StepPlan) -> None:
        size = self.limits.block_size
        spoiled: dict[int, int] = {}
        for number, chunk in enumerate(plan.chunks):
            for index in chunk.shared:
                held = [
                    self.slots[chunk.block_table[index], at] for at in range(min(size, chunk.stop - index * size))
                ]
                if NOT_FINITE in held:
                    spoiled.setdefault(number, index)
        if not spoiled:
            return
        for seq in [ended for group in self.scheduler.spoil(plan, spoiled) for ended in group]:
            expect(not is_finite(seq), f"{seq.request_id} ended, but all its positions are finite")
            self._end_not_finite(seq)
            self.tally.spoiled += 1

    def _check_findable(self) -> None:
        blocks, size = self.scheduler.block_manager, self.limits.block_size
        for block in blocks.findable:
            held = [self.slots.get((block, offset)) for offset in range(size)]
            expect(NOT_FINITE not in held, f"the findable block {block} is not finite")
        for run in blocks.runs.values():
            is_valid = not run.is_filled or NOT_FINITE not in virtual_contents(run.source, run.adapter)
            expect(is_valid, f"the cached soft prompt {run.key} is not finite")

    def _end_not_finite(self, seq: Sequence) -> None:
        self.scheduler.finish(seq, ErrorCode.NOT_FINITE)
        del self.live[seq.request_id]

    def _sample(self, seq: Sequence) -> None:
        if not is_finite(seq):
            self._end_not_finite(seq)
            self.tally.not_finite += 1
            return
        seq.token_ids.append(len(seq.token_ids) % 3)
        # Some sequences end before their maximum length.
        stops = crc32(f"{seq.request_id} {seq.num_new_tokens}".encode()) % 16 == 0
        if stops or seq.num_new_tokens == seq.request.params.max_tokens:
            self.scheduler.finish(seq, FinishReason.STOP if stops else FinishReason.LENGTH)
            del self.live[seq.request_id]
            self.tally.finished += 1
            self.tally.ensembles += bool(seq.followers)
            self.tally.adapted += bool(adapters_of(seq))

    # A model of the device's memory

    def _write(self, plan: StepPlan) -> None:
        size = self.limits.block_size
        for run in plan.key_value_fills:
            for position in range(run.source.num_virtual_tokens):
                self.slots[run.blocks[position // size], position % size] = virtual_contents(run.source, None)[
                    position
                ]
        for source, destination in plan.block_copies:
            for offset in range(size):
                self.slots[destination, offset] = self.slots.get((source, offset))
        for chunk in plan.chunks:
            contents = self._contents(chunk)
            for position in range(chunk.start, chunk.stop):
                self.slots[chunk.block_table[position // size], position % size] = contents[position]

    def _contents(self, chunk: Chunk) -> list[object]:
        if chunk.run is not None:
            return virtual_contents(chunk.run.source, chunk.run.adapter)
        if chunk.seq is None:
            raise AssertionError("a chunk has neither a sequence nor a soft prompt")
        return contents_of(chunk.seq)

    def _read(self, seq: Sequence, stop: int) -> None:
        size = self.limits.block_size
        contents = contents_of(seq)
        for position in range(stop):
            found = self.slots.get((seq.block_table[position // size], position % size))
            expect(
                found == contents[position],
                f"{seq.request_id} reads {found} at position {position}, expected {contents[position]}",
            )


def soak(num_steps: int, seed: int, limits: Limits | None = None, *, plans_ahead: bool = False) -> Drive:
    """Run random traffic for ``num_steps`` steps, then run all sequences to their end.

    See ``Drive`` for the other arguments.

    Raises:
        AssertionError: After the first event that breaks an invariant.
    """
    rng = random.Random(seed)
    drive = Drive(limits or Limits(), plans_ahead)
    while drive.tally.steps < num_steps:
        # Phases of overload alternate with phases in which the queue empties.
        is_burst = drive.tally.steps // 100 % 3 != 0
        kind = rng.random()
        if kind < 0.02:
            drive.abort(rng.randrange(1000))
        elif kind < 0.04:
            drive.swap(rng.randrange(NUM_PROMPTS))
        elif kind < 0.05:
            drive.evict()
        elif kind < 0.055:
            drive.pin(rng.randrange(NUM_ADAPTERS))
        elif kind < (0.5 if is_burst else 0.12) and len(drive.live) < 60:
            drive.add(
                rng.randint(1, 24),
                rng.randint(1, 10),
                rng.randrange(NUM_PROMPTS),
                variant=rng.randrange(2),
                tenant=min(rng.randrange(3), rng.randrange(3)),
                priority=rng.choice((-100, -1, 0, 0, 0, 0, 5)),
                timeout=rng.choice((None, None, 5.0, 60.0)),
                num_members=rng.choice((1, 1, 1, 2, 3)),
                adapter=max(0, rng.randrange(-NUM_ADAPTERS, NUM_ADAPTERS)),
            )
        else:
            drive.step(rng.random())
    drive.finish()
    return drive


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="scheduler steps under traffic")
    parser.add_argument("--seed", type=int, default=0, help="seed of the traffic")
    parser.add_argument("--plan-ahead", action="store_true", help="plan decodes while the step before is computed")
    arguments = parser.parse_args()
    started = time.perf_counter()
    drive = soak(arguments.steps, arguments.seed, plans_ahead=arguments.plan_ahead)
    counts = ", ".join(f"{getattr(drive.tally, name)} {name}" for name in Tally.__slots__)
    seconds = time.perf_counter() - started
    print(f"{counts}, {drive.scheduler.num_preemptions} preemptions in {seconds:.1f} s: all invariants held")


if __name__ == "__main__":
    main()
