"""Train the demo's soft prompts with PEFT on labelled examples."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scripts.demo_build.corpus import examples
from scripts.demo_build.grammar import TASKS

BASE_NAME = "prelude-demo"
BATCH = 32
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """The training settings of one soft prompt.

    Attributes:
        config: PEFT's configuration.
        learning_rate: Peak learning rate, with linear warm-up over a tenth of the steps and cosine decay.
        steps: Number of batches of 32 examples.
    """

    config: PromptLearningConfig
    learning_rate: float
    steps: int


def recipes(model_folder: Path) -> dict[str, Recipe]:
    """The settings of the four soft prompts, each with another PEFT method."""
    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    return {
        "sentiment": Recipe(
            PromptTuningConfig(
                num_virtual_tokens=12,
                prompt_tuning_init=PromptTuningInit.TEXT,
                prompt_tuning_init_text=TASKS["sentiment"].instructions[0],
                tokenizer_name_or_path=str(model_folder),
                **common,
            ),
            learning_rate=5e-3,
            steps=300,
        ),
        "intent": Recipe(
            PromptEncoderConfig(num_virtual_tokens=10, encoder_hidden_size=192, **common),
            learning_rate=3e-3,
            steps=200,
        ),
        "extract": Recipe(
            PrefixTuningConfig(num_virtual_tokens=20, **common),
            learning_rate=3e-2,
            steps=300,
        ),
        "dates": Recipe(
            PrefixTuningConfig(num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=192, **common),
            learning_rate=3e-3,
            steps=300,
        ),
    }


def _batch(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded examples: the input, a line end, the answer. Only the answer counts in the loss."""
    rows, labels = [], []
    for text, answer in pairs:
        prompt = tokenizer.encode(text, add_special_tokens=False)
        completion = [*tokenizer.encode(f"\n{answer}", add_special_tokens=False), tokenizer.eos_token_id]
        rows.append(prompt + completion)
        labels.append([IGNORED] * len(prompt) + completion)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    }


def _train(recipe: Recipe, model_folder: Path, pairs: list[tuple[str, str]], seed: int, folder: Path) -> float:
    """Train one soft prompt and save it with PEFT; returns the mean loss of the last twenty steps."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, recipe.config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / (recipe.steps / 10))
        rate = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**_batch(tokenizer, rng.sample(pairs, BATCH))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"  step {step:4d}  loss {loss.item():.4f}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    _name_base(folder)
    return sum(losses[-20:]) / 20


def _name_base(folder: Path) -> None:
    """Replace the model's path in ``adapter_config.json`` by the base model's name."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = BASE_NAME
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_soft_prompts(model_folder: Path, out: Path, seed: int, only: list[str] | None) -> dict[str, object]:
    """Train all soft prompts, or only those named; returns the facts for the model card by name."""
    figures: dict[str, object] = {}
    for name, recipe in recipes(model_folder).items():
        if only and name not in only:
            continue
        print(name, flush=True)
        started = time.perf_counter()
        pairs, _ = examples(name, seed)
        loss = _train(recipe, model_folder, pairs, seed, out / name)
        figures[name] = {
            "peft_type": PeftType(recipe.config.peft_type).value,
            "num_virtual_tokens": recipe.config.num_virtual_tokens,
            "examples": len(pairs),
            "steps": recipe.steps,
            "learning_rate": recipe.learning_rate,
            "seconds": round(time.perf_counter() - started),
            "final_loss": round(loss, 5),
        }
    return figures
