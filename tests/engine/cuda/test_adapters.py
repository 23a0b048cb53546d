"""Adapters on a GPU's fused layers equal PEFT's, in Triton's interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.adapters.modules import module_shapes
from server.engine.adapters.products import find_products
from server.engine.attention.backend import ATTENTION, SDPABackend
from server.engine.cuda.adapter_backend import TritonAdapters
from server.engine.cuda.fused_layers import FusedMLP, fuse_layers
from server.engine.llm_engine import LLMEngine
from tests.support.engine.adapters import make_adapters
from tests.support.engine.fake_cuda import host_cuda_platform
from tests.support.engine.harness import CONFIGS, Family, add, greedy, random_text, run, tokens
from tests.support.engine.triton import DEVICE

pytestmark = pytest.mark.slow

KINDS = ("attention_4", "all_rslora", "head_and_embeddings", "bias", "dora", "ia3")
MAX_TOKENS = 4


def test_tokens_of_an_engine_equal_pefts(
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All kinds of adapters in one batch, bare and under a soft prompt."""
    family, rng = make_family("llama"), random.Random(3)
    adapted = make_adapters(family, tmp_path, KINDS)
    platform = host_cuda_platform(monkeypatch)
    platform.backends = (SDPABackend,)  # faster than the interpreter
    engine = make_engine(family, platform, max_num_seqs=16)
    assert engine.model.adapters_off is None
    assert isinstance(engine.runner.paged_model.adapter_backend, TritonAdapters)
    assert any(isinstance(module, FusedMLP) for module in engine.runner.model.modules())
    requests = {
        f"{kind} {soft_prompt}": (kind, soft_prompt, random_text(rng, 3, 9))
        for kind, soft_prompt in [*((kind, None) for kind in (*KINDS, None)), ("dora", "prompt_tuning_8")]
    }
    for key, (kind, soft_prompt, text) in requests.items():
        adapter = None if kind is None else adapted.sources[kind]
        add(engine, key, text, greedy(MAX_TOKENS), soft_prompt=family.source(soft_prompt), adapter=adapter)
    outputs = run(engine)
    for key, (kind, soft_prompt, text) in requests.items():
        assert tokens(outputs[key]) == adapted.expected(kind, text, MAX_TOKENS, soft_prompt), key


def test_the_products_of_fused_layers_are_known_by_the_names_of_the_modules() -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32).eval()
    model.requires_grad_(requires_grad=False)
    model.set_attn_implementation(ATTENTION)
    model.to(DEVICE)
    modules = module_shapes(model)
    separate = find_products(model, modules)
    weights = {product.parts[0].name: product.weight(torch.float32).clone() for product in separate[1:]}
    assert fuse_layers(model) > 0
    products = find_products(model, modules)
    own = [[part.name.rpartition(".")[2] for part in product.parts] for product in products]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert own == [["embed_tokens"], *layer * 3, ["lm_head"]]
    for product in products[1:]:
        rows = torch.randn(2, product.in_features, device=DEVICE)
        out = product.original(rows)
        for name, start, size in product.parts:
            torch.testing.assert_close(out[:, start : start + size], rows @ weights[name].t())
        product.exchange(lambda _: torch.empty(0))
        product.restore()
        assert torch.equal(product.holder[product.attribute](rows) if product.is_own else out, out)
