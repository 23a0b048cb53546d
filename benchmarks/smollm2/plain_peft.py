"""What a user of PEFT writes without Prelude: ``get_peft_model``, AdamW, a linear schedule, ``save_pretrained``.

    python -m benchmarks.smollm2.plain_peft --model DIR --data rows.jsonl --method prompt_tuning --steps 60 --out DIR

Same rows, batch size, steps, virtual tokens and seed as ``prelude train`` gets; the rates are those of PEFT's guides.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from server.datasets import LabelledText, read_examples

INSTRUCTION = "Classify the news article by its topic:"


def config_of(method: str, model: str, num_virtual_tokens: int) -> tuple[PeftConfig, float]:
    """The configuration of a method and its learning rate, both as in PEFT's guides."""
    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    if method == "lora":
        return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", **common), 2e-4
    common["num_virtual_tokens"] = num_virtual_tokens
    if method == "prompt_tuning":
        config: PeftConfig = PromptTuningConfig(
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=INSTRUCTION,
            tokenizer_name_or_path=model,
            **common,
        )
    elif method == "p_tuning":
        config = PromptEncoderConfig(encoder_hidden_size=128, **common)
    else:
        config = PrefixTuningConfig(prefix_projection=method == "p_tuning_v2", encoder_hidden_size=128, **common)
    return config, 3e-2


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config, rate = config_of(arguments.method, arguments.model, arguments.num_virtual_tokens)
    model: Any = get_peft_model(base, config)
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
    rows = [row for row in read_examples(arguments.data) if isinstance(row, LabelledText)]
    rng, losses = random.Random(arguments.seed), []
    for _ in range(arguments.steps):
        batch = [
            (tokenizer(f"{row.text}\n").input_ids, [*tokenizer(row.label).input_ids, tokenizer.eos_token_id])
            for row in rng.sample(rows, arguments.batch_size)
        ]
        width = max(len(text) + len(label) for text, label in batch)
        padding = [width - len(text) - len(label) for text, label in batch]
        loss = model(
            input_ids=torch.tensor([[*t, *y, *[0] * n] for (t, y), n in zip(batch, padding, strict=True)]),
            attention_mask=torch.tensor([[1] * (width - n) + [0] * n for n in padding]),
            labels=torch.tensor([[-100] * len(t) + y + [-100] * n for (t, y), n in zip(batch, padding, strict=True)]),
        ).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    model.save_pretrained(arguments.out)
    print(json.dumps({"first_loss": losses[0], "last_losses": losses[-5:]}))


if __name__ == "__main__":
    main()
