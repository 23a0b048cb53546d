"""Adapters read from PEFT's files, and passes of a model with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.config import EngineSettings
from server.engine.adapters.reading import AdapterLoadError
from server.engine.adapters.weights import is_finite
from server.engine.model.model_runner import ModelRunner
from tests.support.engine.adapters import Adapted, Text, generate, make_adapters, reader_of, source_of
from tests.support.engine.harness import Family, make_family, random_text

MAX_TOKENS = 6


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("qwen2", tmp_path_factory.mktemp("qwen2"), {})


@pytest.fixture(scope="module")
def adapted(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make_adapters(family, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def runner(family: Family) -> ModelRunner:
    return ModelRunner(EngineSettings(model=str(family.path), dtype="float32", kv_cache_memory=2**23))


def test_six_kinds_beside_bare_rows_equal_peft(adapted: Adapted, runner: ModelRunner) -> None:
    rng, reader = random.Random(1), reader_of(runner)
    weights = {kind: reader.read(source) for kind, source in adapted.sources.items()}
    kinds = [*weights, None, *weights, None]
    texts = [random_text(rng, 2, 12) for _ in kinds]
    texts[len(kinds) // 2] = texts[0]  # the same text with the same adapter
    answers = generate(
        runner,
        [Text(text, None if kind is None else weights[kind]) for text, kind in zip(texts, kinds, strict=True)],
        MAX_TOKENS,
    )
    expected = [adapted.expected(kind, text, MAX_TOKENS) for text, kind in zip(texts, kinds, strict=True)]
    assert answers == expected


def test_a_pass_after_adapters_is_the_one_before(adapted: Adapted, runner: ModelRunner) -> None:
    weights = reader_of(runner).read(adapted.sources["dora"])
    ids = {"input_ids": torch.tensor([[3, 5, 7]])}
    spans = [([0], 0, 3)]
    with torch.inference_mode():
        before = runner.paged_model.forward(spans, ids, [2])
        changed = runner.paged_model.forward(spans, ids, [2], [weights])
        after = runner.paged_model.forward(spans, ids, [2], [None])
    assert torch.equal(before, after)
    assert not torch.allclose(before, changed, atol=1e-3)


def test_a_pass_that_fails_leaves_no_adapter_behind(adapted: Adapted, runner: ModelRunner) -> None:
    weights = reader_of(runner).read(adapted.sources["attention_4"])
    paged, spans = runner.paged_model, [([0], 0, 3)]
    with torch.inference_mode():
        before = paged.forward(spans, {"input_ids": torch.tensor([[3, 5, 7]])}, [2])
        with pytest.raises(IndexError):
            paged.forward(spans, {"input_ids": torch.tensor([[3, 5, 10_000]])}, [2], [weights])
        assert torch.equal(before, paged.forward(spans, {"input_ids": torch.tensor([[3, 5, 7]])}, [2]))


def test_the_base_states_the_shapes_of_its_products(runner: ModelRunner) -> None:
    modules = runner.info.modules
    shape = modules["model.layers.1.self_attn.k_proj"]
    assert (shape.kind, shape.in_features, shape.out_features, shape.unsupported) == ("linear", 48, 24, None)
    assert modules["model.embed_tokens"].kind == "embedding"
    assert modules["lm_head"].out_features == 197
    assert "no linear layer" in (modules["model.norm"].unsupported or "")
    assert runner.info.adapters_off is None


def test_the_norms_of_adapted_weights_are_those_of_the_sum(adapted: Adapted, runner: ModelRunner) -> None:
    reader = reader_of(runner)
    changes = reader.changes(adapted.sources["dora"])
    model = adapted.models["dora"].base_model.model
    backend = runner.paged_model.adapter_backend
    assert backend is not None
    num_checked = 0
    for product in backend.products:
        names = {part.start: part.name for part in product.parts}
        for change in changes.get(product.index, ()):
            layer = model.get_submodule(names[change.start])
            norm = (layer.base_layer.weight + layer.get_delta_weight("default")).norm(dim=1)
            assert change.gain is not None
            torch.testing.assert_close(change.gain, layer.lora_magnitude_vector["default"].weight / norm)
            num_checked += 1
    assert num_checked == 21
    norms = reader.weight_norms("model.layers.0.self_attn.v_proj")
    weight = adapted.family.model.get_submodule("model.layers.0.self_attn.v_proj").weight
    torch.testing.assert_close(norms, weight.norm(dim=1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("unknown", "changes model.layers.7.self_attn.q_proj, which is no module of this base"),
        ("shape", r"of shape \(4, 47\); this base needs \(4, 48\)"),
        ("infinite", "not finite in float32"),
        ("cut", "cannot be read"),
        ("config", "cannot be read"),
    ],
)
def test_files_that_do_not_match_the_base_are_refused(
    damage: str, message: str, adapted: Adapted, runner: ModelRunner, tmp_path: Path
) -> None:
    folder = adapted.folders["attention_4"]
    tensors = load_file(folder / "adapter_model.safetensors")
    config = (folder / "adapter_config.json").read_text()
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if damage == "unknown":
        for half in ("A", "B"):
            moved = tensors.pop(first.replace("lora_A", f"lora_{half}"))
            tensors[first.replace("layers.0", "layers.7").replace("lora_A", f"lora_{half}")] = moved
    elif damage == "shape":
        tensors[first] = tensors[first][:, 1:].contiguous()
    elif damage == "infinite":
        tensors[first][0, 0] = torch.inf
    elif damage == "config":
        fields = json.loads(config)
        del fields["lora_alpha"]
        config = json.dumps(fields)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    if damage == "cut":
        content = (tmp_path / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(content[:-10])
    with pytest.raises(AdapterLoadError, match=message):
        reader_of(runner).read(source_of(tmp_path, digest="damaged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 17, 2399])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, at: int) -> None:
    tensor = torch.full((50, 48), torch.finfo(dtype).max, dtype=dtype)
    tensor[1::2] *= -1
    assert is_finite(tensor)
    tensor.view(-1)[at] = value
    assert not is_finite(tensor)


def test_a_tensor_without_elements_is_finite() -> None:
    assert is_finite(torch.empty(0, 4))
