from __future__ import annotations

import pytest

from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.types import AdapterSource, SamplingParams, SoftPromptSource
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

Shared = tuple[SoftPromptSource | None, str]


def source(num_virtual_tokens: int, digest: str = "d", *, is_key_values: bool = True) -> SoftPromptSource:
    return SoftPromptSource(
        digest=digest, num_virtual_tokens=num_virtual_tokens, is_key_values=is_key_values, path="/nowhere"
    )


def task_source(task_id: int | None) -> SoftPromptSource:
    return SoftPromptSource(digest="d", num_virtual_tokens=5, is_key_values=False, path="/nowhere", task_id=task_id)


def sequence(
    tokens: list[int], soft_prompt: SoftPromptSource | None = None, salt: str = "", name: str = "s"
) -> Sequence:
    return make_sequence(name, tokens, SamplingParams(), soft_prompt, salt=salt)


def filled_run(blocks: BlockManager, soft_prompt: SoftPromptSource) -> SoftPromptRun:
    run = blocks.acquire_run(soft_prompt)
    assert run is not None
    run.num_computed = soft_prompt.num_virtual_tokens
    return run


def compute(blocks: BlockManager, seq: Sequence) -> None:
    seq.num_computed = seq.num_positions
    blocks.register(seq, seq.num_positions)


def test_needs_blocks() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(0, 4)


