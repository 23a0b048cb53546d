"""PEFT's adapters for tiny models, PEFT's answers with them, and passes of a model with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.engine.adapters.reading import AdapterReader
from server.engine.adapters.weights import AdapterWeights
from server.engine.model.exactness import Span
from server.engine.model.model_runner import ModelRunner
from server.engine.types import AdapterSource
from tests.support.engine.harness import Family

Targets = dict[str, list[str]]
"""Suffixes of names of linear layers: ``attention``, ``all``, and ``down`` for those that end an MLP."""


def targets_of(model: Any) -> Targets:
    """The linear layers of a model that adapters can change; of a mixture of experts, those of the attention."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    linears = [name for name in linears if name not in head]
    attention = {name.split(".")[-1] for name in linears if "attn" in name or "attention" in name}
    is_mixture = any(".experts" in name for name, _ in model.named_modules())
    every = (
        attention if is_mixture else {name.split(".")[-1] for name in linears if "layers" in name or ".h." in name}
    )
    down = {name for name in every if name in {"down_proj", "c_proj", "fc2", "dense_4h_to_h"}} or {min(attention)}
    return {"attention": sorted(attention), "all": sorted(every), "down": sorted(down), "head": head}


def embedding_name(model: Any) -> str:
    """The last part of the name of the input embeddings."""
    names = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    return str(names[0].split(".")[-1])


def _lora(rank: int, targets: Sequence[str], **more: Any) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=[*targets], lora_dropout=0.0, **more
    )


ADAPTERS: dict[str, Callable[[Any], PeftConfig]] = {
    "attention_4": lambda model: _lora(4, targets_of(model)["attention"]),
    "all_rslora": lambda model: _lora(
        6,
        targets_of(model)["all"],
        use_rslora=True,
        rank_pattern={targets_of(model)["all"][0]: 3, rf".*\.1\..*{targets_of(model)['all'][-1]}": 20},
        alpha_pattern={targets_of(model)["all"][0]: 5},
    ),
    "head_and_embeddings": lambda model: _lora(
        4, [embedding_name(model), targets_of(model)["head"][0].split(".")[-1]]
    ),
    "bias": lambda model: _lora(5, targets_of(model)["all"], lora_bias=True),
    "dora": lambda model: _lora(4, targets_of(model)["all"], use_dora=True),
    "ia3": lambda model: IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=targets_of(model)["all"],
        feedforward_modules=targets_of(model)["down"],
    ),
}
"""Six kinds of adapters, by the model."""


@dataclass
class Adapted:
    """A family's adapters, on disk and in PEFT."""

    family: Family
    sources: dict[str, AdapterSource] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Any] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def expected(
        self, adapter: str | None, text: list[int], max_tokens: int, soft_prompt: str | None = None
    ) -> list[int]:
        """PEFT's greedy tokens at batch 1."""
        if adapter is None:
            return self.family.expected(soft_prompt, text, max_tokens)
        model, key, task = self.models[adapter], "", {}
        if soft_prompt is not None:
            key, _, task_id = soft_prompt.partition("/")
            task = {"task_ids": torch.tensor([int(task_id)])} if task_id else {}
            if (adapter, key) not in self.pairs:
                # The adapter injected into the model, under the soft prompt. A PeftModel in a PeftModel generates
                # without the soft prompt. Where the adapter changes the embeddings, it is merged: under a soft
                # prompt, PEFT looks the text up in the embeddings without the adapter.
                inner = merged(model) if adapter == "head_and_embeddings" else copy.deepcopy(model).base_model.model
                vars(inner).pop("peft_config", None)
                folder = self.family.peft_folders[key]
                config = PeftConfig.from_pretrained(str(folder))
                config.token_dim = self.family._peft_model(key).active_peft_config.token_dim
                self.pairs[adapter, key] = PeftModel.from_pretrained(inner, str(folder), config=config)
            model = self.pairs[adapter, key]
        ids = torch.tensor([text])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **task
            )
        tokens: list[int] = output[0, len(text) :].tolist()
        return tokens


def merged(model: Any) -> Any:
    """The model with its adapter merged into its weights; tied weights are separated, because PEFT adds to both."""
    own = copy.deepcopy(model)
    head = own.base_model.model.get_output_embeddings()
    layer = getattr(head, "base_layer", head)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    own.base_model.model.config.tie_word_embeddings = False
    return own.merge_and_unload()


