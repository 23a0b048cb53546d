"""The digests of a base's embeddings and head are those of their bytes."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from prompt_store.files.lora.base_copies import tensor_digest
from prompt_store.types import TensorData
from server.engine.adapters import base_digests as module
from server.engine.adapters.base_digests import base_digests

SHAPE: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


@pytest.mark.parametrize("is_tied", [True, False])
def test_digests_are_of_the_served_bytes(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1000)
    config = LlamaConfig(**SHAPE, num_attention_heads=4, tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    digests = base_digests(model)
    assert set(digests) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert (len(set(digests.values())) == 1) is is_tied
    for name, digest in digests.items():
        weight = model.get_parameter(name).detach()
        data = weight.view(torch.uint8).numpy().tobytes()
        assert digest == hashlib.sha256(data).hexdigest()
        assert digest == tensor_digest(TensorData("BF16", tuple(weight.shape), data), "bfloat16")
        # A copy in float32, as PEFT may save it, has the same digest after casting.
        single = TensorData("F32", tuple(weight.shape), weight.float().numpy().tobytes())
        assert digest == tensor_digest(single, "bfloat16")


def test_only_the_embedding_of_the_tokens_has_one() -> None:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    assert set(base_digests(model)) == {"transformer.wte.weight", "lm_head.weight"}


def test_quantised_tensors_have_none() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_attention_heads=4, tie_word_embeddings=False))
    head = torch.nn.Parameter(torch.zeros(60, 32, dtype=torch.int8), requires_grad=False)
    model.lm_head.weight = head
    assert set(base_digests(model)) == {"model.embed_tokens.weight"}
