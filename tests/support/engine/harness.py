"""Tiny random models, soft prompts from PEFT for them, and helpers to run and compare."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from prompt_store.files.validation import validate
from prompt_store.types import BaseModelSpec, SoftPrompt
from server.engine.llm_engine import LLMEngine
from server.engine.types import (
    GenerateRequest,
    Logprobs,
    Member,
    ModelInfo,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)

VOCABULARY = 197
CONTEXT = 256
SHAPE: dict[str, Any] = {
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
MIXED_WINDOWS: dict[str, Any] = {
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "query_pre_attn_scalar": 20,
    "tie_word_embeddings": False,  # a random tied model repeats its last token
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=11),  # shorter than every longer text of the tests
}
MORE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SHAPE, **MIXED_WINDOWS, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **MIXED_WINDOWS),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=48,
        n_layer=3,
        n_head=4,
        initializer_range=0.25,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
}
PEFT_CONFIGS: dict[str, Callable[[], PeftConfig]] = {
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
MORE_PEFT_CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "p_tuning_lstm_5": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=5,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=12,
        encoder_dropout=0.0,
    ),
    "multitask_6": lambda: MultitaskPromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=6, num_tasks=3, num_ranks=2
    ),
    "cpt_9": lambda: CPTConfig(
        task_type=TaskType.CAUSAL_LM,
        cpt_token_ids=[5, 17, 3, 99, 42, 8, 120, 64, 1],
        cpt_mask=[1] * 9,
        cpt_tokens_type_mask=[1, 2, 2, 3, 4, 1, 2, 3, 4],
    ),
    "cartridge_14": lambda: CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=14, num_frozen_tokens=3),
}
ALL_PEFT_CONFIGS = PEFT_CONFIGS | MORE_PEFT_CONFIGS
MULTITASK_IDS = (0, 2)
"""The tasks of a multitask prompt for which a family has soft prompts, named ``KEY/TASK``."""
Answered = dict[str, tuple[str | None, list[int], list[int]]]
"""Requests with PEFT's answers: id -> (soft prompt, text, tokens)."""


