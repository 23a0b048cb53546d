"""Decode buffers hold each step's inputs at fixed addresses, and replayed steps give PEFT's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from server.engine.attention import decode_batch
from server.engine.attention.backend import AttentionBackend, SDPABackend
from server.engine.attention.decode_batch import DecodeBatch, DecodeBuffers, DecodeGraphs, batch_sizes
from server.engine.attention.kv_cache import KVCache
from server.engine.llm_engine import LLMEngine
from server.engine.model import exactness
from server.errors import EngineStartError
from tests.support.engine.caches import make_cache
from tests.support.engine.fake_cuda import Recordable
from tests.support.engine.families import FAMILIES
from tests.support.engine.harness import PEFT_CONFIGS, Family, add, greedy, make_family, random_text, run, tokens
from tests.support.engine.platforms import PlainPlatform
from tests.support.engine.triton import DEVICE, triton_attention

pytestmark = pytest.mark.slow

MAX_TOKENS = 5


class Recorder:
    """A fake of CUDA graphs: a replay calls the recorded function again, over the same tensors."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        function()

        def replay() -> None:
            self.replays += 1
            function()

        return replay


@given(st.integers(1, 700))
def test_batches_are_padded_by_at_most_a_third(max_rows: int) -> None:
    sizes = batch_sizes(max_rows)
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    assert all(small < large for small, large in pairwise(sizes))
    assert all(large - small - 1 <= large / 3 for small, large in pairwise(sizes))


class Table(list[int]):
    """A block table that counts the blocks that are read from it."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found


@dataclass
class Row:
    """A decode: its table may be longer than its position needs."""

    table: Table
    position: int

    @property
    def length(self) -> int:
        return self.position // BLOCK_SIZE + 1


BLOCK_SIZE, MAX_ROWS, MAX_BLOCKS = 4, 6, 7


class Batches(RuleBasedStateMachine):
    """Random admissions, growth, preemptions, reorderings and ends; the device is a second tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache()
        self.buffers = DecodeBuffers(MAX_ROWS, MAX_BLOCKS, self.cache)
        self.buffers._device = self.buffers._host.clone()
        self.rows: list[Row] = []

    def is_free(self) -> bool:
        return len(self.rows) < MAX_ROWS

    @precondition(is_free)
    @rule(position=st.integers(0, MAX_BLOCKS * BLOCK_SIZE - 1), rng=st.randoms(use_true_random=False))
    def admit(self, position: int, rng: random.Random) -> None:
        num_blocks = rng.randint(position // BLOCK_SIZE + 1, MAX_BLOCKS)
        self.rows.append(Row(Table(rng.sample(range(40), num_blocks)), position))

    @rule(choice=st.integers(0, MAX_ROWS - 1))
    def end(self, choice: int) -> None:
        if self.rows:
            del self.rows[choice % len(self.rows)]

    @rule(choice=st.integers(0, MAX_ROWS - 1), block=st.integers(0, 39))
    def preempt_and_resume(self, choice: int, block: int) -> None:
        """The sequence gets a new list, which may begin like the old one."""
        if self.rows:
            row = self.rows.pop(choice % len(self.rows))
            self.rows.append(Row(Table([*row.table[: row.length - 1], block]), row.position))

    @rule(rng=st.randoms(use_true_random=False))
    def reorder(self, rng: random.Random) -> None:
        rng.shuffle(self.rows)

    @rule(size=st.integers(1, MAX_ROWS), is_small=st.booleans(), block=st.integers(0, 39))
    def step(self, size: int, is_small: bool, block: int) -> None:
        rows, size = self.rows, max(size, len(self.rows))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_batch, "WHOLE_COPY_BYTES", 10**6 if is_small else 0)
            ids = list(range(10, 10 + len(rows)))
            width = self.buffers.fill(ids, [row.position for row in rows], [row.table for row in rows], size)
        self.check(ids, size, width)
        for row in rows:
            if row.position + 1 < MAX_BLOCKS * BLOCK_SIZE:
                row.position += 1
            if len(row.table) < row.length:
                row.table.append(block)

    def check(self, ids: list[int], size: int, width: int) -> None:
        rows, padding, spare = self.rows, size - len(self.rows), self.cache.spare_block
        batch, positions = self.buffers.batch(size), [row.position for row in self.rows]
        group = batch.metadata.groups[0]
        assert batch.input_ids[0].tolist() == ids + [0] * padding
        assert batch.position_ids[0].tolist() == positions + [0] * padding
        assert group.query_positions[:, 0].tolist() == positions + [0] * padding
        assert (group.start, group.stop, *group.query_positions.shape) == (0, size, size, 1)
        slots = batch.metadata.slot_mapping.tolist()
        for index, row in enumerate(rows):
            assert group.tables[index, : row.length].tolist() == list(row.table)[: row.length]
            last = list(row.table)[row.length - 1]
            assert slots[index] == last * BLOCK_SIZE + row.position % BLOCK_SIZE
        assert group.tables[len(rows) : size, 0].tolist() == [spare] * padding
        assert slots[len(rows) :] == [spare * BLOCK_SIZE] * padding
        assert width == max([row.length for row in rows], default=1)
        assert torch.equal(self.buffers.batch(size, width).metadata.groups[0].tables, group.tables[:, :width])
        assert batch.input_ids.data_ptr() == self.buffers._device.data_ptr()


Batches.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestBatches = Batches.TestCase


