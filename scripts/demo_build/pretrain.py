"""Train the demo model from scratch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_build.corpus import documents

CONTEXT = 1024
SEQUENCE = 160
BATCH = 48
STEPS = 1800
PEAK_LEARNING_RATE = 2.5e-3
WARMUP_STEPS = 60
ANSWER_WEIGHT = 3.0
SHORT_ANSWER_WEIGHT = 16.0
"""Divided among the tokens of an answer, so that a single word weighs as much as a copied line."""


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama configuration with grouped-query attention, small enough to ship in a package."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, excluded: frozenset[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of token ids and loss weights forever, each [BATCH, SEQUENCE].

    Each row starts at the beginning of a document, and its last document may be cut off. A row that started inside a
    document could show an input and its answer without the instruction, which the model must not learn.
    """
    stream = documents(seed, excluded)
    rows: list[list[int]] = []
    row_weights: list[list[float]] = []
    ids: list[int] = []
    weights: list[float] = []
    while True:
        texts = [next(stream) for _ in range(256)]
        pieces = [text for document in texts for text, _ in document.pieces]
        encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
        for document in texts:
            for _, is_answer in document.pieces:
                tokens = next(encoded)
                ids += tokens
                weights += [_answer_weight(len(tokens)) if is_answer else 1.0] * len(tokens)
            ids.append(tokenizer.eos_token_id)
            weights.append(ANSWER_WEIGHT if document.pieces[-1][1] else 1.0)
            if len(ids) >= SEQUENCE:
                rows.append(ids[:SEQUENCE])
                row_weights.append(weights[:SEQUENCE])
                ids, weights = [], []
        while len(rows) >= BATCH:
            yield torch.tensor(rows[:BATCH]), torch.tensor(row_weights[:BATCH])
            del rows[:BATCH], row_weights[:BATCH]


def _answer_weight(num_tokens: int) -> float:
    return max(ANSWER_WEIGHT, SHORT_ANSWER_WEIGHT / num_tokens)


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int, excluded: frozenset[str], steps: int) -> LlamaForCausalLM:
    """Train the model, and print the loss every fifty steps."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    started = time.perf_counter()
    for step, (ids, weights) in zip(range(steps), batches(tokenizer, seed, excluded), strict=False):
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        rate = PEAK_LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            answers = losses[wanted > 1.0].mean().item()
            short = losses[wanted > ANSWER_WEIGHT].mean().item()
            seconds = time.perf_counter() - started
            progress = f"loss {loss.item():.3f}  answers {answers:.3f}  short {short:.3f}"
            print(f"step {step:5d}  {progress}  {seconds:.0f} s", flush=True)
    return model


def save_model(model: Any, folder: Path) -> None:
    """Write the configuration, and the weights in bfloat16."""
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.save_pretrained(folder)