def make_adapters(family: Family, folder: Path, kinds: Sequence[str] = tuple(ADAPTERS)) -> Adapted:
    """Make PEFT's adapters for a family, with random weights."""
    adapted = Adapted(family)
    for index, kind in enumerate(kinds):
        torch.manual_seed(300 + index)
        path = folder / f"adapter-{kind}"
        with warnings.catch_warnings():
            # Of layers without a bias, of Conv1D, of tied weights, and, when it saves the biases, of 1-D tensors.
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(family.model), ADAPTERS[kind](family.model))
            randomise(model)
            model.save_pretrained(str(path), save_embedding_layers=False)
        adapted.models[kind] = model.eval()
        adapted.folders[kind] = path
        adapted.sources[kind] = source_of(path, digest=f"{family.name}-{kind}")
    return adapted


def randomise(model: Any) -> None:
    """Replace the parameters that PEFT initialises so that the adapter changes nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "ia3_l" in name:
                parameter.normal_(mean=1.0, std=0.3)


def source_of(folder: Path, *, digest: str, num_labels: int | None = None) -> AdapterSource:
    path = folder / "adapter_model.safetensors"
    return AdapterSource(
        digest=digest,
        path=str(path),
        config_path=str(folder / "adapter_config.json"),
        num_parameters=path.stat().st_size // 4,
        num_labels=num_labels,
    )


def reader_of(runner: ModelRunner) -> AdapterReader:
    backend = runner.paged_model.adapter_backend
    assert backend is not None, runner.info.adapters_off
    return AdapterReader(backend, runner.dtype, head_width=runner.info.hidden_size or runner.info.embedding_width)


@dataclass
class Text:
    """A text to continue, with an adapter and rows of a soft prompt of embeddings, or keys and values."""

    token_ids: list[int]
    adapter: AdapterWeights | None = None
    rows: torch.Tensor | None = None
    key_values: torch.Tensor | None = None

    @property
    def num_virtual(self) -> int:
        rows = self.rows if self.rows is not None else self.key_values
        return 0 if rows is None else len(rows)


@torch.inference_mode()
def generate(runner: ModelRunner, texts: Sequence[Text], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of all texts, computed in one batch: the prefills with one pass, then the decodes."""
    paged, size = runner.paged_model, runner.cache_spec.block_size
    per_seq = -(-max(text.num_virtual + len(text.token_ids) + max_tokens for text in texts) // size)
    assert per_seq * len(texts) <= runner.cache.num_blocks
    tables = [list(range(index * per_seq, (index + 1) * per_seq)) for index in range(len(texts))]
    spans: list[Span] = []
    counts: list[int] = []
    adapters: list[AdapterWeights | None] = []
    ids: list[int] = []
    last_rows: list[int] = []
    splices: list[tuple[int, torch.Tensor]] = []
    for text, table in zip(texts, tables, strict=True):
        start, n = 0, text.num_virtual
        if text.key_values is not None:
            runner.cache.fill(table[: -(-n // size)], text.key_values)
            start, n = n, 0
        if text.rows is not None:
            splices.append((len(ids), text.rows))
            ids += [0] * n
        ids += text.token_ids
        counts.append(n + len(text.token_ids))
        spans.append((table, start, counts[-1]))
        adapters.append(text.adapter)
        last_rows.append(len(ids) - 1)
    token_ids = torch.tensor([ids])
    inputs = {"input_ids": token_ids}
    if splices:
        embeds = paged.embed(token_ids, counts, adapters)
        for first, rows in splices:
            embeds[0, first : first + len(rows)] = rows.to(embeds)
        inputs = {"inputs_embeds": embeds}
    logits = paged.forward(spans, inputs, last_rows, adapters)
    answers = [[token] for token in logits.argmax(-1).tolist()]
    for step in range(1, max_tokens):
        positions = [text.num_virtual + len(text.token_ids) + step - 1 for text in texts]
        newest = [answer[-1] for answer in answers]
        logits = paged.launch_decodes(newest, positions, tables, len(texts), adapters)
        for answer, token in zip(answers, logits.argmax(-1).tolist(), strict=True):
            answer.append(token)
    return answers