def test_second_sequence_shares_full_blocks_of_the_same_text() -> None:
    blocks = BlockManager(10, 4)
    first, second = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), sequence([1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert present(blocks.admit(first, None)).num_cached_tokens == 0
    compute(blocks, first)
    admission = present(blocks.admit(second, None))
    assert admission.num_cached_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_computed == 8
    blocks.check_integrity([(first, None), (second, None)])


def test_last_token_is_always_computed() -> None:
    blocks = BlockManager(10, 4)
    first, second = sequence([1, 2, 3, 4]), sequence([1, 2, 3, 4])
    blocks.admit(first, None)
    compute(blocks, first)
    assert present(blocks.admit(second, None)).num_cached_tokens == 0


def test_cached_prefix_survives_its_sequence_and_is_evicted_oldest_first() -> None:
    blocks = BlockManager(4, 2)
    for text in ([1, 2], [3, 4], [5, 6], [7, 8]):
        seq = sequence(text)
        blocks.admit(seq, None)
        compute(blocks, seq)
        blocks.free(seq)
    assert blocks.num_cached == 4
    newcomer = sequence([9, 10])
    blocks.admit(newcomer, None)
    again, gone = sequence([3, 4, 0], name="again"), sequence([1, 2, 0], name="gone")
    assert present(blocks.admit(again, None)).num_cached_tokens == 2
    blocks.free(again)
    assert present(blocks.admit(gone, None)).num_cached_tokens == 0


def test_prefix_caching_can_be_off() -> None:
    blocks = BlockManager(10, 4, enable_prefix_caching=False)
    for _ in range(2):
        seq = sequence([1, 2, 3, 4, 5])
        assert present(blocks.admit(seq, None)).num_cached_tokens == 0
        compute(blocks, seq)
        blocks.free(seq)
    assert blocks.num_cached == 0


def test_soft_prompt_is_one_run_for_all() -> None:
    blocks = BlockManager(20, 4)
    soft_prompt = source(8)
    run = filled_run(blocks, soft_prompt)
    assert blocks.acquire_run(soft_prompt) is run
    first, second = sequence([1, 2], soft_prompt, name="a"), sequence([3, 4], soft_prompt, name="b")
    for seq in (first, second):
        assert present(blocks.admit(seq, run)).copy is None  # the last block is full, so nothing is copied
        assert seq.block_table[:2] == run.blocks
        assert seq.num_computed == 8
    blocks.check_integrity([(first, run), (second, run)])
    assert blocks.num_available == 20 - 2 - 2


def test_partial_last_block_is_copied_for_each_sequence() -> None:
    blocks = BlockManager(20, 4)
    soft_prompt = source(6)
    run = filled_run(blocks, soft_prompt)
    blocks.acquire_run(soft_prompt)
    first, second = sequence([1], soft_prompt, name="a"), sequence([2], soft_prompt, name="b")
    copies = [present(present(blocks.admit(seq, run)).copy) for seq in (first, second)]
    assert [copy[0] for copy in copies] == [run.blocks[1]] * 2
    assert [copy[1] for copy in copies] == [first.block_table[1], second.block_table[1]]
    assert len({run.blocks[1], first.block_table[1], second.block_table[1]}) == 3
    blocks.check_integrity([(first, run), (second, run)])


@pytest.mark.parametrize(("num", "start"), [(6, 4), (3, 0)])
def test_a_partial_last_block_that_the_step_fills_is_computed_by_the_sequence(num: int, start: int) -> None:
    blocks = BlockManager(20, 4)
    soft_prompt, other = source(num, "rows", is_key_values=False), source(num, "kv")
    run, filled = filled_run(blocks, soft_prompt), filled_run(blocks, other)
    blocks.acquire_run(soft_prompt)
    first, second = sequence([1, 2, 3], soft_prompt, name="a"), sequence([1, 2, 3], soft_prompt, name="b")
    beside = sequence([1, 2, 3], other, name="beside")
    members = [(first, run), (beside, filled)]
    admissions = present(blocks.admit_all(members, filling=[run.key]))
    assert [admission.copy for admission in admissions] == [None, (filled.blocks[-1], beside.block_table[start // 4])]
    assert [admission.num_cached_tokens for admission in admissions] == [0, 0]
    assert (first.num_computed, beside.num_computed) == (start, num)
    assert first.block_table[: start // 4] == run.blocks[: start // 4]
    assert run.blocks[-1] not in first.block_table
    compute(blocks, first)
    assert present(blocks.admit(second, run, filling=[run.key])).num_cached_tokens == start + 4 - num
    assert second.num_computed == start + 4
    blocks.check_integrity([*members, (second, run)])


@pytest.mark.parametrize(("is_key_values", "first"), [(False, 4), (True, 6)])
def test_integrity_check_finds_a_sequence_that_would_write_to_its_soft_prompt(
    is_key_values: bool, first: int
) -> None:
    blocks = BlockManager(20, 4)
    soft_prompt = source(6, is_key_values=is_key_values)
    run = filled_run(blocks, soft_prompt)
    seq = sequence([1], soft_prompt)
    blocks.admit(seq, run)
    seq.num_computed = first
    blocks.check_integrity([(seq, run)])
    seq.num_computed = first - 1
    with pytest.raises(AssertionError, match="s writes to its soft prompt"):
        blocks.check_integrity([(seq, run)])


def test_text_after_a_partial_block_is_shared_without_a_copy() -> None:
    blocks = BlockManager(20, 4)
    soft_prompt = source(6)
    run = filled_run(blocks, soft_prompt)
    blocks.acquire_run(soft_prompt)
    first, second = sequence([1, 2, 3], soft_prompt, name="a"), sequence([1, 2, 4], soft_prompt, name="b")
    blocks.admit(first, run)
    compute(blocks, first)
    admission = present(blocks.admit(second, run))
    assert admission.copy is None
    assert admission.num_cached_tokens == 2  # positions 4 to 7: two virtual tokens and two text tokens
    assert second.block_table[1] == first.block_table[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((None, ""), (None, "other")),
        ((source(6, "x"), ""), (source(6, "x"), "other")),
        ((source(4, "x"), ""), (source(4, "y"), "")),
        ((source(4, "x"), ""), (None, "")),
    ],
    ids=["tenant", "tenant behind a soft prompt", "soft prompt", "bare"],
)
def test_no_text_is_shared_across_tenants_or_soft_prompts(first: Shared, second: Shared) -> None:
    blocks = BlockManager(40, 4)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for (soft_prompt, salt), name in ((first, "a"), (second, "b")):
        run = filled_run(blocks, soft_prompt) if soft_prompt else None
        seq = sequence(text, soft_prompt, salt, name)
        assert present(blocks.admit(seq, run)).num_cached_tokens == 0
        compute(blocks, seq)


def test_tenants_share_a_soft_prompt_and_no_text_after_it() -> None:
    blocks = BlockManager(20, 4)
    soft_prompt = source(6)
    run = filled_run(blocks, soft_prompt)
    assert blocks.acquire_run(soft_prompt) is run
    first, second = sequence([1, 2, 3], soft_prompt, "a", "a"), sequence([1, 2, 3], soft_prompt, "b", "b")
    for seq in (first, second):
        admission = present(blocks.admit(seq, run))
        assert (admission.num_cached_tokens, admission.copy) == (0, (run.blocks[1], seq.block_table[1]))
        compute(blocks, seq)
    assert first.block_table[0] == second.block_table[0] == run.blocks[0]
    assert not set(first.block_table[1:]) & set(second.block_table[1:])
    blocks.check_integrity([(first, run), (second, run)])


def test_idle_run_is_evicted_whole_and_counted() -> None:
    blocks = BlockManager(4, 4)
    run = filled_run(blocks, source(10))
    blocks.release_run(run)
    assert blocks.num_cached == 3
    seq = sequence(list(range(5)))
    assert blocks.admit(seq, None) is not None
    assert blocks.runs == {}
    assert blocks.stats.run_evictions == 1
    blocks.check_integrity([(seq, None)])


def test_used_run_is_never_evicted() -> None:
    blocks = BlockManager(4, 4)
    run = filled_run(blocks, source(10))
    assert blocks.admit(sequence(list(range(5))), None) is None
    assert list(blocks.runs.values()) == [run]


def test_unfilled_run_is_dropped_with_its_last_reference() -> None:
    blocks = BlockManager(4, 4)
    run = present(blocks.acquire_run(source(10)))
    blocks.release_run(run)
    assert blocks.runs == {}
    assert blocks.num_available == 4
    with pytest.raises(AssertionError, match="more often"):
        blocks.release_run(run)


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(3, 4)
    seq = sequence(list(range(9)))
    assert blocks.acquire_run(source(13)) is None
    assert blocks.admit(seq, None, headroom=1) is None
    assert seq.block_table == []
    assert blocks.num_available == 3
    assert blocks.admit(seq, None) is not None
    assert not blocks.extend(seq, 13)
    assert blocks.extend(seq, 12)
    blocks.check_integrity([(seq, None)])


def test_blocks_to_finish_counts_the_copied_block() -> None:
    blocks = BlockManager(8, 4)
    assert blocks.blocks_to_finish(None, 9) == 3
    assert blocks.blocks_to_finish(source(8), 12) == 3
    assert blocks.blocks_to_finish(source(6), 12) == 4


def test_integrity_check_finds_a_lost_block() -> None:
    blocks = BlockManager(4, 4)
    seq = sequence([1, 2])
    blocks.admit(seq, None)
    with pytest.raises(AssertionError, match="lost"):
        blocks.check_integrity([])


def test_tasks_of_one_soft_prompt_share_no_blocks() -> None:
    blocks = BlockManager(20, 2)
    sources = [task_source(None), task_source(0), task_source(1)]
    runs = [filled_run(blocks, soft_prompt) for soft_prompt in sources]
    assert len({block for run in runs for block in run.blocks}) == 9
    sequences = [
        sequence([1, 2, 3, 4], soft_prompt, name=str(index))
        for index, soft_prompt in enumerate([*sources, sources[2]])
    ]
    users = [*runs, blocks.acquire_run(sources[2])]
    assert users[3] is runs[2]
    found = []
    for seq, run in zip(sequences, users, strict=True):
        found.append(present(blocks.admit(seq, run)).num_cached_tokens)
        compute(blocks, seq)
    assert found == [0, 0, 0, 3]
    blocks.check_integrity(list(zip(sequences, users, strict=True)))


def test_soft_prompts_found_and_not_found_are_counted() -> None:
    blocks = BlockManager(8, 4)
    first = blocks.acquire_run(source(10))
    assert first is not None
    blocks.acquire_run(source(10))  # being filled
    first.num_computed = 10
    blocks.release_run(first)
    blocks.release_run(first)
    blocks.acquire_run(source(10))  # idle
    assert blocks.acquire_run(source(40, "other")) is None  # not counted, because it is requested again
    assert (blocks.stats.run_hits, blocks.stats.run_loads) == (2, 1)


def test_blocks_that_were_not_written_are_unregistered_and_no_others() -> None:
    blocks = BlockManager(20, 4)
    text = list(range(13))
    first, twin, later = sequence(text, name="first"), sequence(text, name="twin"), sequence(text, name="later")
    blocks.admit(first, None)
    blocks.admit(twin, None)  # before any block is findable, so it gets its own
    blocks.register(first, 6)
    blocks.register(first, 13)
    blocks.register(twin, 13)
    blocks.unregister(twin, 0)  # its blocks were never findable
    blocks.unregister(first, 6)
    assert present(blocks.admit(later, None)).num_cached_tokens == 4
    assert later.block_table[0] == first.block_table[0]
    blocks.check_integrity([(first, None), (twin, None), (later, None)])
    blocks.register(first, 13)  # computed after all
    again = sequence(text, name="again")
    assert present(blocks.admit(again, None)).num_cached_tokens == 12
    for seq in (first, twin, later, again):
        blocks.free(seq)
    blocks.check_integrity([])


def test_unregistering_behind_a_soft_prompt_counts_its_positions() -> None:
    blocks = BlockManager(20, 4)
    soft_prompt = source(6)
    run = filled_run(blocks, soft_prompt)
    seq = sequence(list(range(11)), soft_prompt)
    blocks.admit(seq, run)
    blocks.register(seq, 17)
    assert len(seq.block_hashes) == 3
    blocks.unregister(seq, 9)
    assert len(seq.block_hashes) == 1
    blocks.unregister(seq, 6)
    assert seq.block_hashes == []
    blocks.check_integrity([(seq, run)])


def test_idle_blocks_that_are_withdrawn_become_free() -> None:
    blocks = BlockManager(4, 2)
    seq = sequence([1, 2, 3, 4, 5])
    assert blocks.admit(seq, None)
    compute(blocks, seq)
    written = seq.block_table[:2]
    blocks.free(seq)  # the sequence fails before its blocks are found to be spoiled
    assert blocks.num_cached == 2
    blocks.withdraw(written)
    blocks.check_integrity([])
    assert (blocks.num_cached, blocks.num_available) == (0, 4)
    again = sequence([1, 2, 3, 4, 5])
    assert present(blocks.admit(again, None)).num_cached_tokens == 0


def adapter_source(digest: str) -> AdapterSource:
    return AdapterSource(digest=digest, path="/nowhere", config_path="/nowhere", num_parameters=1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, adapter_source("a")),
        (adapter_source("a"), adapter_source("b")),
        (adapter_source("d"), None),  # a digest that is also a soft prompt's
    ],
)
def test_text_is_shared_under_the_same_adapter_only(
    first: AdapterSource | None, second: AdapterSource | None
) -> None:
    blocks = BlockManager(10, 4)
    text = [1, 2, 3, 4, 5]
    before = make_sequence("before", text, SamplingParams(), adapter=first)
    assert present(blocks.admit(before, None)).num_cached_tokens == 0
    compute(blocks, before)
    other = make_sequence("other", text, SamplingParams(), adapter=second)
    assert present(blocks.admit(other, None)).num_cached_tokens == 0
    same = make_sequence("same", text, SamplingParams(), adapter=first)
    assert present(blocks.admit(same, None)).num_cached_tokens == 4


def test_embeddings_are_computed_for_each_adapter_and_keys_and_values_are_shared_by_all() -> None:
    blocks = BlockManager(10, 4)
    first, second = adapter_source("a"), adapter_source("b")
    rows, prefix = source(4, "rows", is_key_values=False), source(4, "prefix")
    run = present(blocks.acquire_run(rows, first))
    assert run.adapter == first
    assert blocks.acquire_run(rows, first) is run
    others = [present(blocks.acquire_run(rows, adapter)) for adapter in (second, None)]
    assert len({run.key, *(other.key for other in others)}) == 3
    shared = present(blocks.acquire_run(prefix, first))
    assert shared.adapter is None
    assert blocks.acquire_run(prefix, second) is blocks.acquire_run(prefix) is shared
