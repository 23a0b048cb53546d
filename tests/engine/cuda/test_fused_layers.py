"""Fused modules compute the same as the model's own, in few launches: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from server.engine.attention.backend import (
    ATTENTION,
    AttentionBackend,
    AttentionMetadata,
    SDPABackend,
    make_metadata,
)
from server.engine.attention.kv_cache import KVCache, KVCacheSpec
from server.engine.cuda import fused_layers
from server.engine.cuda.fused_layers import FusedAttention, FusedMLP, FusedRMSNorm, bind, fuse_layers, unfuse_layers
from server.engine.layers.forms import TOLERANCE
from server.engine.layers.layer_probe import LAYER_PARTS
from server.engine.llm_engine import LLMEngine
from server.engine.model import exactness
from server.engine.model.platform import CUDAPlatform
from server.errors import EngineStartError
from tests.support.engine.fake_cuda import host_cuda_platform, waits
from tests.support.engine.families import FAMILIES, LESS_COMMON
from tests.support.engine.harness import CONFIGS, MORE_CONFIGS, Family, add, greedy, random_text, run, tokens
from tests.support.engine.triton import DEVICE, triton_attention

pytestmark = pytest.mark.slow

EVERY = CONFIGS | MORE_CONFIGS | FAMILIES | LESS_COMMON
WHOLE = {"FusedAttention": 3, "FusedMLP": 3, "FusedRMSNorm": 7}
SANDWICH = {**WHOLE, "FusedRMSNorm": 13}
FUSED = {
    "llama": WHOLE,
    "mistral": WHOLE,
    "qwen2": WHOLE,  # with biases
    "qwen3": WHOLE,  # head norms are part of the attention
    "seed_oss": WHOLE,
    "gemma": WHOLE,
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "granite": WHOLE,  # with multipliers
    "phi3": WHOLE,  # with stacked projections
    "smollm3": {**WHOLE, "FusedAttention": 2},  # no rotation in one layer
    "starcoder2": {"FusedAttention": 3},
    "mixtral": {"FusedAttention": 3, "FusedRMSNorm": 7},
    "qwen3_moe": {"FusedAttention": 3, "FusedRMSNorm": 7},
    "olmo2": {"FusedMLP": 3, "FusedRMSNorm": 13},
    "cohere": {"FusedMLP": 3},
    "opt": {},
}
"""The modules of each family that are fused."""

WHOLE_LAYERS = {"llama", "mistral", "qwen2", "qwen3", "seed_oss", "gemma", "phi3"}
"""Families whose decoder layers have a fused pass."""

SPANS = [([3], 2, 1), ([0, 4], 5, 1), ([1], 0, 3)]


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.normal_()  # transformers initialises it with one number
    return model.to(DEVICE)


def make_cache(model: Any, num_blocks: int = 6) -> KVCache:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    spec = KVCacheSpec(config.num_hidden_layers, num_kv_heads, head_dim, 4, model.dtype)
    cache = KVCache(spec, num_blocks, DEVICE)
    cache.tensor.copy_(torch.randn(cache.tensor.shape, generator=torch.Generator().manual_seed(1)))
    return cache


@contextmanager
def attending(backend: AttentionBackend, metadata: AttentionMetadata) -> Iterator[None]:
    backend.begin(metadata)
    try:
        with torch.no_grad():  # in inference mode, some operations are not divided into their parts
            yield
    finally:
        backend.end()


def kinds_of(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, FusedAttention | FusedMLP | FusedRMSNorm):
            found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
    return found


def hidden_of(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[dict[str, tuple[Any, Any, torch.Tensor]]]:
    """Positional and named arguments and the result of each module that may be fused."""
    calls: dict[str, tuple[Any, Any, torch.Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: object, arguments: Any, named: Any, output: Any) -> None:
            calls[name] = arguments, named, hidden_of(output).clone()

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith(("self_attn", "mlp", "norm"))
        or {child for child, _ in module.named_children()} >= LAYER_PARTS
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_modules_equal_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = build(EVERY[name](), dtype)
    metadata, cache = make_metadata(SPANS, 4, DEVICE), make_cache(model)
    backend = SDPABackend(cache)
    positions = torch.cat([rows.query_positions.flatten() for rows in metadata.groups])[None]
    ids = torch.arange(5, device=DEVICE)[None]
    with recorded_calls(model) as calls, attending(backend, metadata):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    before = cache.tensor.clone()
    fuse_layers(model)
    if dtype != torch.float16:  # its largest value is 65504, so that a probe of large inputs may fail
        assert kinds_of(model) == FUSED[name]
        assert sum("forward" in vars(module) for module in model.modules()) == (3 if name in WHOLE_LAYERS else 0) + (
            2 if name == "smollm3" else 0
        )
    for layer in range(cache.spec.num_layers):
        for part in cache.layer(layer):
            part[metadata.slot_mapping] = 7.0
    bind(model, backend)
    num_compared = 0
    with attending(backend, metadata):
        for place, module in model.named_modules():
            is_fused = isinstance(module, FusedAttention | FusedMLP | FusedRMSNorm) or "forward" in vars(module)
            if is_fused and place in calls:
                arguments, named, expected = calls[place]
                inputs = hidden_of(arguments or (named["hidden_states"],)).clone()
                got = hidden_of(module(*arguments, **named))
                allowed = TOLERANCE[dtype] * expected.abs().max().item()
                if dtype is torch.float16 and "forward" in vars(module):
                    allowed *= 2  # a whole layer rounds several times
                torch.testing.assert_close(got, expected, rtol=0, atol=allowed, msg=f"{place} differs")
                assert torch.equal(hidden_of(arguments or (named["hidden_states"],)), inputs)
                num_compared += 1
    assert num_compared >= sum(FUSED[name].values()) - (3 if dtype is torch.float16 else 0)
    if FUSED[name].get("FusedAttention") == 3:
        allowed = TOLERANCE[dtype] * before.abs().max().item()
        torch.testing.assert_close(cache.tensor, before, rtol=0, atol=allowed)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts launches: one for each kernel of Triton, and for each of torch's operations that computes something.

    Views and allocations do not. An operation that changes no tensor and returns its input's memory is a view.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from triton.runtime.interpreter import GridExecutor

        self.names: list[str] = []
        self._is_inside = False
        launch = GridExecutor.__call__

        def counted(executor: Any, *arguments: Any, **named: Any) -> Any:
            self.names.append(executor.fn.__name__)
            self._is_inside = True
            try:
                return launch(executor, *arguments, **named)
            finally:
                self._is_inside = False

        patch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not self._is_inside:
            assert not waits(function, arguments), function
        result = function(*arguments, **(named or {}))
        if not self._is_inside and not name.startswith(("empty", "new_empty")):
            inputs = {
                memory_of(tensor) for tensor in tree_leaves((arguments, named)) if isinstance(tensor, torch.Tensor)
            }
            outputs = {memory_of(tensor) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)}
            if function._schema.is_mutable or not outputs <= inputs:
                self.names.append(name)
        return result


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts launches in the interpreter")
@pytest.mark.parametrize(
    ("name", "most"), [("llama", 10), ("qwen2", 10), ("qwen3", 10), ("phi3", 10), ("gemma3", 14), ("granite", 14)]
)
def test_a_layer_of_a_decode_step_has_few_launches(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes two, because the keys of each row are divided among programs here; nothing waits."""
    counts = {}
    for is_fused in (False, True):
        config = EVERY[name]()
        model = build(config)
        if is_fused:
            fuse_layers(model)
        backend = triton_attention.TritonBackend(make_cache(model))
        monkeypatch.setattr(backend, "num_shares", lambda *_: 2)
        bind(model, backend)
        metadata = make_metadata(SPANS[:2], 4, DEVICE)
        layer, ids = model.model.layers[1], torch.zeros(1, 2, dtype=torch.long)
        with recorded_calls(model) as calls, attending(backend, metadata):
            model(input_ids=ids, position_ids=torch.tensor([[2, 5]]), use_cache=False)
        arguments, named, _ = calls["model.layers.1"]
        with attending(backend, metadata), monkeypatch.context() as patch:
            launches = Launches(patch)
            with launches:
                layer(*arguments, **named)
        counts[is_fused] = launches.names
    assert len(counts[True]) <= most, counts[True]
    assert {"attend", "combine", "rotate_and_store", "gate"} <= set(counts[True])
    assert len(counts[False]) >= 30, counts[False]  # what is counted includes what fusing saves


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_of_an_engine_equal_pefts(
    name: str,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exactness, "PROBE_KEYS", 48)
    family = make_family(name)
    engine = make_engine(family, host_cuda_platform(monkeypatch), max_num_seqs=4)
    assert kinds_of(engine.runner.model) == WHOLE
    assert type(engine.runner.backend) is triton_attention.TritonBackend
    rng = random.Random(3)
    requests = {
        str(index): (soft_prompt, random_text(rng, 3, 9))
        for index, soft_prompt in enumerate([None, "prompt_tuning_8", "prefix_13"])
    }
    for key, (soft_prompt, text) in requests.items():
        add(engine, key, text, greedy(5), soft_prompt=family.source(soft_prompt))
    outputs = run(engine)
    for key, (soft_prompt, text) in requests.items():
        assert tokens(outputs[key]) == family.expected(soft_prompt, text, 5)


