"""A soft prompt on raw text, trained as in PEFT's guide: its own configuration and saving, transformers' Trainer."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from scripts.demo_build.corpus import examples
from scripts.demo_build.grammar import TASKS
from server.demo.tour import MODEL_DIRECTORY

TASK = "sentiment"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Marks each turn, as the templates of most models do; that of the embedded model adds nothing to a message."""


def write_chat_model(folder: Path) -> Path:
    """Copy the embedded model, with ``CHAT_TEMPLATE``; returns the folder."""
    shutil.copytree(MODEL_DIRECTORY, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def train_raw_prompt(model_folder: Path, folder: Path, *, steps: int = 60) -> Path:
    """Train a soft prompt of 12 tokens on texts without any template, and save it; returns the folder."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = []
    for text, answer in examples(TASK, 0)[0][: 16 * steps]:
        prompt = tokenizer(text)["input_ids"]
        completion = [*tokenizer(f"\n{answer}")["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=TASKS[TASK].instructions[0],
        num_virtual_tokens=12,
        tokenizer_name_or_path=str(model_folder),
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), config)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=lambda batch: _padded(batch, tokenizer)
        ).train()
        model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def _padded(batch: list[dict[str, list[int]]], tokenizer: object) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    width = max(len(row["input_ids"]) for row in batch)
    pad: int = getattr(tokenizer, "pad_token_id", None) or 0
    gaps = [width - len(row["input_ids"]) for row in batch]
    pairs = list(zip(batch, gaps, strict=True))
    return {
        "input_ids": torch.tensor([row["input_ids"] + [pad] * gap for row, gap in pairs]),
        "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
        "labels": torch.tensor([row["labels"] + [-100] * gap for row, gap in pairs]),
    }
