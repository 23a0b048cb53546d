"""Decode steps with adapters are replayed from graphs of their own, over a fake of torch.cuda."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

from server.engine.adapters.replays import DecodeReplays
from server.engine.cuda import adapter_backend
from server.engine.llm_engine import LLMEngine
from tests.support.engine.adapters import Adapted, make_adapters
from tests.support.engine.fake_cuda import FakeCUDA, fake_cuda_platform
from tests.support.engine.harness import Family, add, greedy, random_text, run, tokens
from tests.support.engine.triton import DEVICE
from tests.support.presence import present

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE.type != "cpu", reason="records launches of the interpreter"),
]

KINDS = ("attention_4", "head_and_embeddings", "ia3")
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def adapted(make_family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make_adapters(make_family("llama"), tmp_path_factory.mktemp("adapters"), KINDS)


@contextmanager
def counted_fills(graphs: DecodeReplays, patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows had an adapter in each step that a graph with adapters replayed."""
    fills: list[int] = []
    _, decodes = present(graphs._adapted)
    fill = decodes.fill

    def counted(adapters: Any) -> None:
        fills.append(sum(one is not None for one in adapters))
        fill(adapters)

    with patch.context() as own:
        own.setattr(decodes, "fill", counted)
        yield fills


def test_steps_are_replayed_with_and_without_adapters(
    adapted: Adapted, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turn over the same graphs: bare, two adapters, and an adapter that changes inputs, which is launched."""
    rng = random.Random(4)
    with FakeCUDA(monkeypatch) as cuda:
        engine = make_engine(
            adapted.family, fake_cuda_platform(monkeypatch, has_adapter_kernels=True), max_num_seqs=3
        )
        graphs = present(engine.runner._graphs)
        assert graphs.sizes == [1, 2, 3]
        assert cuda.num_captures == 2 * len(graphs.sizes)
        for kinds, is_adapted, is_replayed in (
            ([None, None], False, True),
            (["attention_4", None, "head_and_embeddings"], True, True),
            (["ia3", None], False, False),
            ([None], False, True),
            (["head_and_embeddings"], True, True),
        ):
            texts = [random_text(rng, 3, 9) for _ in kinds]
            before = cuda.num_replays
            with counted_fills(graphs, monkeypatch) as fills:
                for index, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
                    adapter = None if kind is None else adapted.sources[kind]
                    add(engine, str(index), text, greedy(MAX_TOKENS), adapter=adapter)
                outputs = run(engine)
            for index, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
                assert tokens(outputs[str(index)]) == adapted.expected(kind, text, MAX_TOKENS), kinds
            assert (len(fills) > 0) == is_adapted
            assert (cuda.num_replays - before >= MAX_TOKENS - 2) == is_replayed


def forget_tables(patch: pytest.MonkeyPatch) -> None:
    """As if a graph had recorded the adapters of its recording."""
    patch.setattr(adapter_backend._Decodes, "fill", lambda *_: None)


def wait_in_products(patch: pytest.MonkeyPatch) -> None:
    change = adapter_backend.TritonAdapters._change

    def waiting(self: Any, *arguments: Any) -> None:
        change(self, *arguments)
        if arguments[1].max_rank == adapter_backend.MAX_REPLAYED_RANK:
            torch.ones(1).nonzero()

    patch.setattr(adapter_backend.TritonAdapters, "_change", waiting)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [(forget_tables, "the logits of a text with an adapter differ"), (wait_in_products, "synchronizing CUDA")],
    ids=["stale", "waits"],
)
def test_graphs_with_adapters_that_fail_are_not_used(
    break_it: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    adapted: Adapted,
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Steps without adapters are replayed all the same, and those with adapters are launched."""
    break_it(monkeypatch)
    text = [5, 6, 7]
    with FakeCUDA(monkeypatch) as cuda:
        engine = make_engine(
            adapted.family, fake_cuda_platform(monkeypatch, has_adapter_kernels=True), max_num_seqs=2
        )
        assert "decode steps with adapters do not use CUDA graphs, which is slower" in caplog.text
        assert reason in caplog.text
        assert engine.model.adapters_off is None
        for kind, is_replayed in (("attention_4", False), (None, True)):
            before = cuda.num_replays
            add(engine, "r", text, greedy(3), adapter=None if kind is None else adapted.sources[kind])
            assert tokens(run(engine)["r"]) == adapted.expected(kind, text, 3)
            assert (cuda.num_replays > before) == is_replayed


def test_adapters_are_evicted_from_the_device_and_come_back_from_the_host(
    adapted: Adapted, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the device has room for two, and each file is read once."""
    budget, source = 45_000, adapted.sources["attention_4"]
    text, want = [5, 6, 7], adapted.expected("attention_4", [5, 6, 7], 2)
    with FakeCUDA(monkeypatch):
        platform = fake_cuda_platform(monkeypatch, has_adapter_kernels=True)
        limits = {"max_num_seqs": 1, "adapter_device_bytes": budget, "enforce_eager": True}
        engine = make_engine(adapted.family, platform, **limits)
        for turn in range(2):
            for index in range(3):
                copy = msgspec.structs.replace(source, digest=f"copy{index}")
                add(engine, f"{turn} {index}", text, greedy(2), adapter=copy)
                assert tokens(run(engine)[f"{turn} {index}"]) == want
                assert engine.stats.device_adapters.resident_bytes <= budget
        device, host = engine.stats.device_adapters, engine.stats.adapters
    assert (device.resident, device.evictions, device.loads) == (2, 4, 6)
    assert (host.resident, host.evictions, host.loads) == (3, 0, 3)
    assert (host.misses, host.hits) == (3, 3)


def test_a_replay_with_adapters_that_were_not_recorded_fails(
    adapted: Adapted, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeCUDA(monkeypatch):
        engine = make_engine(
            adapted.family, fake_cuda_platform(monkeypatch, has_adapter_kernels=True), max_num_seqs=1
        )
        graphs = present(engine.runner._graphs)
        assert not graphs.takes(2, None)
        graphs.drop_adapted()
        assert not graphs.takes(1, [None])
        with pytest.raises(RuntimeError, match="no pass with adapters was recorded"):
            graphs.run([1], [0], [[0]], adapters=[None])