def test_a_model_that_differs_when_fused_is_served_unfused(
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gated = FusedMLP._gated
    monkeypatch.setattr(exactness, "PROBE_KEYS", 48)
    monkeypatch.setattr(FusedMLP, "_gated", lambda mlp, rows: gated(mlp, rows) * 1.5)
    engine = make_engine(make_family("llama"), host_cuda_platform(monkeypatch))
    assert "layers are not fused" in caplog.text
    assert "differ from its own" in caplog.text
    assert type(engine.runner.backend) is triton_attention.TritonBackend
    assert kinds_of(engine.runner.model) == {}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "phi3", "smollm3"])
def test_unfusing_restores_the_model_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    model = build(EVERY[name](), dtype)
    kinds = {place: type(module) for place, module in model.named_modules()}
    weights = {place: weight.clone() for place, weight in model.state_dict().items()}
    assert fuse_layers(model) > 0
    unfuse_layers(model)
    assert {place: type(module) for place, module in model.named_modules()} == kinds
    assert not any("forward" in vars(module) for module in model.modules())
    again = model.state_dict()
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[place], weight) for place, weight in weights.items())


def storage_bytes(model: nn.Module) -> int:
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_fused_model_keeps_no_second_copy_of_its_weights() -> None:
    model = build(EVERY["phi3"]())
    layer = build(EVERY["llama"]())
    for current in (model, layer):
        before = storage_bytes(current)
        projections = [
            module
            for place, module in current.named_modules()
            if place.endswith(("q_proj", "k_proj", "gate_proj", "up_proj"))
        ]
        gone = [weakref.ref(module.weight) for module in projections]
        del projections
        fuse_layers(current)
        gc.collect()
        assert all(weight() is None for weight in gone)
        fused = storage_bytes(current)
        norms = 7 * 48 * 4  # their factors are not parameters
        assert fused == before - norms
        unfuse_layers(current)
        gc.collect()
        assert storage_bytes(current) == before


