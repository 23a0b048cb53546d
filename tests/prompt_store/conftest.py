"""Soft prompts written by PEFT, and a base that they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import BaseModelSpec, PromptVersion
from tests.support.new_stores import new_store

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=6),
    "p_tuning": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "prefix_tuning": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=7),
    "prefix_projected": lambda: PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "p_tuning_lstm": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=3,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=8,
        encoder_dropout=0.0,
    ),
    "multitask": lambda: MultitaskPromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, num_tasks=3, num_ranks=2
    ),
    "cpt": lambda: CPTConfig(task_type=TaskType.CAUSAL_LM, cpt_token_ids=[3, 1, 4, 1]),
    "cartridge": lambda: CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=6, num_frozen_tokens=2),
    "head": lambda: PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
}

Publish = Callable[..., tuple[PromptVersion, bool]]
"""Publishes two files; the version, and whether it is new."""


LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""The Llama of these tests."""


@pytest.fixture(scope="session")
def base() -> BaseModelSpec:
    return BaseModelSpec(
        name="org/tiny",
        embedding_width=32,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        max_model_len=64,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def peft_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        **LLAMA_SHAPE,
    )
    config.num_labels = 4
    folders = {}
    for name, make_config in CONFIGS.items():
        auto: Any = AutoModelForSequenceClassification if name == "head" else AutoModelForCausalLM
        model = auto.from_config(config)
        model.config._name_or_path = model.name_or_path = ""
        folders[name] = tmp_path_factory.mktemp(name)
        get_peft_model(model, make_config()).save_pretrained(str(folders[name]))
    return folders


@pytest.fixture(scope="session")
def peft_files(peft_folders: dict[str, Path]) -> dict[str, tuple[bytes, bytes]]:
    """(adapter_config.json, adapter_model.safetensors) by name."""
    return {
        name: ((folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes())
        for name, folder in peft_folders.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    opened = open_store(new_store(tmp_path / "store"))
    yield opened
    opened.close()


@pytest.fixture
def publish(base: BaseModelSpec) -> Publish:
    def run(
        store: PromptStore, files: tuple[bytes, bytes], name: str = "p", **options: Any
    ) -> tuple[PromptVersion, bool]:
        with store.upload() as upload:
            for filename, data in zip(("adapter_config.json", "adapter_model.safetensors"), files, strict=True):
                with upload.open(filename) as file:
                    file.write(data)
            return store.publish(upload, name=name, base=base, **options)

    return run