@pytest.mark.parametrize("is_small", [True, False])
def test_a_step_reads_and_copies_what_changed(is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_batch, "WHOLE_COPY_BYTES", 10**6 if is_small else 0)
    buffers = DecodeBuffers(4, 100, make_cache())
    buffers._device = buffers._host.clone()
    tables = [Table(range(number, number + 90)) for number in range(4)]

    def fill(positions: list[int], own: list[Table]) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks read from each table, and where the device's tables were written."""
        for table in tables:
            table.num_read = 0
        on_device = buffers._device[5:]
        before = on_device.clone()
        on_device.fill_(-1)
        buffers.fill([1] * len(own), positions, own, len(own))
        written = {(row, column) for column, row in (on_device >= 0).nonzero().tolist()}
        on_device[on_device < 0] = before[on_device < 0]
        return [table.num_read for table in tables], written

    assert fill([319, 319, 319, 319], tables) == (
        [81] * 4,
        {(row, column) for row in range(4) for column in range(80)},
    )
    assert fill([319, 319, 319, 319], tables) == ([1] * 4, set())
    read, written = fill([320, 319, 319, 327], tables)  # two of them reach the next block or the one after it
    assert read == [2, 1, 1, 3]
    if not is_small:
        assert written == {(0, 80), (3, 80), (3, 81)}
    # The first ends, and the others move: their blocks are not read again.
    read, written = fill([320, 320, 328], tables[1:])
    assert read == [0, 2, 2, 2]
    assert written >= {(0, 80), (1, 80), (2, 82), (0, 0), (2, 0)}


def test_graphs_are_recorded_largest_first_and_replayed_by_size() -> None:
    recorded: list[int] = []

    def forward(batch: DecodeBatch) -> torch.Tensor:
        recorded.append(batch.input_ids.shape[1])
        return (batch.input_ids[0] * 2 + batch.position_ids[0])[:, None].float()

    graphs = DecodeGraphs(forward, DecodeBuffers(6, 7, make_cache()), 6, Recorder())
    assert graphs.sizes == [1, 2, 3, 4, 6]
    assert recorded == [6, 6, 4, 3, 2, 1]
    recorded.clear()
    for count, size in [(1, 1), (3, 3), (5, 6), (6, 6), (4, 4)]:
        ids = list(range(10, 10 + count))
        assert graphs.run(ids, [7] * count, [[1, 2]] * count)[:, 0].tolist() == [2 * token + 7 for token in ids]
        assert recorded.pop() == size
    assert graphs.run([5], [1], [[3]], size=4)[:, 0].tolist() == [11]
    assert recorded == [4]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            config = FAMILIES[name]() if name in FAMILIES else None
            made[name] = make_family(name, tmp_path_factory.mktemp(name), PEFT_CONFIGS, config)
        return made[name]

    return make


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_replayed_decodes_equal_peft(
    name: str,
    family_of: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA: Triton's kernels and the model's own layers."""
    monkeypatch.setattr(exactness, "PROBE_KEYS", 48)  # the interpreter is slow
    recorder = Recorder()
    platform = PlainPlatform([triton_attention.TritonBackend], recorder, DEVICE)
    family, rng = family_of(name), random.Random(name)
    engine = make_engine(family, platform, max_num_seqs=3, block_size=4, max_model_len=64)
    assert engine.runner._graphs is not None
    recorder.replays = 0
    want = {}
    for index, key in enumerate(["prompt_tuning_20", "prefix_13", None, None]):
        text = random_text(rng, 1, 12)
        want[f"r{index}"] = family.expected(key, text, MAX_TOKENS)
        add(engine, f"r{index}", text, greedy(MAX_TOKENS), soft_prompt=family.source(key))
    outputs = run(engine)
    assert {key: tokens(output) for key, output in outputs.items()} == want
    assert recorder.replays >= MAX_TOKENS - 2


def test_with_enforce_eager_nothing_is_recorded(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    recorder = Recorder()
    engine = make_engine(llama, PlainPlatform([Recordable], recorder), max_num_seqs=2, enforce_eager=True)
    assert engine.runner._graphs is None
    assert recorder.replays == 0


def test_steps_that_cannot_be_recorded_run_eagerly(
    llama: Family,
    make_engine: Callable[..., LLMEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = make_engine(llama, PlainPlatform([Recordable], fail), max_num_seqs=2)
    assert "do not use CUDA graphs" in caplog.text
    assert "when stream is capturing" in caplog.text
    add(engine, "one", [1, 2, 3], greedy(5))
    assert tokens(run(engine)["one"]) == llama.expected(None, [1, 2, 3], 5)


def test_replays_with_wrong_logits_are_not_used(
    llama: Family,
    make_engine: Callable[..., LLMEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def record(function: Callable[[], None]) -> Callable[[], None]:
        function()
        return lambda: None  # like a graph that reads other tensors than those that are written

    engine = make_engine(llama, PlainPlatform([Recordable], record), max_num_seqs=2)
    assert engine.runner._graphs is None
    assert "its logits differ" in caplog.text


def test_the_next_backend_serves_if_the_first_cannot(
    llama: Family,
    make_engine: Callable[..., LLMEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Wrong(SDPABackend):
        def attend(self, *arguments: Any) -> torch.Tensor:
            return super().attend(*arguments) * 1.5

    def missing(_cache: KVCache) -> AttentionBackend:
        raise ImportError("No module named 'triton'")

    engine = make_engine(llama, PlainPlatform([missing, Wrong, SDPABackend]))
    assert type(engine.runner.backend) is SDPABackend
    assert "No module named 'triton'" in caplog.text
    assert "its logits differ" in caplog.text
    add(engine, "one", [1, 2, 3], greedy(5))
    assert tokens(run(engine)["one"]) == llama.expected(None, [1, 2, 3], 5)
    with pytest.raises(EngineStartError, match="its logits differ"):
        make_engine(llama, PlainPlatform([missing, Wrong]))