class Quantised(nn.Linear):
    pass


def hook_linear(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *_: None)


def wrap_forward(model: Any) -> None:
    """As accelerate does to load offloaded weights."""
    for linear in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.k_proj):
        own = linear.forward
        linear.forward = lambda rows, own=own: own(rows)


def quantise_linear(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.__class__ = Quantised
    model.model.layers[1].self_attn.q_proj.__class__ = Quantised


def tie_weights(model: Any) -> None:
    """To modules that are not fused, so that the first layer's own modules stay fused."""
    model.other_up = nn.Linear(48, 80, bias=False)
    model.other_up.weight = model.model.layers[1].mlp.up_proj.weight
    model.other_value = nn.Linear(48, 24, bias=False)
    model.other_value.weight = model.model.layers[1].self_attn.v_proj.weight


def hook_module(model: Any) -> None:
    for module in (model.model.layers[1].mlp, model.model.layers[1].self_attn):
        module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [hook_linear, wrap_forward, quantise_linear, tie_weights, hook_module])
def test_modules_that_someone_changed_are_not_fused(change: Callable[[Any], None]) -> None:
    model = build(EVERY["llama"]())
    change(model)
    fuse_layers(model)
    layers = model.model.layers
    for layer, is_fused in zip(layers, (True, False, True), strict=True):
        assert isinstance(layer.mlp, FusedMLP) is is_fused
        assert isinstance(layer.self_attn, FusedAttention) is is_fused
        assert ("forward" in vars(layer)) is is_fused


