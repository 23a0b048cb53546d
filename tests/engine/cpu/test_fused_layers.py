"""Fused modules compute the same as the model's own, and unknown modules are not replaced."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
)

from server.config import EngineSettings
from server.engine.attention.backend import ATTENTION, SDPABackend, make_metadata
from server.engine.attention.kv_cache import KVCache, KVCacheSpec
from server.engine.cpu import fused_layers, row_kernels
from server.engine.cpu.cpu_attention import CPUBackend
from server.engine.cpu.fused_layers import (
    FusedAttention,
    FusedMLP,
    FusedRMSNorm,
    Workspace,
    bind,
    fuse_layers,
    unfuse_layers,
)
from server.engine.cpu.packed_linear import PackedLinear, can_pack
from server.engine.llm_engine import LLMEngine
from server.engine.model.platform import CPUPlatform
from server.errors import EngineStartError
from tests.support.engine.families import FAMILIES, MIXED, UNTIED

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=3, num_kv_heads=2, head_dim=12, block_size=4, dtype=torch.float32)
NORMS = {LlamaRMSNorm: (True, 1.0), GemmaRMSNorm: (False, 2.0)}


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    return model


def fused_kinds(model: nn.Module) -> dict[str, int]:
    kinds = (FusedAttention, FusedMLP, FusedRMSNorm)
    return dict(Counter(type(module).__name__ for module in model.modules() if isinstance(module, kinds)))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (MistralConfig(**UNTIED), {"FusedAttention": 3, "FusedMLP": 3, "FusedRMSNorm": 7}),
        # Head norms are part of the attention.
        (Qwen3Config(**UNTIED, head_dim=16), {"FusedAttention": 3, "FusedMLP": 3, "FusedRMSNorm": 7}),
        (Gemma2Config(**UNTIED, head_dim=16), {"FusedAttention": 3, "FusedMLP": 3, "FusedRMSNorm": 13}),
        (Gemma3TextConfig(**UNTIED, **MIXED, head_dim=16), {"FusedAttention": 3, "FusedMLP": 3, "FusedRMSNorm": 13}),
        # No rotation in one layer; norms over all heads; another rotation; no known module.
        (FAMILIES["smollm3"](), {"FusedAttention": 2, "FusedMLP": 3, "FusedRMSNorm": 7}),
        (FAMILIES["olmo2"](), {"FusedMLP": 3, "FusedRMSNorm": 13}),
        (FAMILIES["cohere"](), {"FusedMLP": 3}),
        (FAMILIES["opt"](), {}),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_modules_of_a_known_form_are_replaced(config: PreTrainedConfig, wanted: dict[str, int]) -> None:
    model = build(config)
    count = fuse_layers(model)
    assert fused_kinds(model) == wanted
    assert count >= sum(wanted.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_recognised_by_its_output(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    norm: Any = kind(48, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(torch.randn(48))
    norm = norm.to(dtype)
    fused = fused_layers._fused_norm(norm)
    assert isinstance(fused, FusedRMSNorm)
    assert fused.rounds_first == NORMS[kind][0]
    rows = torch.randn(2, 5, 48).to(dtype)
    torch.testing.assert_close(fused(rows), norm(rows), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_norm_of_another_formula_is_not_replaced() -> None:
    class CentredRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    assert fused_layers._fused_norm(CentredRMSNorm(48).requires_grad_(False)) is None
    assert fused_layers._fused_norm(nn.LayerNorm(48)) is None


def test_an_mlp_of_another_activation_or_formula_is_not_replaced() -> None:
    class Halved(MistralMLP):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) / 2  # type: ignore[no-untyped-call]

    class Clamped(MistralMLP):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).clamp(-100.0, 100.0)  # type: ignore[no-untyped-call]

    model = build(MistralConfig(**UNTIED))
    for layer, kind in zip(model.model.layers, (Halved, Clamped, MistralMLP), strict=True):
        layer.mlp.__class__ = kind
    fuse_layers(model)
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["Halved", "Clamped", "FusedMLP"]
    relu = build(MistralConfig(**UNTIED, hidden_act="relu"))
    fuse_layers(relu)
    assert "FusedMLP" not in fused_kinds(relu)


def test_attention_of_another_formula_or_other_weights_is_not_replaced() -> None:
    class Scaled(MistralAttention):
        def forward(self, hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> Any:
            return super().forward(hidden_states * 2, *arguments, **others)

    class ClampedFarAway(MistralAttention):
        """As some models do, by the value (OLMo) or by the position (Llama 4): nothing happens near 0."""

        def forward(self, hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> Any:
            return super().forward(hidden_states.clamp(-50.0, 50.0), *arguments, **others)

    class ScaledFarAway(MistralAttention):
        def forward(self, hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> Any:
            far = (others["position_ids"] > 100)[..., None]
            return super().forward(torch.where(far, hidden_states * 1.5, hidden_states), *arguments, **others)

    class Quantised(nn.Linear):
        pass

    class Codes(torch.Tensor):
        """What torchao makes of a weight."""

    for kind in (Scaled, ClampedFarAway, ScaledFarAway):
        model = build(MistralConfig(**UNTIED))
        layers = model.model.layers
        layers[0].self_attn.__class__ = kind
        layers[1].self_attn.k_proj.__class__ = Quantised
        gate = layers[0].mlp.gate_proj
        gate.weight = torch.nn.Parameter(gate.weight.detach().as_subclass(Codes), requires_grad=False)
        fuse_layers(model)
        names = [type(layer.self_attn).__name__ for layer in layers]
        assert names == [kind.__name__, "MistralAttention", "FusedAttention"]
        assert [type(layer.mlp).__name__ for layer in layers] == ["MistralMLP", "FusedMLP", "FusedMLP"]


def test_a_layer_of_another_formula_keeps_its_own_pass() -> None:
    class Residual(MistralDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> Any:
            return super().forward(hidden_states, *arguments, **others) * 0.5

    model = build(MistralConfig(**UNTIED))
    model.model.layers[1].__class__ = Residual
    fuse_layers(model)
    assert ["forward" in vars(layer) for layer in model.model.layers] == [True, False, True]


def test_a_model_that_cannot_be_probed_keeps_its_attention() -> None:
    model = build(MistralConfig(**UNTIED))

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    fuse_layers(model)
    handle.remove()
    assert fused_kinds(model) == {"FusedRMSNorm": 7}
    with pytest.raises(RuntimeError, match="outside of a step"):  # the probe's attention is gone
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False)


def test_without_compiled_kernels_the_model_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "can_compile", lambda _dtype: False)
    model = build(MistralConfig(**UNTIED))
    assert fuse_layers(model) == 0
    assert fused_kinds(model) == {}


def test_a_model_that_differs_when_fused_is_served_unfused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(MistralConfig(**UNTIED)).save_pretrained(tmp_path)
    forward, load = FusedMLP.forward, AutoModelForCausalLM.from_pretrained
    loads = []

    def counted(*arguments: Any, **named: Any) -> Any:
        loads.append(arguments)
        return load(*arguments, **named)

    monkeypatch.setattr(FusedMLP, "forward", lambda mlp, rows: forward(mlp, rows) * 1.5)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    options = EngineSettings(model=str(tmp_path), dtype="float32", kv_cache_memory=2**22)
    engine = LLMEngine(options, platform=CPUPlatform())
    engine.close()
    assert "layers are not fused" in caplog.text
    assert "differ from its own" in caplog.text
    assert type(engine.runner.backend) is CPUBackend
    assert fused_kinds(engine.runner.model) == {}
    assert isinstance(engine.runner.model.model.layers[0].self_attn.k_proj, PackedLinear)
    assert len(loads) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**UNTIED, head_dim=16),
        Qwen2Config(**UNTIED),  # with biases
        Gemma3TextConfig(**UNTIED, **MIXED, head_dim=16),
        FAMILIES["smollm3"](),
    ],
    ids=lambda config: config.model_type,
)
def test_unfusing_restores_the_model_bit_by_bit(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"oneDNN cannot pack {dtype} here")
    model = build(config, dtype)
    ids = torch.arange(12)[None]
    kinds = {name: type(module) for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(ATTENTION)
    assert fuse_layers(model) > 0
    unfuse_layers(model)
    model.set_attn_implementation("sdpa")
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any("forward" in vars(module) for module in model.modules())
    again = model.state_dict()
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


def test_a_fused_model_keeps_no_second_copy_of_its_weights() -> None:
    model = build(MistralConfig(**UNTIED))
    layer = model.model.layers[0]
    linears = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj]
    gone = [weakref.ref(linear.weight) for linear in linears]
    del layer, linears
    fuse_layers(model)
    gc.collect()
    assert [weight() for weight in gone] == [None] * 4
    packed = [weakref.ref(module) for module in model.modules() if isinstance(module, PackedLinear)]
    unfuse_layers(model)
    gc.collect()
    assert packed
    assert all(module() is None for module in packed)


def test_where_attention_alone_cannot_be_compiled_layers_are_not_fused_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_backend: CPUBackend) -> None:
        raise RuntimeError("LLVM does not know this processor")

    build(MistralConfig(**UNTIED)).save_pretrained(tmp_path)
    monkeypatch.setattr(CPUBackend, "compile", fail)
    engine = LLMEngine(EngineSettings(model=str(tmp_path), dtype="float32", kv_cache_memory=2**22))
    engine.close()
    assert type(engine.runner.backend) is SDPABackend
    assert "layers are not fused" in caplog.text
    assert not any(isinstance(module, FusedAttention) for module in engine.runner.model.modules())


def test_a_pass_of_fused_attention_outside_of_a_step_fails() -> None:
    model = build(MistralConfig(**UNTIED))
    fuse_layers(model)
    with pytest.raises(AttributeError, match="backend"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    bind(model, CPUBackend(KVCache(SPEC, 4, CPU)))
    with pytest.raises(RuntimeError, match="outside of a step"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False)


def test_fused_attention_refuses_other_backends_and_positions() -> None:
    model = build(MistralConfig(**UNTIED))
    fuse_layers(model)
    cache = KVCache(SPEC, 4, CPU)
    backend = CPUBackend(cache)
    with pytest.raises(EngineStartError, match="SDPABackend"):
        bind(model, SDPABackend(cache))
    bind(model, backend)
    backend.begin(make_metadata([([0], 0, 2)], SPEC.block_size, CPU))
    angles = torch.zeros(1, 2, SPEC.head_dim // 2)
    with pytest.raises(NotImplementedError, match="rotary positions of shape"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, UNTIED["hidden_size"]), (angles, angles))


@torch.inference_mode()
def test_a_workspace_grows_and_gives_the_same_memory_for_the_same_width() -> None:
    workspace = Workspace(torch.bfloat16)
    few = workspace.rows(2, 8)
    assert few.shape == (1, 2, 8)
    assert few.dtype is torch.bfloat16
    assert workspace.rows(2, 8) is few
    assert workspace.rows(1, 8).data_ptr() == few.data_ptr()
    assert workspace.rows(5, 8).shape == (1, 5, 8)
    assert workspace.rows(2, 8).is_contiguous()
    assert workspace.rows(2, 16).data_ptr() != workspace.rows(2, 8).data_ptr()
