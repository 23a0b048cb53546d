"""Servers whose engine is vLLM, run by the interpreter that ``PRELUDE_VLLM_PYTHON`` names (``make test-vllm``)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from peft import PrefixTuningConfig, TaskType
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from server.demo.tour import MODEL_DIRECTORY
from tests.support.engine.harness import (
    ALL_PEFT_CONFIGS,
    CONFIGS,
    CONTEXT,
    MIXED_WINDOWS,
    MORE_CONFIGS,
    SHAPE,
    VOCABULARY,
    Family,
    make_family,
    random_text,
)
from tests.support.serving import serving

PYTHON = os.environ.get("PRELUDE_VLLM_PYTHON", "")

needs_vllm = pytest.mark.skipif(
    not PYTHON or not Path(PYTHON).is_file(), reason="PRELUDE_VLLM_PYTHON names no interpreter with vLLM"
)

# vLLM's attention on CPUs needs heads of at least 32.
WIDE = {**SHAPE, "hidden_size": 64, "head_dim": 32}
NARROW: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FALCON: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
WINDOWS = {**WIDE, **MIXED_WINDOWS, "head_dim": 32}
VLLM_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "mistral": lambda: MistralConfig(**WIDE, sliding_window=11),
    "qwen3": lambda: Qwen3Config(**WIDE),
    "gemma2": lambda: Gemma2Config(**{**WINDOWS, "tie_word_embeddings": True}, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**WINDOWS),
    "bloom": lambda: BloomConfig(hidden_size=128, n_layer=3, n_head=4, **NARROW),
    "falcon_multi_query": lambda: FalconConfig(**FALCON, **NARROW),
    "falcon_grouped": lambda: FalconConfig(**FALCON, **NARROW, new_decoder_architecture=True, num_kv_heads=2),
    "gptj": lambda: GPTJConfig(n_positions=CONTEXT, n_embd=128, n_layer=3, n_head=4, rotary_dim=16, **NARROW),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=3,
        n_head=4,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    ),
}
FALCON_ROWS = tuple(key for key in ALL_PEFT_CONFIGS if not key.startswith(("prefix", "cartridge")))
"""PEFT makes prefixes of Falcon for as many heads as there are queries, unless it is told otherwise."""

ONE_HEAD = {
    "prefix_one_head_13": lambda: PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=13, num_attention_heads=1, token_dim=32
    )
}
"""For a model with one key/value head of 32."""

assert CONFIGS.keys() <= {*VLLM_CONFIGS, "qwen2"}
assert MORE_CONFIGS.keys() <= VLLM_CONFIGS.keys()

Question = tuple[str | None, list[int]]
"""A soft prompt and a text."""


def make_vllm_family(name: str, folder: Path, keys: Sequence[str] = tuple(ALL_PEFT_CONFIGS)) -> Family:
    """A family that vLLM can serve, with a tokenizer; texts are given as token ids."""
    configs = {key: (ALL_PEFT_CONFIGS | ONE_HEAD)[key] for key in keys}
    family = make_family(name, folder, configs, VLLM_CONFIGS[name]())
    for path in MODEL_DIRECTORY.glob("tokenizer*"):
        shutil.copy(path, family.path)
    return family


@contextmanager
def serving_vllm(folder: Path, *flags: str, model: Path = MODEL_DIRECTORY) -> Iterator[tuple[httpx.Client, Any]]:
    """Run ``prelude serve --engine vllm`` in float32."""
    own = ["--engine", "vllm", "--engine-python", PYTHON, "--dtype", "float32", "--enforce-eager"]
    own += ["--num-threads", "1"]  # these models are so small that threads only wait for each other
    with serving(folder, *own, *flags, model=model) as (client, process):
        yield client, process


def questions(family: Family, count: int, seed: int = 0, longest: int = 60) -> list[Question]:
    """Requests for every soft prompt and the bare base in turn; the first texts have 1 and ``longest`` tokens."""
    rng = random.Random(seed)
    keys = [None, *family.soft_prompts]
    texts = [random_text(rng, 1, 1), random_text(rng, longest, longest)]
    texts += [random_text(rng, 1, longest) for _ in range(count)]
    return [(keys[index % len(keys)], texts[index]) for index in range(count)]


def adapter_of(server: psutil.Process) -> psutil.Process:
    """Our process of a server's engine; vLLM's own are its children."""
    (adapter,) = [child for child in server.children() if "server.engine.vllm.main" in child.cmdline()]
    return adapter