@dataclass
class Family:
    """A model on disk and in memory, with soft prompts of every type."""

    name: str
    path: Path
    model: Any
    soft_prompts: dict[str, SoftPromptSource] = field(default_factory=dict)
    peft_folders: dict[str, Path] = field(default_factory=dict)
    peft_models: dict[str, Any] = field(default_factory=dict)

    def source(self, soft_prompt: str | None) -> SoftPromptSource | None:
        return None if soft_prompt is None else self.soft_prompts[soft_prompt]

    def _peft_model(self, soft_prompt: str) -> Any:
        if soft_prompt not in self.peft_models:
            base = copy.deepcopy(self.model)
            folder = self.peft_folders[soft_prompt]
            config = PeftConfig.from_pretrained(str(folder))
            # PEFT saves it, but does not load it for CPT.
            config.token_dim = json.loads((folder / "adapter_config.json").read_text())["token_dim"]
            self.peft_models[soft_prompt] = PeftModel.from_pretrained(base, str(folder), config=config)
        return self.peft_models[soft_prompt]

    def expected(self, soft_prompt: str | None, token_ids: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens of PEFT (or of the model without a soft prompt) at batch 1."""
        key, _, task_id = (soft_prompt or "").partition("/")
        model = self._peft_model(key) if key else self.model
        ids = torch.tensor([token_ids])
        task = {"task_ids": torch.tensor([int(task_id)])} if task_id else {}
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **task
            )
        greedy_ids: list[int] = output[0, len(token_ids) :].tolist()
        return greedy_ids

    def expected_logprobs(self, soft_prompt: str | None, token_ids: list[int]) -> torch.Tensor:
        """Log-softmax [text tokens, vocabulary] of PEFT: row i is the distribution of text token i, or NaN."""
        key, _, task_id = (soft_prompt or "").partition("/")
        model = self._peft_model(key) if key else self.model
        task = {"task_ids": torch.tensor([int(task_id)])} if task_id else {}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([token_ids]), **task).logits[0]
        logprobs = torch.log_softmax(logits.float(), -1)
        if len(logprobs) == len(token_ids):  # virtual rows have logits only where the soft prompt is embeddings
            return torch.cat([torch.full((1, logprobs.shape[-1]), torch.nan), logprobs[:-1]])
        return logprobs[-len(token_ids) - 1 : -1]


def make_family(
    name: str,
    folder: Path,
    peft_configs: Mapping[str, Callable[[], PeftConfig]] = PEFT_CONFIGS,
    config: PreTrainedConfig | None = None,
) -> Family:
    torch.manual_seed(sum(map(ord, name)))
    config = config or (CONFIGS | MORE_CONFIGS)[name]()
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # SDPA ignores the cap, and some versions of transformers choose it
    # With "", PEFT does not look the base up, and no file contains a local path.
    model.config._name_or_path = model.name_or_path = ""
    path = folder / "model"
    model.save_pretrained(path)
    family = Family(name, path, model)
    for index, (key, make_config) in enumerate(peft_configs.items()):
        torch.manual_seed(100 + index)
        base = copy.deepcopy(model)
        peft_model = get_peft_model(base, _with_width(make_config(), key, config))
        _train(peft_model, key)
        peft_folder = folder / key
        peft_model.save_pretrained(str(peft_folder))
        family.peft_folders[key] = peft_folder
        for task_id in MULTITASK_IDS if key.startswith("multitask") else (None,):
            family.soft_prompts[key if task_id is None else f"{key}/{task_id}"] = SoftPromptSource(
                digest=f"{name}-{key}",
                num_virtual_tokens=peft_model.active_peft_config.num_virtual_tokens,
                is_key_values=key.startswith(("prefix", "cartridge")),
                path=str(peft_folder / "adapter_model.safetensors"),
                task_id=task_id,
            )
    return family


def _with_width(made: PeftConfig, key: str, config: PreTrainedConfig) -> PeftConfig:
    """Set the width of the embeddings where PEFT would take the model's."""
    width = getattr(config, "word_embed_proj_dim", None)
    if width is not None and not key.startswith(("prefix", "cartridge")):
        vars(made)["token_dim"] = width
    return made


def _train(peft_model: Any, key: str) -> None:
    """Randomise parameters that PEFT initialises with zeros, so that errors show."""
    encoder = peft_model.prompt_encoder["default"]
    with torch.no_grad():
        if key.startswith("multitask"):
            encoder.prefix_task_cols.normal_()
            encoder.prefix_task_rows.normal_()
        elif key.startswith("cpt"):
            encoder.delta_embedding.weight.normal_()
        elif key.startswith("prefix_projected"):
            encoder.transform[-1].weight.mul_(10)


def uploaded(folder: Path, model: ModelInfo) -> SoftPrompt:
    """What the store makes of a folder that PEFT has written, for this model.

    Raises:
        InvalidPromptError: If an upload would be refused.
    """
    base = BaseModelSpec(
        name="base",
        embedding_width=model.embedding_width,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_model_len=model.max_model_len,
        dtype=model.dtype,
        hidden_size=model.hidden_size,
    )
    config, weights = (folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors"
    prompt = validate(config, weights, base, require_same_base=False)
    assert isinstance(prompt, SoftPrompt)
    return prompt


def check_that_the_store_takes_them(family: Family, model: ModelInfo) -> None:
    for key, folder in family.peft_folders.items():
        weights = folder / "adapter_model.safetensors"
        prompt = uploaded(folder, model)
        sources = [source for source in family.soft_prompts.values() if source.path == str(weights)]
        assert {(source.num_virtual_tokens, source.is_key_values) for source in sources} == {
            (prompt.num_virtual_tokens, prompt.peft_type.is_key_values)
        }, key
        assert all((source.task_id is None) == (prompt.num_tasks is None) for source in sources)


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)


def check_logprobs(
    entries: Sequence[Logprobs | None] | None, token_ids: list[int], want: torch.Tensor, *, num_top: int
) -> None:
    """Compare logprobs with ``Family.expected_logprobs``."""
    assert entries is not None
    assert len(entries) == len(token_ids) == len(want)
    for entry, token, row in zip(entries, token_ids, want, strict=True):
        if row.isnan().any():
            assert entry is None
            continue
        assert entry is not None
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        values, ids = row.topk(num_top)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert entry.top[0][0] == ids[0]
        assert all(value == entry.logprob for top, value in entry.top if top == token)


def random_text(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(shortest, longest))]


def add(
    engine: LLMEngine,
    request_id: str,
    token_ids: list[int],
    params: SamplingParams,
    *,
    others: Iterable[SoftPromptSource | None] = (),
    **more: Any,
) -> None:
    """Add a request; ``others`` are the soft prompts of an ensemble's other members."""
    members = tuple(Member(soft_prompt=one) for one in others)
    refused = engine.add(
        GenerateRequest(request_id=request_id, prompt_token_ids=token_ids, params=params, others=members, **more)
    )
    assert refused == []


def run(engine: LLMEngine) -> dict[str, list[TokenEvent]]:
    """Step until all sequences have ended, and check the scheduler's invariants after every step."""
    outputs: dict[str, list[TokenEvent]] = {}
    while engine.num_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    return outputs


def failure_of(event: TokenEvent) -> RequestFailure:
    """The error that ended a request, by its last event."""
    assert event.failure is not None
    assert event.finish_reason is None
    return event.failure


def tokens(outputs: list[TokenEvent]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
