"""The model and the requests of the benchmarks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from server.engine.types import SoftPromptSource

VOCABULARY = 49_152
HIDDEN_SIZE = 576
KEY_VALUES_PER_LAYER = 2 * 3 * 64
"""Number of values per virtual token and layer: keys and values of three heads."""


@dataclass(frozen=True)
class Text:
    """One request.

    Attributes:
        token_ids: The tokens of its text.
        prompt: The index of its soft prompt.
    """

    token_ids: list[int]
    prompt: int


def build_model(folder: Path, *, layers: int = 30, vocab_size: int = VOCABULARY) -> Path:
    """Write a Llama of SmolLM2-135M's shape with random weights in bfloat16; returns its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    return folder / "model"


def build_soft_prompts(model_folder: Path, folder: Path, *, count: int, num_virtual_tokens: int) -> list[Path]:
    """Write random soft prompts with PEFT, alternately prompt tuning and prefix tuning; returns their folders."""
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    folders = []
    for index in range(count):
        torch.manual_seed(index)
        make = PrefixTuningConfig if index % 2 else PromptTuningConfig
        model = get_peft_model(base, make(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens))
        folders.append(folder / f"prompt{index}")
        model.save_pretrained(str(folders[-1]))
        base = model.get_base_model()
    return folders


def soft_prompt_source(folder: Path, index: int, num_virtual_tokens: int) -> SoftPromptSource:
    """Describe one of these soft prompts to the engine."""
    return SoftPromptSource(
        digest=folder.name,
        num_virtual_tokens=num_virtual_tokens,
        is_key_values=bool(index % 2),
        path=str(folder / "adapter_model.safetensors"),
    )


def make_texts(
    count: int, *, num_prompts: int, shortest: int, longest: int, vocab_size: int = VOCABULARY
) -> list[Text]:
    """Random texts; the soft prompts are assigned evenly, in random order."""
    rng = random.Random(1)
    prompts = [index % num_prompts for index in range(count)]
    rng.shuffle(prompts)
    return [
        Text([rng.randrange(1, vocab_size) for _ in range(rng.randint(shortest, longest))], prompt)
        for prompt in prompts
    ]
