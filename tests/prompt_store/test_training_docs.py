"""The examples of docs/soft-prompts.md: each method trains for a step, and its files are accepted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prompt_store.files.validation import validate
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec, PeftType, PromptKind, SoftPrompt
from tests.prompt_store.conftest import LLAMA_SHAPE

DOCUMENT = (Path(__file__).parents[2] / "docs" / "soft-prompts.md").read_text()
CONFIGS, TRAINING = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def make_configs() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(CONFIGS, namespace)  # noqa: S102 - our own document
    configs: dict[str, Any] = namespace["configs"]
    return configs


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        **LLAMA_SHAPE,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", make_configs())
def test_each_method_trains_and_its_files_are_accepted(
    name: str, base: BaseModelSpec, base_folder: Path, tmp_path: Path
) -> None:
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if name == "multitask":
        batch["task_ids"] = torch.tensor([0, 2])
    namespace = {"base": base_folder, "config": make_configs()[name], "batches": [batch] * 2, "folder": tmp_path}
    exec(TRAINING, namespace)  # noqa: S102 - our own document
    prompt = validate((tmp_path / CONFIG_FILE).read_bytes(), tmp_path / WEIGHTS_FILE, base, require_same_base=False)
    assert isinstance(prompt, SoftPrompt)
    assert prompt.num_virtual_tokens == namespace["config"].num_virtual_tokens


def test_every_method_is_in_the_document() -> None:
    trained = {config.peft_type.value for config in make_configs().values()}
    soft_prompts = {peft_type for peft_type in PeftType if peft_type.kind is PromptKind.SOFT_PROMPT}
    assert trained == soft_prompts
    assert all(f"| `{peft_type}`" in DOCUMENT for peft_type in soft_prompts)
