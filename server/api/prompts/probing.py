"""A short text through the engine before an upload is published: whether the model can compute with the soft prompt.

Every value of a file may be finite, and what the model computes from it not: keys of 3e38 make scores infinite. Such
a soft prompt would fail every request.
"""

from __future__ import annotations

from pathlib import Path

from prompt_store.checking import CheckedUpload
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.types import ROWS_TENSOR, WEIGHTS_FILE
from server.api.generation.call import shorter
from server.api.keys.callers import Caller
from server.api.services import Services
from server.engine.interface import probe_soft_prompt
from server.engine.types import SoftPromptSource
from server.errors import NotFiniteError

PROBE_TEXT = "The quick brown fox jumps over the lazy dog: 0, 1 and 23.\nWhy?"

NEW_TOKENS = 2
"""By which the probe goes through a decode too."""

MAX_TASKS = 16
"""Tasks of a multitask prompt that are tried, the first ones; they may be thousands."""


async def probe(services: Services, checked: CheckedUpload, weights: Path, caller: Caller) -> None:
    """Try an upload, each of its first tasks where it has several, and take a permit meanwhile.

    Args:
        services: Where engine and tokenizer are.
        checked: The upload.
        weights: Where its weights lie, until this returns.
        caller: Whose it is, and whose turn it takes.

    Raises:
        InvalidPromptError: If the model computes NaN or an infinity.
        OverloadedError: If no permit is free.
        EngineError: If the engine does not serve now, or cannot load the file.
    """
    soft_prompt = checked.soft_prompt
    (text,) = await services.tokenizer.encode([PROBE_TEXT], add_special_tokens=True)
    model = services.engine.model
    # A tokenizer may have more tokens than the model has rows; any token will do.
    text = [token_id for token_id in text if token_id < model.vocab_size] or [0]
    room = model.max_model_len - soft_prompt.num_virtual_tokens
    text = text[: max(1, room - NEW_TOKENS)]
    tasks = [None] if soft_prompt.num_tasks is None else range(min(soft_prompt.num_tasks, MAX_TASKS))
    with services.admission.permits(1, waits=False):
        for task_id in tasks:
            source = SoftPromptSource(
                digest=checked.digest,
                num_virtual_tokens=soft_prompt.num_virtual_tokens,
                is_key_values=soft_prompt.peft_type.is_key_values,
                path=str(weights),
                task_id=task_id,
                num_labels=soft_prompt.num_labels,
            )
            try:
                await probe_soft_prompt(
                    services.engine,
                    source,
                    text,
                    max_tokens=max(0, min(NEW_TOKENS, room - len(text))),
                    salt=caller.tenant,
                    max_wait=shorter(None, services.settings.http.max_wait_seconds),
                )
            except NotFiniteError as error:
                what = "this soft prompt" if task_id is None else f"task {task_id} of this soft prompt"
                message = f"the base model cannot compute with {what}: {error.message}"
                raise InvalidPromptError(
                    [Fault("not_finite_in_model", message, WEIGHTS_FILE, ROWS_TENSOR)]
                ) from error
