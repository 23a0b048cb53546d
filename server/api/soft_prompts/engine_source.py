"""Convert leased versions to what the engine gets, and validate task_id."""

from __future__ import annotations

from prompt_store.types import LeasedPrompt, PromptKind, PromptVersion
from server.engine.types import AdapterSource, SoftPromptSource
from server.errors import InvalidRequestError


def soft_prompt_source(leased: LeasedPrompt, task_id: int | None) -> SoftPromptSource:
    """Convert a leased version to a SoftPromptSource, whose file exists until the lease is released."""
    return SoftPromptSource(
        digest=leased.version.digest,
        num_virtual_tokens=leased.version.num_virtual_tokens,
        is_key_values=leased.version.peft_type.is_key_values,
        path=str(leased.weights_path),
        task_id=task_id,
        num_labels=leased.version.num_labels,
    )


def adapter_source(leased: LeasedPrompt) -> AdapterSource:
    """Convert a leased version to an AdapterSource, whose files exist until the lease is released."""
    version = leased.version
    if leased.config_path is None or version.num_parameters is None:
        raise TypeError(f"{full_name(version)} is not an adapter")
    return AdapterSource(
        digest=version.digest,
        path=str(leased.weights_path),
        config_path=str(leased.config_path),
        num_parameters=version.num_parameters,
        num_labels=version.num_labels,
    )


def full_name(version: PromptVersion) -> str:
    """``NAME@VERSION``."""
    return f"{version.name}@{version.version}"


def called(version: PromptVersion) -> str:
    """A version in a message: ``the soft prompt NAME@VERSION`` or ``the adapter NAME@VERSION``."""
    kind = "adapter" if version.kind is PromptKind.ADAPTER else "soft prompt"
    return f"the {kind} {full_name(version)}"


def check_task(version: PromptVersion | None, task_id: int | None) -> None:
    """Check that a multitask prompt is used with a valid task id, and others without one.

    Args:
        version: The soft prompt's version; None for the bare base.
        task_id: The task id in the request.

    Raises:
        InvalidRequestError: If a task id is missing, names no task, or is given for a soft prompt without tasks.
    """
    num_tasks = version.num_tasks if version else None
    if version is None or num_tasks is None:
        if task_id is None:
            return
        named = "the base model" if version is None else called(version)
        raise InvalidRequestError(
            f"task_id: only allowed for multitask soft prompts; {named} is not one", param="task_id"
        )
    if task_id is None or task_id >= num_tasks:
        problem = "a task is required" if task_id is None else f"task {task_id} does not exist"
        raise InvalidRequestError(
            f"task_id: {problem}: the multitask soft prompt {version.name}@{version.version} has the tasks "
            f"0 to {num_tasks - 1}",
            param="task_id",
        )
