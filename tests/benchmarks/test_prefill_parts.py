from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.peers.token_times import measure_token_times
from benchmarks.prefill_parts.first_token import EngineStepper
from benchmarks.prefill_parts.layouts import MIN_LAYERS, SHAPES, products_by_way
from benchmarks.prefill_parts.steps import prefill_step
from benchmarks.prefill_parts.throughput import Load, loads
from benchmarks.step_cost import Products
from benchmarks.workload import build_model
from server.config import EngineSettings
from server.engine.cpu.packed_linear import can_pack
from server.engine.llm_engine import LLMEngine

pytestmark = pytest.mark.slow

LAYER_WEIGHTS = 576 * 960 + 576 * 576 + 576 * 3072 + 1536 * 576


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMEngine]:
    model: Path = build_model(tmp_path_factory.mktemp("prefill"), layers=1)
    engine = LLMEngine(
        EngineSettings(
            model=str(model),
            device="cpu",
            dtype="float32",
            enable_prefix_caching=False,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            kv_cache_memory=16 * 2**20,
        )
    )
    yield engine
    engine.close()


def test_bare_products_apply_the_head_to_the_sampled_rows_only(engine: LLMEngine) -> None:
    products = Products(engine)
    assert products.flops(rows=5, sampled=2) == 2 * (5 * LAYER_WEIGHTS + 2 * 576 * 49_152)
    seen: list[tuple[int, int]] = []

    def keep(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        if hasattr(module, "in_features"):
            seen.append((output.shape[0], output.shape[1]))

    with torch.nn.modules.module.register_module_forward_hook(keep):
        products.timed(products.work(5, sampled=2))
    assert sorted(seen) == [(2, 49_152), (5, 576), (5, 576), (5, 960), (5, 3072)]


def test_a_prefill_step_computes_all_texts_at_once_or_is_an_error(engine: LLMEngine) -> None:
    products = Products(engine)
    before = engine.stats.steps
    assert prefill_step(engine, products, count=4, length=16) > 0
    assert engine.stats.steps == before + 1
    with pytest.raises(RuntimeError, match="more than one step"):
        prefill_step(engine, products, count=5, length=16)
    while engine.num_unfinished:
        engine.step()


def test_our_engine_is_driven_as_any_other(engine: LLMEngine) -> None:
    times = measure_token_times(
        EngineStepper(engine, []), [[1] * 100] * 2, [[2] * 8] * 3, steps_between=2, decode_tokens=64
    )
    assert len(times.first_token) == 2
    # The decodes go on beside both chunks of each text, and between the texts.
    assert len(times.gaps) == 3 * 2 * (2 + 2)
    assert not engine.num_unfinished


def test_a_failed_request_ends_the_measurement(engine: LLMEngine) -> None:
    with pytest.raises(RuntimeError):
        EngineStepper(engine, []).add("text0", [49_152], 1)


def test_the_loads_are_the_mixed_one_and_each_combination() -> None:
    mixed = Load(32, 256, 768, 8)
    assert loads(mixed, [1, 8], [128], [1, 8]) == [
        mixed,
        Load(1, 128, 128, 1),
        Load(8, 128, 128, 1),
        Load(1, 128, 128, 8),
        Load(8, 128, 128, 8),
    ]
    assert str(mixed) == "32 x 256 to 768 tokens, 8 new"
    eight, sixteen = mixed.texts(8), mixed.texts(16)
    assert [text.token_ids for text in eight] == [text.token_ids for text in sixteen]
    assert ({text.prompt for text in eight}, {text.prompt for text in sixteen}) == (set(range(8)), set(range(16)))


@pytest.mark.skipif(not can_pack(torch.float32), reason="oneDNN has no packed products here")
def test_every_way_of_a_layout_computes_the_same_product() -> None:
    ways = products_by_way(MIN_LAYERS, torch.float32)
    torch.manual_seed(0)
    rows = {width: torch.randn(130, width) for width, _ in SHAPES.values()}
    with torch.inference_mode():
        for shape, (width, _) in SHAPES.items():
            outputs = {name: layers[0][shape](rows[width]) for name, layers in ways.items()}
            expected = outputs.pop("F.linear")
            assert isinstance(expected, torch.Tensor)
            for name, output in outputs.items():
                whole = torch.cat(output) if isinstance(output, list) else output
                assert isinstance(whole, torch.Tensor)
                torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4, msg=name)
