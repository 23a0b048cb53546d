"""Decode buffers hold each step's inputs at fixed addresses, and replayed steps give PEFT's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


ROWS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 27), st.randoms(use_true_random=False)), max_size=6)


@settings(deadline=None)
@given(st.lists(st.tuples(ROWS, st.integers(1, 6)), min_size=1, max_size=6), st.data())
def test_buffers_hold_each_step_at_fixed_addresses(steps: list[tuple[Any, int]], data: st.DataObject) -> None:
    cache = make_cache()
    buffers = DecodeBuffers(6, 7, cache)
    batches = {size: buffers.batch(size) for size in range(1, 7)}
    tables: list[list[int]] = [[] for _ in range(6)]
    for rows, size in steps:
        size = max(size, len(rows), 1)
        for row, (_, _, rng) in enumerate(rows):
            if not tables[row] or data.draw(st.booleans()):  # else the same list is used again, changed in place
                tables[row] = rng.sample(range(40), 7)
            tables[row][rng.randrange(7)] = rng.randrange(40)
        ids, positions = [row[0] for row in rows], [row[1] for row in rows]
        width = buffers.fill(ids, positions, tables[: len(rows)], size)
        batch, padding = batches[size], size - len(rows)
        group = batch.metadata.groups[0]
        assert batch.input_ids[0].tolist() == ids + [0] * padding
        assert batch.position_ids[0].tolist() == positions + [0] * padding
        assert group.query_positions[:, 0].tolist() == positions + [0] * padding
        assert (group.start, group.stop, *group.query_positions.shape) == (0, size, size, 1)
        slots = batch.metadata.slot_mapping.tolist()
        for row, position in enumerate(positions):
            length = position // 4 + 1
            assert group.tables[row, :length].tolist() == tables[row][:length]
            assert slots[row] == tables[row][position // 4] * 4 + position % 4
        for row in range(len(rows), size):
            assert group.tables[row, 0] == cache.spare_block
            assert slots[row] == cache.spare_block * 4
        assert width == max([position // 4 + 1 for position in positions], default=1)
        assert torch.equal(buffers.batch(size, width).metadata.groups[0].tables, group.tables[:, :width])
        assert batch.input_ids.data_ptr() == buffers.batch(size).input_ids.data_ptr()


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
