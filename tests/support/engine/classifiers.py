"""Classifiers from PEFT: a soft prompt and a classification head on a family's base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForSequenceClassification

from server.engine.types import SoftPromptSource
from tests.support.engine.harness import Family

NUM_LABELS = 3
CLASSIFIERS: dict[str, Callable[[], PeftConfig]] = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=9),
    "p_tuning": lambda: PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5, encoder_hidden_size=24),
    "prefix": lambda: PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=16),
    "multitask": lambda: MultitaskPromptTuningConfig(
        task_type=TaskType.SEQ_CLS, num_virtual_tokens=6, num_tasks=2, num_ranks=2
    ),
}
TASK_ID = 1
"""The task of the multitask classifier."""


@dataclass
class Classifier:
    """One classifier, in memory and on disk."""

    source: SoftPromptSource
    folder: Path
    peft_model: Any

    def expected(self, token_ids: list[int]) -> list[float]:
        """PEFT's logits."""
        task = {} if self.source.task_id is None else {"task_ids": torch.tensor([self.source.task_id])}
        with torch.no_grad():
            logits = self.peft_model(input_ids=torch.tensor([token_ids]), **task).logits
        expected: list[float] = logits[0].tolist()
        return expected


def make_classifier(family: Family, key: str, folder: Path) -> Classifier:
    torch.manual_seed(sum(map(ord, family.name + key)))
    # Without a padding token, the last token is pooled.
    base = AutoModelForSequenceClassification.from_pretrained(family.path, num_labels=NUM_LABELS).eval()
    peft_model: Any = get_peft_model(base, CLASSIFIERS[key]()).eval()
    with torch.no_grad():
        for parameter in base.score.parameters():
            parameter.normal_()
        if key == "multitask":
            encoder = peft_model.prompt_encoder["default"]
            encoder.prefix_task_cols.normal_()
            encoder.prefix_task_rows.normal_()
    peft_model.save_pretrained(str(folder))
    source = SoftPromptSource(
        digest=f"{family.name}-classifier-{key}",
        num_virtual_tokens=peft_model.active_peft_config.num_virtual_tokens,
        is_key_values=key == "prefix",
        path=str(folder / "adapter_model.safetensors"),
        task_id=TASK_ID if key == "multitask" else None,
        num_labels=NUM_LABELS,
    )
    return Classifier(source, folder, peft_model)
