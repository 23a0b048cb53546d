"""Tiny random models, soft prompts that PEFT made for them, and ways to run and compare."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from server.engine.types import SamplingParams, SoftPromptSource, TokenOutput

VOCABULARY = 197
CONTEXT = 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,  # far from uniform logits, so that a wrong key shows as a wrong token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=11),  # shorter than every longer text of the tests
}
PEFT_CONFIGS = {
    "prompt_tuning_20": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20),
    "prompt_tuning_8": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8),
    "p_tuning_7": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=7, encoder_hidden_size=24
    ),
    "prefix_13": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=13),
    "prefix_projected_16": lambda: PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=32
    ),
}


@dataclass
class Family:
    """A model on disk and in memory, with soft prompts of every type."""

    name: str
    path: Path
    model: PreTrainedModel
    soft_prompts: dict[str, SoftPromptSource] = field(default_factory=dict)
    peft_folders: dict[str, Path] = field(default_factory=dict)
    peft_models: dict[str, PeftModel] = field(default_factory=dict)

    def _peft_model(self, soft_prompt: str) -> PeftModel:
        if soft_prompt not in self.peft_models:
            base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
            self.peft_models[soft_prompt] = PeftModel.from_pretrained(base, self.peft_folders[soft_prompt])
        return self.peft_models[soft_prompt]

    def expected(self, soft_prompt: str | None, token_ids: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens of PEFT (or of the bare model) at batch 1."""
        model = self.model if soft_prompt is None else self._peft_model(soft_prompt)
        ids = torch.tensor([token_ids])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        return output[0, len(token_ids) :].tolist()


def make_family(name: str, folder: Path) -> Family:
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    # "" keeps PEFT from looking the base up, and no file names a place on this machine.
    model.config._name_or_path = model.name_or_path = ""
    path = folder / "model"
    model.save_pretrained(path)
    family = Family(name, path, model)
    for index, (key, make_config) in enumerate(PEFT_CONFIGS.items()):
        torch.manual_seed(100 + index)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        peft_model = get_peft_model(base, make_config())
        peft_folder = folder / key
        peft_model.save_pretrained(peft_folder)
        family.peft_folders[key] = peft_folder
        family.soft_prompts[key] = SoftPromptSource(
            digest=f"{name}-{key}",
            num_virtual_tokens=peft_model.active_peft_config.num_virtual_tokens,
            is_key_values=key.startswith("prefix"),
            path=str(peft_folder / "adapter_model.safetensors"),
        )
    return family


def greedy(max_tokens: int, **params: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)


def random_text(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(shortest, longest))]


def add(engine: LLMEngine, request_id: str, token_ids: list[int], params: SamplingParams, **more: object) -> None:
    refused = engine.add(AddRequest(request_id=request_id, prompt_token_ids=token_ids, params=params, **more))
    assert refused == []


def run(engine: LLMEngine) -> dict[str, list[TokenOutput]]:
    """Step until all is done, holding the scheduler's books to account after every step."""
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.num_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
