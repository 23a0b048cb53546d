"""The adapter that a soft prompt is trained over: from the server, into the model.

PEFT has no pair of a soft prompt and an adapter. A PeftModel of a PeftModel generates without the soft prompt, and
says nothing. So the adapter's layers are put into the model, which then is the base of the soft prompt's PeftModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from prompt_store.types import PromptKind, PromptRef
from server.client.http import PreludeClient
from server.training.errors import SettingsError, TrainingError


@dataclass(frozen=True, slots=True)
class Over:
    """An adapter version on the server.

    Attributes:
        ref: ``NAME@VERSION``.
        record: The server's record of the version.
    """

    ref: str
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of its files."""
        return str(self.record["digest"])


def find_over(client: PreludeClient, text: str) -> Over:
    """Resolve ``NAME``, ``NAME@VERSION`` or ``NAME@ALIAS`` on the server.

    Raises:
        ClientError: If there is no such version.
        SettingsError: If it is no adapter that generates.
    """
    record = client.version(PromptRef.parse(text))
    ref = f"{record['id']}@{record['version']}"
    if record.get("kind") != PromptKind.ADAPTER:
        raise SettingsError(f"over: {ref} is a soft prompt; a soft prompt can be trained over an adapter only")
    if record["task_type"] != "CAUSAL_LM":
        raise SettingsError(f"over: {ref} has the task type {record['task_type']}, which does not generate")
    return Over(ref, record)


def add_over(base: Any, folder: Path) -> Any:
    """Put the adapter of a PEFT directory into a model, frozen and without dropout; returns the model.

    Raises:
        TrainingError: If PEFT cannot load it.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if hasattr(config, "lora_dropout"):
            config.lora_dropout = 0.0
        model: Any = PeftModel.from_pretrained(base, str(folder), config=config)
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(f"PEFT cannot load the adapter {folder}: {error}") from error
    for weight in model.parameters():
        weight.requires_grad = False
    return model.get_base_model()