def test_a_hooked_norm_is_not_fused() -> None:
    model = build(EVERY["qwen3"]())
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda *_: None)
    fuse_layers(model)
    assert not isinstance(model.model.layers[0].input_layernorm, FusedRMSNorm)
    assert not isinstance(model.model.layers[1].self_attn, FusedAttention)
    assert ["forward" in vars(layer) for layer in model.model.layers] == [False, False, True]


def test_head_norms_that_differ_in_more_than_their_weight_are_not_fused() -> None:
    model = build(EVERY["qwen3"]())
    model.model.layers[1].self_attn.k_norm.variance_epsilon = 0.5
    fuse_layers(model)
    assert [isinstance(layer.self_attn, FusedAttention) for layer in model.model.layers] == [True, False, True]


@pytest.mark.parametrize("reason", ["quantised", "float64", "no Triton"])
def test_some_models_are_not_fused_at_all(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(EVERY["llama"](), torch.float64 if reason == "float64" else torch.float32)
    if reason == "quantised":
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
    if reason == "no Triton":

        def fail() -> None:
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

        monkeypatch.setattr(fused_layers, "load_kernels", fail)
    assert fuse_layers(model) == 0
    assert kinds_of(model) == {}
    platform = host_cuda_platform(monkeypatch)
    assert type(platform) is CUDAPlatform
    assert platform.prepare(model) is None


def test_a_pass_of_fused_attention_outside_of_a_step_fails() -> None:
    model = build(EVERY["llama"]())
    fuse_layers(model)
    ids = torch.zeros(1, 3, dtype=torch.long, device=DEVICE)
    with pytest.raises(AttributeError, match="backend"):
        model(input_ids=ids, use_cache=False)
    bind(model, SDPABackend(make_cache(model)))
    with pytest.raises(RuntimeError, match="outside of a step"):
        model(input_ids=ids, use_cache=False)


def test_fused_attention_refuses_other_caches_and_positions() -> None:
    model = build(EVERY["llama"]())
    cache = make_cache(model)
    fuse_layers(model)
    for spec in (KVCacheSpec(3, 1, 12, 4, torch.float32), KVCacheSpec(3, 2, 12, 4, torch.bfloat16)):
        with pytest.raises(EngineStartError, match="the cache has"):
            bind(model, SDPABackend(KVCache(spec, 2, DEVICE)))
    backend = SDPABackend(cache)
    bind(model, backend)
    assert sorted(backend.calls) == [0, 1, 2]  # the startup check of the kernels reads them
    rows = torch.zeros(1, 2, 48, device=DEVICE)
    with attending(backend, make_metadata([([0], 0, 2)], 4, DEVICE)):
        for angles in (torch.zeros(1, 2, 6, device=DEVICE), torch.zeros(1, 2, 12, device=DEVICE).double()):
            with pytest.raises(NotImplementedError, match="rotary positions of shape"):
                model.model.layers[0].self_attn(rows, (angles, angles))


def test_kernels_compile_for_gpus_without_spills(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.engine.compile_layer_kernels"]
    command += ["--capabilities", "80", "90", "--dtypes", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["kernel"], one["capability"]) for one in built} == {
        (kernel, capability)
        for kernel in ("rms_norm", "add_and_norm", "gate", "rotate_and_store")
        for capability in (80, 90)
    }
    assert all(one["cubin"] > 0 and one["spilled"] == 0 for one in built)
