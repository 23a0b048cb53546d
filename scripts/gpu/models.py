"""The model of the check, with random weights that are drawn on the device, and engines that serve it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.model.platform import Platform
from server.engine.types import SoftPromptSource


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama without tied embeddings; the parameters are those of its configuration."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def config(self, max_model_len: int) -> LlamaConfig:
        """The configuration in transformers."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=max_model_len,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )

    @property
    def layer_products(self) -> list[tuple[int, int]]:
        """Input and output features of a layer's products, with shared inputs stacked."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, width + 2 * kv_width),
            (width, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def weights_read(self) -> int:
        """Weights that every step reads: those of the layers' products and of the vocabulary head."""
        return self.layers * sum(rows * columns for rows, columns in self.layer_products) + (
            self.hidden * self.vocabulary
        )

    @property
    def key_values(self) -> int:
        """Numbers in the keys and values of one position."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the check is.

    Attributes:
        device: The device.
        dtype: Of weights, and of keys and values.
        shape: The model.
        context: Positions of a running sequence.
        batches: Numbers of running sequences; the last but one is that of all other parts.
        steps: Steps in a measurement.
        rounds: Repeats of measurements that alternate.
        chunk: Tokens of a text that arrives.
        chunks: Numbers of texts that arrive in one step.
        cartridge: Tokens of a long soft prompt.
        max_model_len: Positions of the longest sequence.
        kv_cache_memory: Bytes.
        copy_bytes: Size of the copy that measures the bandwidth.
        square: Width of the product that measures the peak.
    """

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    context: int
    batches: tuple[int, ...]
    steps: int
    rounds: int
    chunk: int
    chunks: tuple[int, ...]
    cartridge: int
    max_model_len: int
    kv_cache_memory: int
    copy_bytes: int
    square: int

    @property
    def batch(self) -> int:
        """Running sequences of the parts that do not vary their number."""
        return self.batches[-2]

    @property
    def is_dry(self) -> bool:
        """Whether it rehearses on a CPU."""
        return self.device.type == "cpu"


def full_scale() -> Scale:
    """An 8B shape in bfloat16 on a GPU of at least 80 GB."""
    return Scale(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        shape=Shape(
            hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128_256
        ),
        context=512,
        batches=(1, 16, 64, 256),
        steps=20,
        rounds=5,
        chunk=128,
        chunks=(1, 4, 16),
        cartridge=4096,
        max_model_len=8192,
        kv_cache_memory=32 * 2**30,
        copy_bytes=2**31,
        square=8192,
    )


def dry_scale() -> Scale:
    """A tiny shape in float32 on a CPU."""
    return Scale(
        device=torch.device("cpu"),
        dtype=torch.float32,
        shape=Shape(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocabulary=211),
        context=24,
        batches=(1, 2, 4, 6),
        steps=2,
        rounds=2,
        chunk=8,
        chunks=(1, 2),
        cartridge=64,
        max_model_len=256,
        kv_cache_memory=4 * 2**20,
        copy_bytes=2**20,
        square=64,
    )


def draw_model(scale: Scale, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, which never were anywhere but on the device."""
    torch.manual_seed(0)
    with scale.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            scale.shape.config(scale.max_model_len), dtype=dtype
        )
    return model


@contextmanager
def serving(scale: Scale, **settings: Any) -> Iterator[LLMEngine]:
    """An engine that serves the model.

    On a CPU it uses torch's attention: Triton's interpreter would take hours.

    Args:
        scale: The model and the device.
        settings: Settings of the engine that differ from the check's.
    """

    def load(*_: object, dtype: torch.dtype, **__: object) -> tuple[PreTrainedModel, dict[str, set[str]]]:
        return draw_model(scale, dtype), {"missing_keys": set()}

    defaults: dict[str, Any] = {
        "dtype": str(scale.dtype).removeprefix("torch."),
        "device": scale.device.type,
        "max_model_len": scale.max_model_len,
        "max_num_seqs": scale.batch + max(scale.chunks),
        "max_num_batched_tokens": max(2048, 2 * scale.chunk * max(scale.chunks)),
        "kv_cache_memory": scale.kv_cache_memory,
        "soft_prompt_host_bytes": 8 * 2**30,
        "enable_prefix_caching": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        scale.shape.config(scale.max_model_len).save_pretrained(folder)
        with patch.object(AutoModelForCausalLM, "from_pretrained", load):
            engine = LLMEngine(
                EngineSettings(model=folder, **{**defaults, **settings}),
                platform=Platform(scale.device) if scale.is_dry else None,
            )
        try:
            yield engine
        finally:
            engine.close()


def draw_soft_prompts(
    scale: Scale, folder: Path, count: int, num_virtual_tokens: int, *, only_key_values: bool = False
) -> list[SoftPromptSource]:
    """Write random soft prompts: alternately embeddings, and keys and values."""
    sources = []
    number = itertools.count(len(list(folder.iterdir())))
    for _ in range(count):
        index = next(number)
        is_key_values = only_key_values or index % 2 == 1
        width = scale.shape.key_values if is_key_values else scale.shape.hidden
        torch.manual_seed(index)
        path = folder / f"soft-prompt-{index}.safetensors"
        rows = torch.randn(num_virtual_tokens, width, dtype=scale.dtype, device=scale.device) * 0.02
        save_file({"prompt_embeddings": rows.cpu()}, path)
        sources.append(
            SoftPromptSource(
                digest=path.stem, num_virtual_tokens=num_virtual_tokens, is_key_values=is_key_values, path=str(path)
            )
        )
    return sources
