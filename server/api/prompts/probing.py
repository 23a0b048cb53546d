"""Run a short text through the engine before an upload is published, to check that the model can use it.

All values of a file may be finite while the results of the model are not: keys of 3e38 make scores infinite. Such a
soft prompt would fail every request.
"""

from __future__ import annotations

from collections.abc import Iterator

from prompt_store.adapters import Adapter
from prompt_store.blobs.staging import Upload
from prompt_store.checking import CheckedUpload
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.types import CONFIG_FILE, ROWS_TENSOR, WEIGHTS_FILE, SoftPrompt
from server.api.keys.callers import Caller
from server.api.services import Services
from server.engine.interface import probe_member
from server.engine.types import AdapterSource, Member, SoftPromptSource
from server.errors import NotFiniteError, RequestRefusedError

PROBE_TEXT = "The quick brown fox jumps over the lazy dog: 0, 1 and 23.\nWhy?"

NEW_TOKENS = 2
"""Number of new tokens, so that the probe includes a decode step."""

MAX_TASKS = 16
"""Maximum number of tasks of a multitask prompt to try; there may be thousands."""


async def probe(
    services: Services, checked: CheckedUpload, upload: Upload, caller: Caller, *, over: AdapterSource | None = None
) -> None:
    """Try an upload, or each of its first tasks if it has several, with one permit.

    Args:
        services: The server.
        checked: The upload.
        upload: Its files; they must exist until this returns.
        caller: The uploader, whose turn in the queue is used.
        over: The adapter that a soft prompt was trained over, if any.

    Raises:
        InvalidPromptError: If the model computes NaN or an infinity, or the engine has never room for an adapter.
        OverloadedError: If no permit is free.
        EngineError: If the engine does not serve now, or cannot load the files.
    """
    content = checked.content
    (text,) = await services.tokenizer.encode([PROBE_TEXT], add_special_tokens=True)
    model = services.engine.model
    # A tokenizer may have more tokens than the model has rows; any token will do.
    text = [token_id for token_id in text if token_id < model.vocab_size] or [0]
    room = model.max_model_len - (content.num_virtual_tokens if isinstance(content, SoftPrompt) else 0)
    text = text[: max(1, room - NEW_TOKENS)]
    with services.admission.permits(1, waits=False):
        for member in _members(checked, upload, over):
            try:
                await probe_member(
                    services.engine,
                    member,
                    text,
                    max_tokens=max(0, min(NEW_TOKENS, room - len(text))),
                    salt=caller.tenant,
                    max_wait=services.max_wait(None),
                )
            except NotFiniteError as error:
                message = f"the base model cannot compute with {_named(member)}: {error.message}"
                field = ROWS_TENSOR if isinstance(content, SoftPrompt) else None
                raise InvalidPromptError([Fault("not_finite_in_model", message, WEIGHTS_FILE, field)]) from error
            except RequestRefusedError as error:
                if not isinstance(content, Adapter):
                    raise
                # The check of the files knows the numbers of an adapter, not how the engine lays them out and pads
                # them. A text that fits is refused only for its adapter.
                message = f"{WEIGHTS_FILE}: the adapter could never be loaded: {error.message}"
                raise InvalidPromptError([Fault("adapter_too_large", message, WEIGHTS_FILE)]) from error


def _members(checked: CheckedUpload, upload: Upload, over: AdapterSource | None) -> Iterator[Member]:
    """What the engine tries: the adapter, or each of the soft prompt's first tasks."""
    content, weights = checked.content, str(upload.path(WEIGHTS_FILE))
    if isinstance(content, Adapter):
        yield Member(
            adapter=AdapterSource(
                digest=checked.digest,
                path=weights,
                config_path=str(upload.path(CONFIG_FILE)),
                num_parameters=content.num_parameters,
                num_labels=content.num_labels,
            )
        )
        return
    for task_id in [None] if content.num_tasks is None else range(min(content.num_tasks, MAX_TASKS)):
        source = SoftPromptSource(
            digest=checked.digest,
            num_virtual_tokens=content.num_virtual_tokens,
            is_key_values=content.peft_type.is_key_values,
            path=weights,
            task_id=task_id,
            num_labels=content.num_labels,
        )
        yield Member(soft_prompt=source, adapter=over)


def _named(member: Member) -> str:
    if member.soft_prompt is None:
        return "this adapter"
    task_id = member.soft_prompt.task_id
    return "this soft prompt" if task_id is None else f"task {task_id} of this soft prompt"
