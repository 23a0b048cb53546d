"""Ownership of key/value blocks. Pure logic: no torch, no clock, no randomness.

Every block is in exactly one of these states:

- *free*: holds nothing of use;
- *used*: one or more sequences refer to it (``ref_count`` > 0);
- *idle*: no sequence refers to it, but it holds a cached prefix;
- part of a *soft prompt's run*, which is used or idle as a whole.

A run whose keys and values are copied beside the steps is *loading*: it is neither read nor evicted, and its blocks
stay allocated until the copy has ended, even if no sequence waits for it any more, because the copy writes to them.

If no block is free, idle blocks are evicted in least-recently-used order: a text block alone, a soft prompt's run
as a whole.

A block is identified by a chain of hashes over everything before it: the tenant's salt, the identities of the soft
prompt (its content digest, and its task if it has several) and of the adapter, then the text's tokens block by block.
Names are not included, so a re-upload under an old name cannot find stale keys. The hash is cryptographic (BLAKE2b,
128 bits), because a tenant chooses the tokens and must not be able to construct a collision with another tenant's
block.

All tenants share a soft prompt's blocks. They are found by content, so a tenant that can detect that they are warm
has the bytes already, and a soft prompt that is warmed before its first request is warm for every tenant. The text
after it is never shared between tenants, including text in its partial last block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun, run_key
from server.engine.types import AdapterSource, SoftPromptSource

HASH_BYTES = 16


@dataclass(slots=True)
class Admission:
    """The result of ``BlockManager.admit``.

    Attributes:
        num_cached_tokens: Text tokens whose keys and values were found.
        copy: (source block, destination block) of the soft prompt's partial last block, if it has to be copied.
    """

    num_cached_tokens: int
    copy: tuple[int, int] | None = None


@dataclass(slots=True)
class BlockStats:
    """Counters since the start.

    Attributes:
        queries: Text tokens looked up.
        hits: Text tokens found.
        run_hits: Requested soft prompts that were in blocks, filled or being filled.
        run_loads: Requested soft prompts that were not, and got blocks.
        run_evictions: Soft prompts whose blocks were evicted.
    """

    queries: int = 0
    hits: int = 0
    run_hits: int = 0
    run_loads: int = 0
    run_evictions: int = 0


@dataclass(slots=True)
class _Block:
    ref_count: int = 0
    block_hash: bytes | None = None


@dataclass(slots=True)
class BlockManager:
    """Block tables, reference counts and prefix hashes.

    Args:
        num_blocks: Blocks of the key/value cache.
        block_size: Positions in a block.
        enable_prefix_caching: Whether full blocks of text are kept for later sequences.
    """

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool = True
    stats: BlockStats = field(default_factory=BlockStats, init=False)
    _blocks: list[_Block] = field(init=False, repr=False)
    _free: list[int] = field(init=False, repr=False)
    _by_hash: dict[bytes, int] = field(default_factory=dict, init=False, repr=False)
    _runs: dict[str, SoftPromptRun] = field(default_factory=dict, init=False, repr=False)
    _idle: OrderedDict[int | str, int] = field(default_factory=OrderedDict, init=False, repr=False)
    """Block ids and keys of runs, oldest first, with the number of blocks that an eviction frees."""
    _num_idle_blocks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_size < 1:
            raise ValueError("a block manager needs at least one block of at least one position")
        self._blocks = [_Block() for _ in range(self.num_blocks)]
        self._free = list(range(self.num_blocks - 1, -1, -1))

    # State

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free and idle ones."""
        return len(self._free) + self._num_idle_blocks

    @property
    def num_cached(self) -> int:
        """Blocks that hold an idle prefix."""
        return self._num_idle_blocks

    @property
    def runs(self) -> dict[str, SoftPromptRun]:
        """Soft prompts on the device, filled or being filled."""
        return self._runs

    @property
    def is_loading(self) -> bool:
        """Whether a soft prompt's blocks are loading: they become available when the copy ends."""
        return any(run.is_loading for run in self._runs.values())

    @property
    def findable(self) -> Collection[int]:
        """Text blocks that a new sequence may find."""
        return self._by_hash.values()

    def uses(self, stride: int) -> list[tuple[int, bool]]:
        """Of every ``stride``-th block, how many texts refer to it, and whether a new text may find it."""
        return [(block.ref_count, block.block_hash is not None) for block in self._blocks[::stride]]

    def num_shared(self, block_ids: Iterable[int]) -> int:
        """Number of blocks at the beginning of a text that other sequences refer to, too."""
        count = 0
        for block_id in block_ids:  # what another sequence shares is a prefix
            if self._blocks[block_id].ref_count < 2:
                break
            count += 1
        return count

    def blocks_for(self, num_positions: int) -> int:
        """Number of blocks for a number of positions."""
        return -(-num_positions // self.block_size)

    def blocks_to_finish(self, source: SoftPromptSource | None, num_positions: int) -> int:
        """Blocks that a sequence needs in total: its own, and its soft prompt's partial last block."""
        partial = source is not None and source.num_virtual_tokens % self.block_size != 0
        return self.blocks_for(num_positions) + int(partial)

    # Soft prompts

    def acquire_run(
        self, source: SoftPromptSource, adapter: AdapterSource | None = None, headroom: int = 0
    ) -> SoftPromptRun | None:
        """Refer to a soft prompt's run, and take blocks for it if it has none.

        Args:
            source: The soft prompt.
            adapter: The adapter of the sequence that needs it; None without one.
            headroom: Blocks that have to stay available for other sequences if it takes blocks.

        Returns:
            The run, which the caller has to fill if it is not filled; None if there are too few blocks.
        """
        key = run_key(source, adapter)
        run = self._runs.get(key)
        if run is None:
            needed = self.blocks_for(source.num_virtual_tokens)
            if needed + headroom > self.num_available:
                return None
            computed_with = None if source.is_key_values else adapter
            run = SoftPromptRun(source, [self._take() for _ in range(needed)], computed_with)
            self._runs[key] = run
            self.stats.run_loads += 1
        else:
            self.stats.run_hits += 1
            if run.ref_count == 0 and not run.is_loading:
                self._num_idle_blocks -= self._idle.pop(key)
        run.ref_count += 1
        return run

    def release_run(self, run: SoftPromptRun) -> None:
        """Release one reference; without references the run becomes idle, or is freed if it is not filled.

        A run that is loading does so when its copy has ended.
        """
        if run.ref_count < 1:
            raise AssertionError(f"soft prompt {run.key} released more often than acquired")
        run.ref_count -= 1
        if run.ref_count == 0 and not run.is_loading:
            self._retire(run)

    def end_load(self, run: SoftPromptRun, *, is_filled: bool) -> None:
        """End the loading of a run: nothing writes to its blocks any more.

        Args:
            run: A run that is loading.
            is_filled: Whether all keys and values were copied. If not, and sequences wait for it, it is filled again.
        """
        if not run.is_loading:
            raise AssertionError(f"soft prompt {run.key} was not loading")
        run.is_loading = False
        if is_filled:
            run.num_computed = run.source.num_virtual_tokens
        if run.ref_count == 0:
            self._retire(run)

    # Sequences

    def admit(
        self, seq: Sequence, run: SoftPromptRun | None, headroom: int = 0, filling: Collection[str] = ()
    ) -> Admission | None:
        """Give a waiting sequence blocks for all its tokens, starting from the longest cached prefix.

        Sets ``block_table``, ``block_hashes`` and ``num_computed``. The caller holds a reference to ``run``.

        The soft prompt's partial last block is copied before the forward pass. If the same pass computes it, there is
        nothing to copy: ``num_computed`` is then the first position of that block, so that the sequence computes its
        virtual tokens again, in its own block.

        Args:
            seq: A sequence without blocks.
            run: Its soft prompt's filled run; None without a soft prompt.
            headroom: Blocks that have to stay available for other sequences.
            filling: Keys of the runs that the forward pass of this step computes.

        Returns:
            The admission; None, with nothing changed, if there are too few blocks.
        """
        n = seq.num_virtual_tokens
        shared, partial = divmod(n, self.block_size)
        matched, hashes = self._match(seq, shared)
        num_cached = max(0, (shared + len(matched)) * self.block_size - n) if matched else 0
        num_new = self.blocks_for(seq.num_positions) - shared - len(matched)
        # An idle block that matches is no longer available.
        num_revived = sum(1 for block in matched if self._blocks[block].ref_count == 0)
        if num_new + num_revived + headroom > self.num_available:
            return None
        for block in matched:
            self._refer(block)
        fresh = [self._take_used() for _ in range(num_new)]
        start, copy = n + num_cached, None
        if run is not None and partial and not matched:
            if run.key in filling:
                start = shared * self.block_size
            else:
                copy = run.blocks[shared], fresh[0]
        seq.block_table = [*(run.blocks[:shared] if run is not None else ()), *matched, *fresh]
        seq.block_hashes = hashes
        seq.num_computed = start
        self.stats.queries += len(seq.token_ids)
        self.stats.hits += num_cached
        return Admission(num_cached, copy)

    def admit_all(
        self,
        members: Iterable[tuple[Sequence, SoftPromptRun | None]],
        headroom: int = 0,
        filling: Collection[str] = (),
    ) -> list[Admission] | None:
        """``admit`` several sequences, all or none.

        Returns:
            The admissions in order; None, with nothing changed, if there are too few blocks.
        """
        queries, hits = self.stats.queries, self.stats.hits
        admissions: list[Admission] = []
        admitted: list[Sequence] = []
        for seq, run in members:
            admission = self.admit(seq, run, headroom, filling)
            if admission is None:
                for other in admitted:
                    self.free(other)
                self.stats.queries, self.stats.hits = queries, hits
                return None
            admissions.append(admission)
            admitted.append(seq)
        return admissions

    def extend(self, seq: Sequence, num_positions: int, *, evicts: bool = True) -> bool:
        """Give a sequence the blocks that its first ``num_positions`` positions need.

        Args:
            seq: A sequence with blocks.
            num_positions: Positions that it must hold.
            evicts: Whether idle blocks are taken if no block is free.

        Returns:
            False, with nothing changed, if there are too few blocks.
        """
        num_new = self.blocks_for(num_positions) - len(seq.block_table)
        if num_new > (self.num_available if evicts else len(self._free)):
            return False
        for _ in range(num_new):
            seq.block_table.append(self._take_used())
        return True

    def register(self, seq: Sequence, num_positions: int) -> list[int]:
        """Make the sequence's full blocks findable, up to ``num_positions`` positions.

        May be called when those positions are scheduled. Each layer of a forward pass writes all keys and values
        before it reads any, so a sequence in the same step may use them. Blocks whose content is not finite have to
        be withdrawn before the next step is scheduled.

        Returns:
            Indices in the block table of the newly findable blocks.
        """
        registered: list[int] = []
        if not self.enable_prefix_caching:
            return registered
        shared = seq.num_virtual_tokens // self.block_size
        parent = seq.block_hashes[-1] if seq.block_hashes else self._seed(seq)
        for index in range(shared + len(seq.block_hashes), num_positions // self.block_size):
            parent = self._hash(seq, index, parent)
            seq.block_hashes.append(parent)
            if parent not in self._by_hash:
                block = seq.block_table[index]
                self._by_hash[parent] = block
                self._blocks[block].block_hash = parent
                registered.append(index)
        return registered

    def withdraw(self, block_ids: Iterable[int]) -> None:
        """Make blocks no longer findable: idle ones become free now, used ones with their last reference."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.block_hash is not None:
                del self._by_hash[block.block_hash]
                block.block_hash = None
                if block.ref_count == 0:  # its sequence has failed already
                    self._num_idle_blocks -= self._idle.pop(block_id)
                    self._free.append(block_id)

    def unregister(self, seq: Sequence, num_positions: int) -> None:
        """Undo ``register`` for the blocks that are not full with the first ``num_positions`` positions."""
        shared = seq.num_virtual_tokens // self.block_size
        num_kept = max(0, num_positions // self.block_size - shared)
        for index in range(num_kept, len(seq.block_hashes)):
            block_id, block_hash = seq.block_table[shared + index], seq.block_hashes[index]
            if self._by_hash.get(block_hash) == block_id:
                self.withdraw([block_id])
        del seq.block_hashes[num_kept:]

    def free(self, seq: Sequence) -> None:
        """Release all blocks of a sequence, except its soft prompt's (see ``release_run``)."""
        shared = seq.num_virtual_tokens // self.block_size
        # The end of a text is the least likely part to be used again, so it becomes idle first.
        for block_id in reversed(seq.block_table[shared:]):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.block_hash is None:
                    self._free.append(block_id)
                else:
                    self._make_idle(block_id, 1)
        seq.block_table = []
        seq.block_hashes = []
        seq.num_computed = 0

    # Private methods

    def _retire(self, run: SoftPromptRun) -> None:
        """Make a run without references idle, or free it if it is not filled."""
        if run.is_filled:
            self._make_idle(run.key, len(run.blocks))
        else:
            del self._runs[run.key]
            self._free.extend(run.blocks)

    def _seed(self, seq: Sequence) -> bytes:
        salt = seq.request.salt
        return blake2b(f"{len(salt)}:{salt}:{seq.flow}".encode(), digest_size=HASH_BYTES).digest()

    def _hash(self, seq: Sequence, index: int, parent: bytes) -> bytes:
        # A block that starts inside the soft prompt holds fewer text tokens; the seed identifies the virtual ones.
        start = max(0, index * self.block_size - seq.num_virtual_tokens)
        stop = (index + 1) * self.block_size - seq.num_virtual_tokens
        return blake2b(parent + array("q", seq.token_ids[start:stop]).tobytes(), digest_size=HASH_BYTES).digest()

    def _match(self, seq: Sequence, shared: int) -> tuple[list[int], list[bytes]]:
        matched: list[int] = []
        hashes: list[bytes] = []
        if self.enable_prefix_caching:
            seed = self._seed(seq)
            for index in range(shared, seq.num_skippable // self.block_size):
                seed = self._hash(seq, index, seed)
                block = self._by_hash.get(seed)
                if block is None:
                    break
                matched.append(block)
                hashes.append(seed)
        return matched, hashes

    def _refer(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.ref_count == 0:
            self._num_idle_blocks -= self._idle.pop(block_id)
        block.ref_count += 1

    def _make_idle(self, key: int | str, num_blocks: int) -> None:
        self._idle[key] = num_blocks
        self._num_idle_blocks += num_blocks

    def _take_used(self) -> int:
        block_id = self._take()
        self._blocks[block_id].ref_count = 1
        return block_id

    def _take(self) -> int:
        if not self._free:
            key, num_blocks = self._idle.popitem(last=False)
            self._num_idle_blocks -= num_blocks
            if isinstance(key, str):
                self._free.extend(reversed(self._runs.pop(key).blocks))
                self.stats.run_evictions += 1
            else:
                block = self._blocks[key]
                if block.block_hash is not None:
                    del self._by_hash[block.block_hash]
                    block.block_hash = None
                self._free.append(key)
        return self._free.pop()

    # Checks, for tests and debug mode

    def check_integrity(self, sequences: list[tuple[Sequence, SoftPromptRun | None]]) -> None:
        """Check all invariants, given all sequences that have blocks or a run.

        Raises:
            AssertionError: If a block is lost, owned twice, or counted wrongly.
        """
        ref_counts: dict[int, int] = {}
        run_refs: dict[str, int] = {}
        for seq, run in sequences:
            shared = seq.num_virtual_tokens // self.block_size if seq.block_table else 0
            if run is not None:
                run_refs[run.key] = run_refs.get(run.key, 0) + 1
                _expect(self._runs.get(run.key) is run, f"{seq.request_id} holds an evicted soft prompt")
                _expect(seq.block_table[:shared] == run.blocks[:shared], f"{seq.request_id} left its soft prompt")
                first = seq.num_virtual_tokens if run.source.is_key_values else shared * self.block_size
                writes = bool(seq.block_table) and seq.num_computed < first
                _expect(not writes, f"{seq.request_id} writes to its soft prompt")
            for block_id in seq.block_table[shared:]:
                ref_counts[block_id] = ref_counts.get(block_id, 0) + 1
        owners: dict[int, str] = {}

        def own(block_id: int, owner: str) -> None:
            _expect(block_id not in owners, f"block {block_id} is {owners.get(block_id)} and {owner}")
            owners[block_id] = owner

        for block_id in self._free:
            own(block_id, "free")
            _expect(self._blocks[block_id].block_hash is None, f"free block {block_id} is still cached")
        for key in self._idle:
            if isinstance(key, int):
                own(key, "idle")
                _expect(self._blocks[key].block_hash is not None, f"idle block {key} holds nothing")
        for run in self._runs.values():
            for block_id in run.blocks:
                own(block_id, f"of soft prompt {run.key}")
            _expect(run.ref_count == run_refs.get(run.key, 0), f"soft prompt {run.key} is counted wrongly")
            is_idle = run.ref_count == 0 and not run.is_loading
            _expect(is_idle == (run.key in self._idle), f"soft prompt {run.key} is idle and used")
            _expect(not (run.is_loading and run.num_computed), f"soft prompt {run.key} is read while it loads")
        for block_id, count in ref_counts.items():
            own(block_id, "used")
            _expect(self._blocks[block_id].ref_count == count, f"block {block_id} is counted wrongly")
        _expect(len(owners) == self.num_blocks, f"{self.num_blocks - len(owners)} blocks are lost")
        _expect(self._num_idle_blocks == sum(self._idle.values()), "idle blocks are counted wrongly")
        for block_hash, block_id in self._by_hash.items():
            _expect(self._blocks[block_id].block_hash == block_hash, f"block {block_id} is found by a wrong hash")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
