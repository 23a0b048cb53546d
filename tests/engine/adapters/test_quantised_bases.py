"""Adapters over linear layers of another class, without a ``weight``: as over the dequantised base."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.config import EngineSettings
from server.engine.model.loading import load_model
from server.engine.model.model_runner import ModelRunner
from tests.support.engine.adapters import Text, generate, make_adapters, reader_of
from tests.support.engine.harness import CONFIGS, MORE_CONFIGS, make_family, random_text

pytestmark = pytest.mark.slow

MAX_TOKENS = 8
STEP = 2.0**-6


class Int8Linear(nn.Module):
    """A linear layer of 8-bit integers. It has buffers only, which is what some libraries make of a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight / STEP).round().to(torch.int8))
        bias: torch.Tensor | None = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.get_buffer("codes").to(rows.dtype) * STEP
        bias: Any = self.bias
        return nn.functional.linear(rows, weight, bias)


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that are quantised: all but the head, as libraries do."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def round_weights(model: Any) -> None:
    """Make all weights multiples of ``STEP`` that 8 bits hold, so that quantising changes nothing."""
    for linear in linears_of(model).values():
        with torch.no_grad():
            linear.weight.copy_((linear.weight / STEP).round().clamp(-127, 127) * STEP)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_adapters_equal_peft_over_the_dequantised_base(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, rng = make_family(name, tmp_path, {}, (CONFIGS | MORE_CONFIGS)[name]()), random.Random(name)
    round_weights(family.model)
    family.model.save_pretrained(str(family.path))
    adapted = make_adapters(family, tmp_path)

    def load_quantised(*arguments: Any) -> Any:
        model, config = load_model(*arguments)
        for place, linear in linears_of(model).items():
            model.set_submodule(place, Int8Linear(linear))
        return model, config

    monkeypatch.setattr("server.engine.model.model_runner.load_model", load_quantised)
    settings = EngineSettings(model=str(family.path), dtype="float32", kv_cache_memory=2**25, block_size=4)
    runner = ModelRunner(settings)
    assert any(isinstance(module, Int8Linear) for module in runner.model.modules())
    reader = reader_of(runner)
    texts = {
        kind: Text(random_text(rng, 3, 20), None if kind is None else reader.read(adapted.sources[kind]))
        for kind in (None, *adapted.sources)
    }
    answers = generate(runner, list(texts.values()), MAX_TOKENS)
    expected = [adapted.expected(kind, text.token_ids, MAX_TOKENS) for kind, text in texts.items()]
    assert dict(zip(texts, answers, strict=True)) == dict(zip(texts, expected, strict=True))
