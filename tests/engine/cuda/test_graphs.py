"""A pass that waits for the device is not captured, and a capture that fails leaves nothing behind.

Without a GPU, over a fake of torch.cuda.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

from server.engine.cuda.graphs import CUDARecorder
from server.engine.llm_engine import LLMEngine
from server.errors import EngineStartError
from tests.support.engine.fake_cuda import FakeCUDA, fake_cuda_platform
from tests.support.engine.families import FAMILIES, UNTIED
from tests.support.engine.harness import SHAPE, Family, add, greedy, make_family, random_text, run, tokens

pytestmark = pytest.mark.slow

WARN = 1
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mixtral": FAMILIES["mixtral"],
    "dynamic": lambda: LlamaConfig(**SHAPE, rope_parameters=DYNAMIC),
    "longrope": lambda: Phi3Config(**UNTIED, original_max_position_embeddings=64, rope_parameters=LONG),
}


def test_a_function_is_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    given, doubled = torch.tensor([1.0, 2.0]), torch.zeros(2)
    with FakeCUDA(monkeypatch) as cuda:

        def double() -> None:
            doubled.copy_(given * 2)

        replay = CUDARecorder()(double)
        assert (cuda.num_captures, cuda.stream, cuda.mode) == (1, "the default stream", 0)
        given += 10
        replay()
    assert doubled.tolist() == [22.0, 24.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.ones(3).nonzero(),
        lambda: float(torch.ones(3).sum()),
        lambda: torch.ones(3)[torch.ones(3) > 0],
    ],
    ids=["nonzero", "number", "mask"],
)
@pytest.mark.parametrize("mode", [0, WARN])
def test_a_function_that_waits_is_not_captured(
    function: Callable[[], None], mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeCUDA(monkeypatch) as cuda:
        cuda.mode = mode
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            CUDARecorder()(function)
    assert (cuda.num_captures, cuda.mode) == (0, mode)


def test_a_capture_that_fails_restores_the_stream_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def wait_in_the_second_run() -> None:
        runs.append(len(runs))
        if runs == [0, 1]:
            torch.cuda.synchronize()

    with FakeCUDA(monkeypatch) as cuda:
        record = CUDARecorder()
        with pytest.raises(RuntimeError, match="the capture failed .* not permitted when stream is capturing"):
            record(wait_in_the_second_run)
        assert (cuda.num_captures, cuda.stream, cuda.mode) == (1, "the default stream", 0)
        record(lambda: None)
        assert cuda.num_captures == 2


def test_a_capture_that_cannot_begin_restores_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    with FakeCUDA(monkeypatch) as cuda:
        monkeypatch.setattr(cuda, "begin", fail)
        with pytest.raises(RuntimeError, match="the capture failed .RuntimeError: no memory"):
            CUDARecorder()(lambda: None)
        assert cuda.stream == "the default stream"


@pytest.fixture
def family_of(tmp_path: Path) -> Callable[[str], Family]:
    return lambda name: make_family(name, tmp_path, {}, CONFIGS[name]())


@pytest.fixture
def _longrope_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in versions of transformers that choose the frequencies in Python."""
    forward = Phi3RotaryEmbedding.forward

    def compare_first(module: Phi3RotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        assert position_ids.max() < LONG["original_max_position_embeddings"]
        return forward(module, x, position_ids)

    monkeypatch.setattr(Phi3RotaryEmbedding, "forward", compare_first)


@pytest.mark.usefixtures("_longrope_waits")
@pytest.mark.parametrize(
    ("name", "is_captured"), [("llama", True), ("mixtral", False), ("dynamic", False), ("longrope", False)]
)
def test_a_model_is_captured_unless_it_waits(
    name: str,
    is_captured: bool,
    family_of: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = [random_text(Random(index), 5, 30) for index in range(3)]
    family = family_of(name)
    with FakeCUDA(monkeypatch) as cuda:
        engine = make_engine(family, fake_cuda_platform(monkeypatch), max_num_seqs=3)
        assert (engine.runner._graphs is not None) == is_captured
        assert cuda.num_captures == (3 if is_captured else 0)
        assert cuda.num_waits == (0 if is_captured else 1)
        assert cuda.mode == 0
        assert ("do not use CUDA graphs, which is slower" in caplog.text) != is_captured
        for index, text in enumerate(texts):
            add(engine, str(index), text, greedy(8))
        outputs = run(engine)
    for index, text in enumerate(texts):
        assert tokens(outputs[str(index)]) == family.expected(None, text, 8)
    assert (cuda.num_replays >= 6) == is_captured


def test_a_model_whose_capture_fails_is_served_without_graphs(
    family_of: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family = family_of("llama")
    with FakeCUDA(monkeypatch, breaks_captures=True) as cuda:
        engine = make_engine(family, fake_cuda_platform(monkeypatch), max_num_seqs=3)
        assert "the capture failed (AcceleratorError: CUDA error: operation failed" in caplog.text
        assert (cuda.num_captures, cuda.stream) == (1, "the default stream")
        add(engine, "r", [1, 2, 3], greedy(8))
        assert tokens(run(engine)["r"]) == family.expected(None, [1, 2, 3], 8)


def test_a_capture_that_leaves_the_process_broken_fails_the_start(
    family_of: Callable[[str], Family], make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of("llama")
    with FakeCUDA(monkeypatch, breaks_captures=True, stays_broken=True):
        platform = fake_cuda_platform(monkeypatch)
        with pytest.raises(EngineStartError, match="the device cannot be used after .* --enforce-eager"):
            make_engine(family, platform)
    with FakeCUDA(monkeypatch, breaks_captures=True, stays_broken=True):  # another process
        engine = make_engine(family, fake_cuda_platform(monkeypatch), enforce_eager=True)
        add(engine, "r", [1, 2, 3], greedy(8))
        assert tokens(run(engine)["r"]) == family.expected(None, [1, 2, 3], 8)
